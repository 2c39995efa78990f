"""Mode resolution: from the graph mode that was asked for to the one that this model and hardware can run.

Knows the compile mode, whether attention is a split point, and what the attention backends declare; knows
nothing about sizes or captured graphs. Rules as in vLLM's ``_check_and_update_cudagraph_mode``.
"""

from __future__ import annotations

import dataclasses
import logging

from workers.errors import ConfigError
from workers.modes import AttentionCGSupport, CompilationMode, CUDAGraphMode

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class ModeResolution:
    """What was asked for, what is run, and why they differ.

    Attributes:
        reason: One sentence, or None if ``mode`` is what was requested.
    """

    requested: CUDAGraphMode
    mode: CUDAGraphMode
    reason: str | None


def resolve_mode(
    requested: CUDAGraphMode,
    compile_mode: CompilationMode,
    support: AttentionCGSupport,
    attention_is_split: bool,
    query_len: int = 1,
) -> CUDAGraphMode:
    """The graph mode to run; logs one warning with the reason if it is not the requested one.

    Arguments and errors are those of :func:`resolve_mode_with_reason`.
    """
    resolution = resolve_mode_with_reason(requested, compile_mode, support, attention_is_split, query_len)
    if resolution.reason is not None:
        logger.warning("%s", resolution.reason)
    return resolution.mode


def resolve_mode_with_reason(
    requested: CUDAGraphMode,
    compile_mode: CompilationMode,
    support: AttentionCGSupport,
    attention_is_split: bool,
    query_len: int = 1,
) -> ModeResolution:
    """The graph mode to run and the reason for any difference from ``requested``.

    Args:
        requested: The user's mode.
        compile_mode: PIECEWISE needs mode 3, whose pieces are what is captured.
        support: The least of what the model's attention backends declare.
        attention_is_split: Whether the compiled graph is split at attention.
        query_len: Tokens that each request brings to a pure decode batch.

    Raises:
        ConfigError: FULL was asked for and the attention backend cannot be captured at all.
    """
    if requested is CUDAGraphMode.FULL and support <= AttentionCGSupport.NEVER:
        raise ConfigError(
            "cudagraph_mode FULL cannot run: the attention backend cannot be captured (support NEVER); "
            "set cudagraph_mode to PIECEWISE with compilation mode 3, or to NONE.",
            param="cudagraph_mode",
        )
    setting = _Setting(compile_mode, support, attention_is_split, query_len)
    mode, reasons = requested, []
    for rule in (_mixed_full, _decode_full, _uniform_full, _piecewise):
        resolved, why = rule(mode, setting)
        if resolved is not mode:
            reasons.append(why)
        mode = resolved
    if not reasons:
        return ModeResolution(requested, mode, None)
    reason = f"cudagraph_mode {requested.name} becomes {mode.name}: {'; '.join(reasons)}."
    return ModeResolution(requested, mode, reason)


@dataclasses.dataclass(frozen=True, slots=True)
class _Setting:
    compile_mode: CompilationMode
    support: AttentionCGSupport
    is_split: bool
    query_len: int

    @property
    def has_pieces(self) -> bool:
        return self.compile_mode is CompilationMode.VLLM_COMPILE and self.is_split


def _mixed_full(mode: CUDAGraphMode, setting: _Setting) -> tuple[CUDAGraphMode, str]:
    if mode.mixed_mode() is not CUDAGraphMode.FULL or setting.support >= AttentionCGSupport.ALWAYS:
        return mode, ""
    why = (
        "a full graph of a mixed batch needs an attention backend with support ALWAYS, "
        f"this one has {setting.support.name}"
    )
    return (CUDAGraphMode.FULL_AND_PIECEWISE if setting.is_split else CUDAGraphMode.FULL_DECODE_ONLY), why


def _decode_full(mode: CUDAGraphMode, setting: _Setting) -> tuple[CUDAGraphMode, str]:
    if mode.decode_mode() is not CUDAGraphMode.FULL or setting.support > AttentionCGSupport.NEVER:
        return mode, ""
    why = "the attention backend cannot be captured (support NEVER)"
    return (CUDAGraphMode.PIECEWISE if setting.has_pieces else CUDAGraphMode.NONE), why


def _uniform_full(mode: CUDAGraphMode, setting: _Setting) -> tuple[CUDAGraphMode, str]:
    is_enough = setting.query_len == 1 or setting.support >= AttentionCGSupport.UNIFORM_BATCH
    if mode.decode_mode() is not CUDAGraphMode.FULL or is_enough:
        return mode, ""
    why = (
        f"decode batches of {setting.query_len} tokens per request need an attention backend with support "
        f"UNIFORM_BATCH, this one has {setting.support.name}"
    )
    return (CUDAGraphMode.PIECEWISE if setting.is_split else CUDAGraphMode.NONE), why


def _piecewise(mode: CUDAGraphMode, setting: _Setting) -> tuple[CUDAGraphMode, str]:
    if not mode.has_piecewise() or setting.has_pieces:
        return mode, ""
    if setting.compile_mode is not CompilationMode.VLLM_COMPILE:
        why = f"piecewise graphs need compilation mode 3, this is mode {int(setting.compile_mode)}"
    else:
        # Without the split, a piece would freeze one step's attention metadata and return wrong tokens.
        why = "piecewise graphs need the model to be split at attention, and it is not"
    is_decode_full = mode.decode_mode() is CUDAGraphMode.FULL
    return (CUDAGraphMode.FULL_DECODE_ONLY if is_decode_full else CUDAGraphMode.NONE), why
