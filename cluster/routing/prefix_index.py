"""Which prefix blocks a replica holds, as known from afar, and what one reader has yet to be told of it.

The replica keeps a :class:`PrefixIndex` of its own cache and one :class:`PrefixFeed` per ingress; the ingress keeps an
index per replica and finds there the longest cached prefix of a prompt, without asking anybody. A step's changes
cost 8 bytes per block. A reader that falls behind gets a snapshot in place of a backlog, so what waits for it is
bounded by the cache itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.messages import PrefixUpdate
from workers.scheduler.prefix_journal import PrefixChanges, split_names

#: A backlog of this many changes is kept however small the cache is.
_MIN_BACKLOG = 1024


class PrefixIndex:
    """A set of block names that follows a prefix cache."""

    def __init__(self) -> None:
        self._names: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._names)

    def apply(self, update: PrefixUpdate) -> None:
        """Take in what the replica reported."""
        if update.is_snapshot:
            self._names.clear()
        self.change(update.changes)

    def change(self, changes: PrefixChanges) -> None:
        """Take in changes."""
        self._names.update(split_names(changes.added))
        self._names.difference_update(split_names(changes.removed))

    def snapshot(self) -> PrefixUpdate:
        """Everything that is held, for a reader that knows nothing."""
        return PrefixUpdate(PrefixChanges(b"".join(self._names)), is_snapshot=True)

    def longest_prefix(self, names: Sequence[bytes]) -> int:
        """How many of ``names``, from the first one on, are held without a gap."""
        known = self._names
        for count, name in enumerate(names):
            if name not in known:
                return count
        return len(names)


class PrefixFeed:
    """What one reader has yet to be told; begins with everything.

    Args:
        index: The replica's own index; changes go there first.
    """

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._is_held: dict[bytes, bool] | None = None  # None: a snapshot is due

    def note(self, changes: PrefixChanges) -> None:
        """Remember changes for the next :meth:`take`."""
        if self._is_held is None:
            return
        self._is_held.update(dict.fromkeys(split_names(changes.added), True))
        self._is_held.update(dict.fromkeys(split_names(changes.removed), False))
        if len(self._is_held) > max(_MIN_BACKLOG, len(self._index)):
            self._is_held = None

    def take(self) -> PrefixUpdate | None:
        """What to send now; None if the reader is up to date."""
        pending, self._is_held = self._is_held, {}
        if pending is None:
            return self._index.snapshot()
        if not pending:
            return None
        return PrefixUpdate(
            PrefixChanges(
                b"".join(name for name, is_held in pending.items() if is_held),
                b"".join(name for name, is_held in pending.items() if not is_held),
            )
        )
