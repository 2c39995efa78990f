"""Graphs without a GPU: the contract of a captured graph, kept by running the callable again.

Inputs are the captured objects, outputs stay at the captured addresses in one shared pool, shapes are fixed, and
captures and replays are counted. What it does not give is the speed: a replay costs a call. So padding, dispatch,
nesting, addresses and memory are the same as on a GPU, and so are the mistakes that show. One difference is left:
a replay runs in the forward context of its own step, where a CUDA graph has its capture's metadata baked in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from workers.graphs.backends.base import CapturedGraph, GraphBackend, call_checked
from workers.graphs.backends.host_pool import HostPool
from workers.graphs.trees import iter_leaves, map_tensors


class HostGraphBackend(GraphBackend):
    """Records calls on CPU tensors."""

    name: ClassVar[str] = "host"
    checks_shapes: ClassVar[bool] = True
    freezes_context: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._pool = HostPool()

    def bytes_held(self) -> int:
        """Memory of the pool, in bytes."""
        return self._pool.bytes_held

    def _capture(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[CapturedGraph, Any]:
        held_before = self._pool.bytes_held
        with torch.no_grad():
            results = call_checked(function, args, kwargs)
        input_storages = {
            leaf.untyped_storage().data_ptr()
            for _, leaf in iter_leaves("inputs", (args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        owners: list[torch.Tensor] = []
        aliases: list[torch.Tensor] = []

        def keep(result: torch.Tensor) -> torch.Tensor:
            if result.device.type != "cpu":
                raise TypeError(f"the host backend captures CPU tensors, and the callable returned {result.device}")
            if result.untyped_storage().data_ptr() in input_storages:
                # An input written in place and handed on: it has its address already.
                owner, alias = result, self._without_ownership(result)
            else:
                owner, alias = self._pool.put(result)
            owners.append(owner)
            aliases.append(alias)
            return owner

        outputs = map_tensors(results, keep)
        remaining = iter(aliases)
        graph = _HostGraph(
            function,
            map_tensors(tuple(args), self._without_ownership),
            map_tensors(dict(kwargs), self._without_ownership),
            map_tensors(outputs, lambda _: next(remaining)),
            self._pool.bytes_held - held_before,
        )
        return graph, outputs

    def _without_ownership(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, or an alias of it if the pool owns its memory; weights and buffers are held as they are."""
        alias = self._pool.alias(tensor)
        return tensor if alias is None else alias

    @contextlib.contextmanager
    def _capture_scope(self, clean_up: bool) -> Iterator[None]:
        yield

    def _release_pool(self) -> None:
        self._pool.release()


class _HostGraph(CapturedGraph):
    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: Any,
        num_bytes: int,
    ) -> None:
        self._function = function
        self._args = args
        self._kwargs = kwargs
        self.outputs = outputs
        self.num_bytes = num_bytes

    def replay(self) -> None:
        """Call again on the captured inputs and write the results to the captured addresses.

        Raises:
            RuntimeError: The results have other shapes or dtypes than at capture.
        """
        with torch.no_grad():
            results = self._function(*self._args, **self._kwargs)
            pairs = zip(iter_leaves("output", self.outputs), iter_leaves("output", results), strict=False)
            for (name, captured), (other_name, result) in pairs:
                _write(name, captured, other_name, result)


def _write(name: str, captured: Any, other_name: str, result: Any) -> None:
    if not isinstance(captured, torch.Tensor):
        return
    if other_name != name or not isinstance(result, torch.Tensor):
        raise RuntimeError(f"a captured graph returned {name} at capture and {other_name} now")
    if result.shape != captured.shape or result.dtype != captured.dtype:
        raise RuntimeError(
            f"a captured graph has fixed shapes: {name} was {tuple(captured.shape)} {captured.dtype} at capture "
            f"and is {tuple(result.shape)} {result.dtype} now"
        )
    if result.data_ptr() != captured.data_ptr():
        captured.copy_(result)
