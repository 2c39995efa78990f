"""Host graphs that keep the forward context of their capture, as CUDA graphs do.

What an op reads on the host while it is captured, attention metadata say, is then baked in. With it a machine without a
GPU shows which attention backends are safe inside a full graph. Slower in nothing; only stricter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from workers.graphs.backends.base import CapturedGraph
from workers.graphs.backends.host import HostGraphBackend
from workers.graphs.context import get_forward_context, is_forward_context_available, set_forward_context


class FrozenHostGraphBackend(HostGraphBackend):
    """See the module."""

    name: ClassVar[str] = "frozen host"
    freezes_context: ClassVar[bool] = True

    def _capture(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[CapturedGraph, Any]:
        if not is_forward_context_available():
            return super()._capture(function, args, kwargs)
        context = get_forward_context()

        def in_captured_context(*args: Any, **kwargs: Any) -> Any:
            with set_forward_context(context):
                return function(*args, **kwargs)

        return super()._capture(in_captured_context, args, kwargs)
