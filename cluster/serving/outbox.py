"""What a replica owes each ingress: chunks that wait for the next message.

One outbox per connection of an ingress. Filled on the event loop by the engine's callback, drained by the ingress'
stream; a slow reader gets several steps in one message, so nothing is lost and nothing piles up per step.
"""

from __future__ import annotations

import asyncio

from cluster.messages import ReplicaState, StepMessage
from cluster.routing.prefix_index import PrefixFeed
from workers.outputs import TokenChunk


class Outbox:
    """Chunks for one ingress, merged until it asks for them.

    Args:
        state: The replica's state now.
        prefixes: What the ingress has yet to learn of the prefix cache.
    """

    def __init__(self, state: ReplicaState, prefixes: PrefixFeed) -> None:
        self.prefixes = prefixes
        self._chunks: list[TokenChunk] = []
        self._state = state
        self._changed = asyncio.Event()
        self._changed.set()  # the first message goes out at once and tells the ingress that it is connected

    def put(self, chunks: list[TokenChunk], state: ReplicaState) -> None:
        """Add a step's chunks for this ingress, which may be none, and the replica's new state."""
        self._chunks.extend(chunks)
        self._state = state
        self._changed.set()

    def wake(self) -> None:
        """Send a message even if there is nothing to tell."""
        self._changed.set()

    async def get(self) -> StepMessage:
        """Wait for news and take all of it."""
        await self._changed.wait()
        self._changed.clear()
        chunks, self._chunks = self._chunks, []
        return StepMessage(chunks, self._state, self.prefixes.take())
