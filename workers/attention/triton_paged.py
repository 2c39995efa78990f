"""Paged attention on CUDA through Triton kernels: fixed-grid split-KV decode and varlen prefill.

A pure decode step is one launch per layer: it writes the new key and value, attends, and merges its splits. Any
other batch is a cache write, the decode kernel for its one-token rows, and the prefill kernel for the rest. Every
grid follows from padded shapes and every length is read on the device, so both kinds may be captured in a graph.

Knows shapes, and which kernels a batch needs; nothing about layers, requests or graphs. Imports without triton;
making a backend does not.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import ClassVar

import torch

from workers.attention.base import AttentionBackend, AttentionSpec, BatchGeometry, Rope
from workers.attention.triton_kernels.tuning import (
    DecodeTile,
    PrefillTile,
    SplitPlan,
    SplitPolicy,
    default_decode_tile,
    default_prefill_tile,
    has_hopper_prefill,
    plan_splits,
)
from workers.errors import ConfigError
from workers.modes import AttentionCGSupport

#: Multiprocessors assumed where there is no CUDA device to ask (Triton's interpreter): an H200's.
_DEFAULT_NUM_SMS = 132


@dataclasses.dataclass(slots=True)
class TritonMetadata:
    """One step, as the launches want it. Filled by :meth:`TritonPagedAttention.build_metadata`.

    Attributes:
        plan: How the decode launch splits contexts.
        is_pure_decode: Every request brings one token, now and in every replay of a graph captured with this.
        has_single_tokens: Some request brings one token, so the decode kernel must run.
        last_rows_only: Nothing but each request's last token is read of the output.
        is_checked: The layout of the step's tensors was looked at; every layer's is the same.
    """

    block_table_RM: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    slot_mapping_T: torch.Tensor
    plan: SplitPlan
    is_pure_decode: bool
    has_single_tokens: bool
    last_rows_only: bool = False
    is_checked: bool = False


class TritonPagedAttention(AttentionBackend):
    """The CUDA backend.

    The workspace for partial results is allocated here, once; its size does not depend on any batch. All layers
    and graphs share it, so launches must be ordered on one stream, as an engine's are.

    Args:
        spec: The model's attention.
        device: A CUDA device (or the CPU, under Triton's interpreter).
        decode_tile: Instead of the table's choice for the head size.
        prefill_tile: Instead of the table's choice for the head size.
        splits: When and how a decode is split.
        num_sms: Multiprocessors to fill; None asks the device.

    Raises:
        ConfigError: Triton is missing, or the dtype or head size is unsupported.
    """

    name: ClassVar[str] = "triton"
    cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    splitting_ops: ClassVar[tuple[str, ...]] = ("warmgraph::attention", "warmgraph::rope_attention")

    def __init__(
        self,
        spec: AttentionSpec,
        device: torch.device,
        *,
        decode_tile: DecodeTile | None = None,
        prefill_tile: PrefillTile | None = None,
        splits: SplitPolicy | None = None,
        num_sms: int | None = None,
    ) -> None:
        super().__init__(spec, device)
        _check_supported(spec)
        # Imported here because the module needs triton, and selecting a backend must not.
        from workers.attention.triton_kernels.kernel_set import KernelSet
        from workers.kernels import triton_launch

        self.splits = splits or SplitPolicy()
        on_device = triton_launch.num_sms(device) if device.type == "cuda" else _DEFAULT_NUM_SMS
        self.num_sms = num_sms or on_device
        self.decode_tile = decode_tile or default_decode_tile(spec.head_dim)
        self.prefill_tile = prefill_tile or _default_prefill_tile(spec, device)
        self.kernels = KernelSet(spec, device, self.decode_tile, self.prefill_tile, self.splits)
        self._plans: dict[tuple[int, int], SplitPlan] = {}
        #: Of :meth:`forward`, and of :meth:`forward_rope`.
        self._is_warm = {False: False, True: False}

    def kv_cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        """``[B, 2, K, S, D]``: what one program reads of one block is contiguous, for keys and for values.

        A decode program walks one KV head. With heads inside tokens (the default shape) it would read rows of
        ``D`` elements, 128 bytes for a head of 64, a whole token apart; with heads outside it reads runs of
        ``S * D``. Keys and values of a block lie side by side, so one pointer and constant offsets reach both.
        """
        s = self.spec
        return (num_blocks, 2, s.num_kv_heads, s.block_size, s.head_dim)

    def build_metadata(self, geometry: BatchGeometry) -> TritonMetadata:
        """Shapes, and the two facts about the batch that choose its launches; no device work.

        A graph keeps the launches of its capture: one captured with ``max_query_len`` 1 may be replayed for pure
        decodes only, one captured with more for any batch that fits.
        """
        if geometry.is_pure_decode:
            num_rows, has_single_tokens = geometry.slot_mapping_T.shape[0], True
        else:
            starts = geometry.query_start_loc_cpu[: geometry.num_reqs + 1]
            num_rows, has_single_tokens = geometry.seq_lens.shape[0], bool((starts[1:] - starts[:-1] == 1).any())
        return TritonMetadata(
            block_table_RM=geometry.block_table_RM,
            seq_lens=geometry.seq_lens,
            query_start_loc=geometry.query_start_loc,
            slot_mapping_T=geometry.slot_mapping_T,
            plan=self.split_plan(num_rows, geometry.block_table_RM.shape[1]),
            is_pure_decode=geometry.is_pure_decode,
            has_single_tokens=has_single_tokens,
        )

    def for_last_rows(self, metadata: TritonMetadata) -> TritonMetadata:
        """As the interface says: of a prefill, only the tile with the last token is worked on."""
        return dataclasses.replace(metadata, last_rows_only=True)

    def forward(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TritonMetadata,
        out_THD: torch.Tensor,
    ) -> None:
        """As the interface says. Tokens may be rows of wider tensors; their heads and elements must be dense."""
        self._attend(q_THD, k_TKD, v_TKD, kv_cache, metadata, out_THD, None)

    def forward_rope(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TritonMetadata,
        out_THD: torch.Tensor,
        rope: Rope,
    ) -> None:
        """As the interface says: every kernel normalises and rotates what it loads, so none runs before them."""
        self._attend(q_THD, k_TKD, v_TKD, kv_cache, metadata, out_THD, rope)

    def warmup(self, rope: Rope | None = None) -> dict[str, str]:
        """Compile and load every kernel that :meth:`forward` can launch, for any batch; runs nothing.

        The first :meth:`forward` does it where nobody did. It must not happen under capture; an engine's eager warm-up
        run comes first.

        Args:
            rope: For :meth:`forward_rope` with arguments like these.

        Returns:
            Triton's hash of each kernel by name; its folder in the Triton cache is named by the base32 of that.
        """
        from workers.attention.triton_kernels.kernel_set import RopeKind
        from workers.kernels.triton_launch import compile_all

        launches = self.kernels.launches(RopeKind.of(rope))
        compile_all(list(launches.values()))
        self._is_warm[rope is not None] = True
        return {name: launch.hash for name, launch in launches.items()}

    def split_plan(self, num_rows: int, num_table_columns: int) -> SplitPlan:
        """The decode grid for a padded batch; remembered, so that a step costs one lookup."""
        key = (num_rows, num_table_columns)
        plan = self._plans.get(key)
        if plan is None:
            max_context = num_table_columns * self.spec.block_size
            plan = plan_splits(num_rows, self.spec.num_kv_heads, max_context, self.num_sms, self.splits)
            self._plans[key] = plan
        return plan

    def _attend(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_cache: torch.Tensor,
        m: TritonMetadata,
        out_THD: torch.Tensor,
        rope: Rope | None,
    ) -> None:
        if not self._is_warm[rope is not None]:
            self.warmup(rope)
        if not m.is_checked:
            for tensor in (q_THD, k_TKD, v_TKD, out_THD):
                _check_layout(tensor, m.slot_mapping_T.shape[0])
            m.is_checked = True
        if m.is_pure_decode:
            self._decode(q_THD, k_TKD, v_TKD, kv_cache, m, out_THD, rope)
            return
        self.kernels.write_cache(k_TKD, v_TKD, kv_cache, m.slot_mapping_T, out_THD, rope)
        # A capture must hold every launch that any replay needs.
        if m.has_single_tokens or _is_capturing(self.device):
            self._decode(q_THD, k_TKD, v_TKD, kv_cache, m, out_THD, rope)
        self.kernels.prefill(
            q_THD,
            kv_cache,
            m.block_table_RM,
            m.seq_lens,
            m.query_start_loc,
            out_THD,
            rope,
            last_rows_only=m.last_rows_only,
        )

    def _decode(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_cache: torch.Tensor,
        m: TritonMetadata,
        out_THD: torch.Tensor,
        rope: Rope | None,
    ) -> None:
        self.kernels.decode(
            q_THD,
            k_TKD,
            v_TKD,
            kv_cache,
            m.block_table_RM,
            m.seq_lens,
            m.query_start_loc,
            m.slot_mapping_T,
            out_THD,
            m.plan,
            mixed=not m.is_pure_decode,
            rope=rope,
        )


def _default_prefill_tile(spec: AttentionSpec, device: torch.device) -> PrefillTile:
    """The fastest kernel that the device, Triton's release and the model allow."""
    if device.type != "cuda":
        return default_prefill_tile(spec.head_dim)
    # The module's own word: its distribution has had several names.
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]

    capability = torch.cuda.get_device_capability(device)
    is_hopper = has_hopper_prefill(capability, triton.__version__, spec.head_dim, spec.sliding_window)
    return default_prefill_tile(spec.head_dim, hopper=is_hopper)


