"""Compares every way to run the forward pass with the eager one, at every capture size, and finds what differs.

Knows which forms there are and when one cannot be had; how batches are made and compared is ``cases``' part, where a
difference comes from ``bisect``'s. Checked is the model as compiled and captured, and the decode step around it; not
scheduling, and of sampling the greedy choice only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from workers.analysis.bisect import Bisector
from workers.analysis.cases import Case, KvState, lay_out, make_cases, row_error, tolerance_of, worst_error
from workers.analysis.costs import describe_device
from workers.analysis.harness import Forward, ModelHarness
from workers.analysis.serving_step import ServingStep
from workers.analysis.sizes import configured_sizes
from workers.analysis.steps import ModelSteps
from workers.analysis.verify_report import Blame, Check, Finding, FormName, VerifyReport, safe_mode
from workers.attention.base import AttentionBackend
from workers.config import EngineConfig
from workers.errors import DeviceLostError
from workers.graphs import (
    AttentionCGSupport,
    BatchDescriptor,
    CUDAGraphMode,
    CUDAGraphWrapper,
)
from workers.graphs.backends.base import GraphBackend
from workers.sampling.selection import first_argmax

_NOT_THE_BEST = "a token is not the one with the highest logit"

#: Tokens of a request at most; enough for several KV blocks.
_MAX_CONTEXT = 64


@dataclasses.dataclass(frozen=True, slots=True)
class _Form:
    """One form of the whole forward pass; gives hidden states, or logits if ``gives_logits``.

    Attributes:
        step: Runs instead of ``forward``, and chooses tokens besides.
    """

    name: FormName
    forward: Forward
    descriptors: list[BatchDescriptor]
    mode: CUDAGraphMode = CUDAGraphMode.NONE
    gives_logits: bool = False
    step: ServingStep | None = None


def verify_graphs(
    config: EngineConfig,
    sizes: Sequence[int] | None = None,
    *,
    attention: type[AttentionBackend] | None = None,
    graph_backend: GraphBackend | None = None,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> VerifyReport:
    """Check a config's model.

    Args:
        sizes: Capture sizes in tokens; None takes the config's.
        attention: Instead of the config's attention backend.
        graph_backend: Instead of the device's own.
        seed: Of the batches.
        on_progress: Told what happens next.

    Raises:
        ConfigError: As an engine's start.
        CompileError: The model does not trace.
        DeviceLostError: A graph did what took the device from this process, as an address out of range does.
    """
    on_progress("loading and compiling")
    sizes = sorted(set(sizes or configured_sizes(config)), reverse=True)
    max_context = max(_MAX_CONTEXT, -(-sizes[0] // config.max_num_seqs))
    harness = ModelHarness(config, max_context, attention=attention, graph_backend=graph_backend)
    run = _Verification(harness, ModelSteps(harness), sizes, seed, on_progress)
    return run.report()


class _Verification:
    def __init__(
        self,
        harness: ModelHarness,
        steps: ModelSteps,
        sizes: Sequence[int],
        seed: int,
        on_progress: Callable[[str], None],
    ) -> None:
        self._harness = harness
        self._steps = steps
        self._sizes = sizes
        self._seed = seed
        self._on_progress = on_progress
        self._kv = KvState(harness, seed)
        self._tolerance = tolerance_of(harness.model.dtype)
        self._skipped: dict[str, str] = {}

    def report(self) -> VerifyReport:
        forms = list(self._forms())
        checks = [check for form in forms for check in self._checks(form)]
        failed = {check.form for check in checks if check.problem is not None}
        return VerifyReport(
            device=describe_device(self._harness.device),
            backend=self._harness.graph_backend.name,
            attention=self._harness.attention.name,
            tolerance=self._tolerance,
            checks=checks,
            skipped=self._skipped,
            findings=list(self._findings(forms, checks)),
            safe_mode=safe_mode(failed, [FormName(name) for name in self._skipped]).name,
        )

    def _forms(self) -> Iterator[_Form]:
        harness, steps = self._harness, self._steps
        plain = [BatchDescriptor(size) for size in self._sizes]
        compiled = steps.whole(steps.compiled)
        yield _Form(FormName.PADDED, harness.model, plain)
        yield _Form(FormName.COMPILED, compiled, plain)
        yield _Form(FormName.PIECEWISE, steps.whole(steps.compiled, self._wrap_piece), plain, CUDAGraphMode.PIECEWISE)
        full = CUDAGraphMode.FULL
        model = compiled if harness.config.compiles_pieces(harness.device.type) else harness.model
        support = harness.attention.cudagraph_support
        if not harness.graph_backend.freezes_context:
            support = AttentionCGSupport.ALWAYS
        reason = f"attention backend {harness.attention.name!r} declares {support.name}"
        max_num_seqs = harness.config.max_num_seqs
        if support is AttentionCGSupport.NEVER:
            self._skipped |= {FormName.FULL_DECODE: reason, FormName.DECODE_STEP: reason}
        else:
            decode = [BatchDescriptor(size, size, uniform=True) for size in self._sizes if size <= max_num_seqs]
            yield _Form(FormName.FULL_DECODE, self._wrap(harness.decode_logits(model), full), decode, full, True)
            step = ServingStep(harness, model, lambda function: self._wrap(function, full))
            yield _Form(FormName.DECODE_STEP, model, decode, full, True, step)
        if support < AttentionCGSupport.ALWAYS:
            self._skipped[FormName.FULL_MIXED] = reason
        else:
            mixed = [BatchDescriptor(size, min(size, max_num_seqs)) for size in self._sizes]
            yield _Form(FormName.FULL_MIXED, self._wrap(model, full), mixed, full)

    def _wrap(self, function: Callable[..., Any], mode: CUDAGraphMode) -> CUDAGraphWrapper:
        return CUDAGraphWrapper(function, mode, self._harness.graph_backend)

    def _wrap_piece(self, piece: Callable[..., Any], _: object) -> CUDAGraphWrapper:
        return self._wrap(piece, CUDAGraphMode.PIECEWISE)

    def _checks(self, form: _Form) -> Iterator[Check]:
        for descriptor in form.descriptors:
            self._on_progress(f"{form.name}: {descriptor.num_tokens} tokens")
            yield self._check(form, descriptor)

    def _check(self, form: _Form, descriptor: BatchDescriptor) -> Check:
        try:
            check = self._check_alive(form, descriptor)
            if self._harness.device.type == "cuda":
                torch.cuda.synchronize(self._harness.device)
        except torch.AcceleratorError as failure:
            raise DeviceLostError(
                f"The device was lost at {descriptor.num_tokens} tokens of {form.name} ({_first_line(failure)}), so "
                "nothing could be checked after it: serve without that form of cudagraph_mode, and look there."
            ) from failure
        return check

    def _check_alive(self, form: _Form, descriptor: BatchDescriptor) -> Check:
        size, cases = descriptor.num_tokens, self._cases(descriptor)
        worst = 0.0
        try:
            if form.step is not None:
                form.step.capture(descriptor)
            elif form.mode is not CUDAGraphMode.NONE:
                self._harness.capture(form.forward, form.mode, descriptor)
        except RuntimeError as failure:
            problem = f"the capture failed: {_first_line(failure)}"
            return Check(form.name, size, len(cases), float("inf"), cases[0].name, problem)
        for case in cases:
            error, difference = self._compare(form, descriptor, case)
            worst = max(worst, error)
            if difference is not None:
                return Check(form.name, size, len(cases), worst, case.name, difference)
        return Check(form.name, size, len(cases), worst)

    def _cases(self, descriptor: BatchDescriptor) -> list[Case]:
        config = self._harness.config
        return make_cases(
            descriptor.num_tokens,
            config.max_num_seqs,
            self._harness.max_context,
            is_decode=descriptor.uniform,
            seed=self._seed,
        )

    @torch.inference_mode()
    def _compare(self, form: _Form, descriptor: BatchDescriptor, case: Case) -> tuple[float, str | None]:
        """Largest difference from the eager, unpadded run, and what is wrong if anything is."""
        harness, size = self._harness, case.num_tokens
        is_poisoned = case.name == "poisoned"
        batch = lay_out(harness, case, BatchDescriptor(size, len(case.chunks)))
        self._kv.reset(batch, is_poisoned=False)
        expected = harness.run(harness.model, batch).clone()
        expected_kv = self._kv.used(batch)
        batch = lay_out(harness, case, descriptor)
        self._kv.reset(batch, is_poisoned=is_poisoned)
        token_ids_R = None
        try:
            if form.step is None:
                got = harness.run(form.forward, batch, form.mode, descriptor)[:size]
            else:
                logits_RV, token_ids_R = form.step.run(batch, descriptor, is_poisoned=is_poisoned)
                got = logits_RV[:size]
        except RuntimeError as failure:
            return float("inf"), _first_line(failure)
        if form.gives_logits:
            expected = harness.model.compute_logits(expected)
        error, kv_error = row_error(got, expected), worst_error(self._kv.used(batch), expected_kv)
        if error > self._tolerance:
            return error, f"results differ from eager by {error:.2g}"
        if kv_error > self._tolerance:
            return kv_error, f"keys and values differ from eager by {kv_error:.2g}"
        if self._kv.has_strayed(batch, is_poisoned=is_poisoned):
            return error, "a KV block that no request owns was written to"
        if token_ids_R is not None and not torch.equal(token_ids_R[:size], first_argmax(got)):
            return error, _NOT_THE_BEST
        return max(error, kv_error), None

    def _findings(self, forms: Sequence[_Form], checks: Sequence[Check]) -> Iterator[Finding]:
        """One for each form that failed, from its smallest failing graph."""
        bisector = Bisector(self._harness, self._steps, self._kv, self._tolerance)
        failed_forms = {check.form for check in checks if check.problem is not None}
        for form in forms:
            failed = [check for check in checks if check.form is form.name and check.problem is not None]
            if not failed or (form.step is not None and FormName.FULL_DECODE in failed_forms):
                continue  # the step around a wrong model says nothing new
            smallest = min(failed, key=lambda check: check.num_tokens)
            self._on_progress(f"looking for what differs: {form.name}")
            descriptor = next(d for d in form.descriptors if d.num_tokens == smallest.num_tokens)
            case = next(case for case in self._cases(descriptor) if case.name == smallest.failed_case)
            if form.step is not None:
                yield self._step_finding(form, form.step, descriptor, case)
            else:
                yield bisector.find(form.name, descriptor, case)

    def _step_finding(self, form: _Form, step: ServingStep, descriptor: BatchDescriptor, case: Case) -> Finding:
        """The model is right in a graph of its own, so what the step puts around it is wrong."""
        batch = lay_out(self._harness, case, descriptor)
        self._kv.reset(batch, is_poisoned=False)
        step.run(batch, descriptor, is_poisoned=False)
        wrong = step.wrong_input(batch)
        if wrong is not None:
            where, op, text = "before piece 0", "unpack_decode", f"The step's table does not become these {wrong}."
        else:
            where, op, text = (
                "after the last piece",
                "sampling",
                "The model's inputs are right, its logits or tokens not.",
            )
        return Finding(form.name, descriptor.num_tokens, where, op, Blame.OP, text)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
