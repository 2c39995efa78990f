"""Finds the first piece and op at which a form of the forward pass differs, and what is to blame for it.

Runs ever shorter parts of the model in the form that is wrong and in the form before it, which is right: padded against
unpadded, compiled against op by op, replayed against called. Then a few experiments tell address, shape and op apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from workers.analysis.cases import Case, KvState, lay_out, row_error
from workers.analysis.harness import Batch, ModelHarness
from workers.analysis.steps import ModelSteps, Part, checkable_nodes, name_of, run_op_by_op, up_to
from workers.analysis.verify_report import Blame, Finding, FormName
from workers.compile.stitch import PieceInfo
from workers.graphs import BatchDescriptor, CUDAGraphMode, CUDAGraphWrapper
from workers.graphs.inputs import InputLeaf, TensorInput, describe_inputs

_GRAPH_MODES = {
    FormName.PIECEWISE: CUDAGraphMode.PIECEWISE,
    FormName.FULL_MIXED: CUDAGraphMode.FULL,
    FormName.FULL_DECODE: CUDAGraphMode.FULL,
}


class Bisector:
    """See the module.

    Args:
        kv: Contents of the KV caches, the same before every run.
        tolerance: Largest relative difference that counts as none.
    """

    def __init__(self, harness: ModelHarness, steps: ModelSteps, kv: KvState, tolerance: float) -> None:
        self._harness = harness
        self._steps = steps
        self._kv = kv
        self._tolerance = tolerance

    def find(self, form: FormName, descriptor: BatchDescriptor, case: Case) -> Finding:
        """Narrow a difference down; ``case`` is one in which ``form`` differs."""
        trial = _Trial(self._harness, self._steps, self._kv, form, descriptor, case)
        num_steps = len(self._steps.plan.steps)
        if not self._differs(trial, num_steps):
            where = "the whole forward pass"
            text = "It does not show when the model runs as pieces: what lies around them (logits, padding) is wrong."
            return Finding(form, descriptor.num_tokens, where, None, Blame.OP, text)
        count = _first(num_steps, lambda count: self._differs(trial, count))
        piece, op = self._steps.describe(count - 1)
        blame, text = self._blame(trial, count)
        if op is None and blame is not Blame.ADDRESS:
            op = self._find_in_piece(trial, count - 1)
        return Finding(form, descriptor.num_tokens, piece, op, blame, text)

    def _differs(self, trial: _Trial, count: int) -> bool:
        return trial.error(count) > self._tolerance

    def _blame(self, trial: _Trial, count: int) -> tuple[Blame, str]:
        if trial.form is FormName.PADDED:
            return Blame.SHAPE, "Without a graph and without a compiler, real rows change when padding rows are added."
        if trial.form is not FormName.COMPILED:
            moved, reshaped = trial.changed_inputs(count)
            if reshaped:
                return Blame.SHAPE, f"At a replay the input {reshaped[0]} has another shape than at capture."
            if moved:
                text = f"At a replay the input {moved[0]} is at another address than at capture, so the graph reads"
                return Blame.ADDRESS, f"{text} what was there before; write it into a persistent buffer."
            if trial.error(count, captured_on_case=True) <= self._tolerance:
                text = "Captured on this very batch it is right: while it is captured it reads something on the host"
                return Blame.OP, f"{text} (lengths, attention metadata) and keeps it for every later replay."
        if trial.case.name != "full" and trial.unpadded().error(count) <= self._tolerance:
            return Blame.SHAPE, "A batch that needs no padding is right, so the padding rows change the real ones."
        return Blame.OP, "It is wrong with padding and without, at the same addresses."

    def _find_in_piece(self, trial: _Trial, index: int) -> str | None:
        """The first op of a piece that differs, or None if the piece by itself is right."""
        graph = self._steps.graph_of(index)
        nodes = checkable_nodes(graph)

        def differs(count: int) -> bool:
            return trial.node_error(index, up_to(graph, nodes[count - 1])) > self._tolerance

        if not nodes or not differs(len(nodes)):
            return None
        return name_of(nodes[_first(len(nodes), differs) - 1])


class _Trial:
    """One form on one case, in whole or in part."""

    def __init__(
        self,
        harness: ModelHarness,
        steps: ModelSteps,
        kv: KvState,
        form: FormName,
        descriptor: BatchDescriptor,
        case: Case,
    ) -> None:
        self.form = form
        self.case = case
        self._harness = harness
        self._steps = steps
        self._kv = kv
        self._descriptor = descriptor

    def unpadded(self) -> _Trial:
        """The same with a graph of just the size of the case."""
        size = self.case.num_tokens
        num_reqs = None if self._descriptor.num_reqs is None else len(self.case.chunks)
        descriptor = BatchDescriptor(size, num_reqs, self._descriptor.uniform)
        return _Trial(self._harness, self._steps, self._kv, self.form, descriptor, self.case)

    def error(self, count: int, *, captured_on_case: bool = False) -> float:
        """Largest difference in real rows after ``count`` steps; infinite if the form cannot run at all."""
        try:
            got = self._candidate(count, captured_on_case)
        except RuntimeError:
            return float("inf")
        return self._compare(got, self._reference(count))

    def changed_inputs(self, count: int) -> tuple[list[str], list[str]]:
        """Inputs of graphs that have moved, or have other shapes, at a replay; by name."""
        watches: list[_InputWatch] = []
        # A backend that checks shapes raises; the watch has seen them before it.
        with contextlib.suppress(RuntimeError):
            self._candidate(count, captured_on_case=False, watches=watches)
        moved = [name for watch in watches for name in watch.moved]
        return moved, [name for watch in watches for name in watch.reshaped]

    def node_error(self, index: int, graph: Any) -> float:
        """Largest difference of the value of a piece's graph cut short, on the inputs that piece ``index`` gets."""
        plain = run_op_by_op(graph).as_function()
        inputs_of = self._steps.inputs_of(index, self._steps.plain)
        inputs = self._run(inputs_of, self._descriptor)
        if self.form is FormName.PADDED:
            bare = self._run(inputs_of, self._bare)
            return self._compare(self._call(plain, inputs), self._call(plain, bare))
        if self.form is FormName.COMPILED:
            built = self._steps.compile(graph).as_function()
            return self._compare(self._call(built, inputs), self._call(plain, inputs))
        return self._compare(self._replayed(plain, inputs), self._call(plain, inputs))

    @property
    def _bare(self) -> BatchDescriptor:
        return BatchDescriptor(self.case.num_tokens, len(self.case.chunks))

    def _reference(self, count: int) -> Sequence[torch.Tensor]:
        if self.form is FormName.PADDED:
            return self._run(self._steps.first(count, self._steps.plain), self._bare)
        pieces = self._steps.plain if self.form is FormName.COMPILED else self._steps.compiled
        return self._run(self._steps.first(count, pieces), self._descriptor)

    def _candidate(
        self, count: int, captured_on_case: bool, watches: list[_InputWatch] | None = None
    ) -> Sequence[torch.Tensor]:
        if self.form is FormName.PADDED:
            return self._run(self._steps.first(count, self._steps.plain), self._descriptor)
        if self.form is FormName.COMPILED:
            return self._run(self._steps.first(count, self._steps.compiled), self._descriptor)
        mode = _GRAPH_MODES[self.form]

        def wrap(function: Callable[..., Any], name: str, names: list[str]) -> Callable[..., Any]:
            watch = _InputWatch(CUDAGraphWrapper(function, mode, self._harness.graph_backend, name=name), names)
            if watches is not None:
                watches.append(watch)
            return watch

        def wrap_piece(piece: Callable[..., Any], info: PieceInfo) -> Callable[..., Any]:
            return wrap(piece, f"piece {info.index}", self._steps.input_names(info.index))

        if mode is CUDAGraphMode.PIECEWISE:
            part = self._steps.first(count, self._steps.compiled, wrap_piece)
        else:
            part = wrap(self._steps.first(count, self._steps.compiled), "the graph", self._steps.argument_names)
        capture_batch = self._laid_out(self._descriptor) if captured_on_case else None
        self._harness.capture(part, mode, self._descriptor, capture_batch)
        return self._run(part, self._descriptor, mode)

    def _run(
        self, part: Part, descriptor: BatchDescriptor, mode: CUDAGraphMode = CUDAGraphMode.NONE
    ) -> list[torch.Tensor]:
        """Results, copied before a later graph may write over them."""
        batch = self._laid_out(descriptor)
        results = self._harness.run(part, batch, mode, descriptor)
        return [result.clone() for result in results]

    def _laid_out(self, descriptor: BatchDescriptor) -> Batch:
        batch = lay_out(self._harness, self.case, descriptor)
        self._kv.reset(batch, is_poisoned=self.case.name == "poisoned")
        return batch

    @torch.inference_mode()
    def _call(self, function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [result.clone() for result in function(*inputs)]

    @torch.inference_mode()
    def _replayed(self, function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Capture with zeros for every token at addresses of their own, then replay on ``inputs``."""
        by_token = [value.shape[:1] == (self._descriptor.num_tokens,) for value in inputs]
        static = [torch.zeros_like(value) if is_row else value for value, is_row in zip(inputs, by_token, strict=True)]
        wrapper = CUDAGraphWrapper(function, CUDAGraphMode.FULL, self._harness.graph_backend)
        self._harness.capture(lambda *_: wrapper(*static), CUDAGraphMode.FULL, self._descriptor)
        for target, value in zip(static, inputs, strict=True):
            if target is not value:
                target.copy_(value)
        return self._run(lambda *_: wrapper(*static), self._descriptor, CUDAGraphMode.FULL)

    def _compare(self, got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
        size = self.case.num_tokens
        pairs = zip(got, expected, strict=True)
        return max((row_error(now[:size], then[:size]) for now, then in pairs), default=0.0)


class _InputWatch:
    """Stands around a graph wrapper and notes inputs that a replay finds elsewhere, or in another shape."""

    def __init__(self, wrapper: CUDAGraphWrapper, names: list[str]) -> None:
        self._wrapper = wrapper
        self._names = names
        self._captured: Mapping[str, InputLeaf] = {}
        self.moved: list[str] = []
        self.reshaped: list[str] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = describe_inputs(self._names, args, kwargs)
        if self._wrapper.captured_descriptors():
            self._compare(now)
        else:
            # The last call without a graph is the capture.
            self._captured = now
        return self._wrapper(*args, **kwargs)

    def _compare(self, now: Mapping[str, InputLeaf]) -> None:
        for name, was in self._captured.items():
            leaf = now.get(name)
            if not isinstance(was, TensorInput) or not isinstance(leaf, TensorInput):
                continue
            if (was.shape, was.stride, was.dtype) != (leaf.shape, leaf.stride, leaf.dtype):
                self.reshaped.append(f"{name} of {self._wrapper.name}")
            elif was.data_ptr != leaf.data_ptr:
                self.moved.append(f"{name} of {self._wrapper.name}")


def _first(num: int, holds: Callable[[int], bool]) -> int:
    """The least count from 1 to ``num`` for which ``holds``, given that it does for ``num`` and for all after it."""
    low, high = 1, num
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