def _check_supported(spec: AttentionSpec) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "The triton attention backend needs the package triton: install it, or choose another attention_backend.",
            param="attention_backend",
        )
    if spec.dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"The triton attention backend works in bfloat16 or float16, not {spec.dtype}: set dtype to bfloat16.",
            param="dtype",
        )
    if spec.head_dim % 16 != 0 or spec.head_dim > 256:
        raise ConfigError(
            f"The triton attention backend takes head sizes that are multiples of 16 up to 256, not {spec.head_dim}: "
            "choose another attention_backend.",
            param="attention_backend",
        )
    assert spec.num_heads % spec.num_kv_heads == 0


def _check_layout(tensor: torch.Tensor, num_tokens: int) -> None:
    """Kernels are compiled for dense heads and 16-byte aligned rows."""
    assert tensor.shape[0] == num_tokens, "the step's slot mapping has another number of tokens"
    row_stride, head_stride, element_stride = tensor.stride()
    assert element_stride == 1, "elements of a head must be dense"
    assert tensor.shape[1] == 1 or head_stride == tensor.shape[2], "heads of a token must be dense"
    assert num_tokens <= 1 or row_stride % 16 == 0, "tokens must start at multiples of 16 elements"
    assert tensor.data_ptr() % 16 == 0, "tokens must start at multiples of 16 bytes"


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
