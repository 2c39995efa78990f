"""``verify-graphs`` passes what is right, finds what was planted, and names it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from cluster.cli.main import app
from tests.tiny_models import tiny_checkpoint
from workers.analysis import harness
from workers.analysis.verify import verify_graphs
from workers.analysis.verify_report import Blame, FormName, VerifyReport, safe_mode
from workers.attention.base import AttentionBackend, BatchGeometry
from workers.attention.sdpa import SdpaMetadata, SdpaPagedAttention
from workers.compile.formats import base
from workers.compile.formats.fx_code import FxFormat
from workers.config import EngineConfig
from workers.graphs.backends.frozen_host import FrozenHostGraphBackend
from workers.kernels.decode_buffers import DecodeBuffers
from workers.kernels.decode_inputs import unpack_with_torch
from workers.modes import AttentionCGSupport, CUDAGraphMode
from workers.runner import decode_batch
from workers.sampling.sampler import Sampler, SamplerOutput

SIZES = [1, 4]


def config(**compilation: Any) -> EngineConfig:
    return EngineConfig.create(
        model=str(tiny_checkpoint("llama")),
        dtype="float32",
        device="cpu",
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        attention_backend="sdpa",
        compilation_config=compilation,
    )


def failed_forms(report: VerifyReport) -> set[FormName]:
    return {check.form for check in report.checks if check.problem is not None}


class OnTheDevice(AttentionBackend):
    """Attention of a pure decode that reads device tensors only, as a backend for full graphs must."""

    name = "on the device"
    cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, spec: Any, device: torch.device) -> None:
        super().__init__(spec, device)
        self._mixed = SdpaPagedAttention(spec, device)

    def build_metadata(self, geometry: BatchGeometry) -> tuple[BatchGeometry, SdpaMetadata | None]:
        is_decode = geometry.max_query_len == 1
        return geometry, None if is_decode else self._mixed.build_metadata(geometry)

    def forward(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        out_THD: torch.Tensor,
    ) -> None:
        geometry, mixed = metadata
        if mixed is not None:
            self._mixed.forward(q_THD, k_TKD, v_TKD, kv_cache, mixed, out_THD)
            return
        keys, values = (cache.flatten(0, 1) for cache in kv_cache.unbind(0))
        for row in range(q_THD.shape[0]):
            length = int(geometry.seq_lens[row]) if row < len(geometry.seq_lens) else 0
            if length == 0:
                out_THD[row].zero_()
                continue
            slot = int(geometry.slot_mapping_T[row])
            keys[slot], values[slot] = k_TKD[row], v_TKD[row]
            where = torch.arange(length)
            slots = geometry.block_table_RM[row, where // self.spec.block_size].long() * self.spec.block_size
            slots += where % self.spec.block_size
            groups = self.spec.num_heads // self.spec.num_kv_heads
            k = keys[slots].repeat_interleave(groups, 1)
            v = values[slots].repeat_interleave(groups, 1)
            weights = (torch.einsum("hd,lhd->hl", q_THD[row], k) * self.spec.scale).softmax(-1)
            out_THD[row] = torch.einsum("hl,lhd->hd", weights, v)


class ReadsTheHostAtCapture(SdpaPagedAttention):
    """Claims to be fit for full graphs, and plans each step from lengths on the host."""

    name = "reads the host"
    cudagraph_support = AttentionCGSupport.ALWAYS


class MixesRows(SdpaPagedAttention):
    """Lets padding rows into real ones."""

    name = "mixes rows"

    def forward(self, q: Any, k: Any, v: Any, kv_cache: Any, metadata: Any, out_THD: torch.Tensor) -> None:
        super().forward(q, k, v, kv_cache, metadata, out_THD)
        out_THD += out_THD.sum(0) / out_THD.shape[0]


class WritesPadding(SdpaPagedAttention):
    """Writes padding rows to a block that nobody owns."""

    name = "writes padding"

    def forward(
        self, q: Any, k_TKD: torch.Tensor, v: Any, kv_cache: torch.Tensor, metadata: SdpaMetadata, out: Any
    ) -> None:
        super().forward(q, k_TKD, v, kv_cache, metadata, out)
        if k_TKD.shape[0] > metadata.num_tokens:
            kv_cache[0, 0, 0] = k_TKD[-1]


class WrongFormat(FxFormat):
    """A compiler that gets one op wrong."""

    name = "standalone"

    def build(self, source: bytes, inputs: Sequence[torch.Tensor]) -> bytes:
        return re.sub(rb"(= _warmgraph_silu_and_mul_default\([^)]*\))", rb"\1 * 1.5", source)


def test_what_is_right_passes_in_every_form() -> None:
    report = verify_graphs(config(), SIZES)
    assert report.is_ok
    assert (report.findings, report.skipped, report.safe_mode) == ([], {}, "FULL_AND_PIECEWISE")
    assert {check.form for check in report.checks} == set(FormName)
    assert {check.num_tokens for check in report.checks} == set(SIZES)


def test_attention_on_device_tensors_may_be_frozen() -> None:
    report = verify_graphs(config(), [4], attention=OnTheDevice, graph_backend=FrozenHostGraphBackend())
    assert report.is_ok, report
    assert set(report.skipped) == {FormName.FULL_MIXED}


def test_host_metadata_read_at_capture_breaks_full_and_not_piecewise() -> None:
    report = verify_graphs(config(), SIZES, attention=ReadsTheHostAtCapture, graph_backend=FrozenHostGraphBackend())
    assert failed_forms(report) == {FormName.FULL_DECODE, FormName.DECODE_STEP, FormName.FULL_MIXED}
    assert report.safe_mode == "PIECEWISE"
    assert {finding.form for finding in report.findings} == {FormName.FULL_DECODE, FormName.FULL_MIXED}
    for finding in report.findings:
        assert (finding.piece, finding.op) == ("after piece 0", "warmgraph::attention(0)")
        assert finding.blame is Blame.OP
        assert "reads something on the host" in finding.explanation


def test_a_table_that_is_unpacked_wrongly_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(table_RF: torch.Tensor, buffers: DecodeBuffers, block_size: int) -> None:
        unpack_with_torch(table_RF, buffers, block_size)
        buffers.positions_R[: len(table_RF)] += 1

    monkeypatch.setattr(decode_batch, "unpack_decode", shifted)
    report = verify_graphs(config(), SIZES)
    assert failed_forms(report) == {FormName.DECODE_STEP}
    (finding,) = report.findings
    assert (finding.piece, finding.op, finding.blame) == ("before piece 0", "unpack_decode", Blame.OP)
    assert "positions" in finding.explanation
    assert report.safe_mode == "PIECEWISE"


def test_a_token_that_is_not_the_best_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(_: Sampler, logits_RV: torch.Tensor, *args: Any) -> SamplerOutput:
        return SamplerOutput(logits_RV.argmin(-1), None)

    monkeypatch.setattr(Sampler, "sample", sample)
    report = verify_graphs(config(), [4])
    problems = {check.form: check.problem for check in report.checks if check.problem}
    assert problems == {FormName.DECODE_STEP: "a token is not the one with the highest logit"}
    assert [finding.op for finding in report.findings] == ["sampling"]


def test_padding_rows_that_reach_real_ones_are_the_shapes_fault() -> None:
    report = verify_graphs(config(), [4], attention=MixesRows)
    assert failed_forms(report) == set(FormName)
    assert report.safe_mode == "NONE"
    finding = report.findings[0]
    assert (finding.form, finding.op, finding.blame) == (FormName.PADDED, "warmgraph::attention(0)", Blame.SHAPE)
    assert {finding.blame for finding in report.findings} <= {Blame.SHAPE, Blame.OP}


def test_padding_rows_that_write_to_the_cache_are_seen() -> None:
    report = verify_graphs(config(), [4], attention=WritesPadding)
    problems = {check.problem for check in report.checks}
    assert problems == {"a KV block that no request owns was written to"}


def test_inputs_that_move_are_the_addresses_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Tensor] = []

    def elsewhere(_: torch.Tensor, values: Any) -> torch.Tensor:
        kept.append(torch.from_numpy(values).clone())
        return kept[-1]

    monkeypatch.setattr(harness, "_fill", elsewhere)
    report = verify_graphs(config(), [4])
    assert failed_forms(report) == {FormName.PIECEWISE, FormName.FULL_DECODE, FormName.FULL_MIXED}
    assert report.safe_mode == "NONE"
    for finding in report.findings:
        assert finding.blame is Blame.ADDRESS
        assert "input_ids_T" in finding.explanation


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compilers_mistake_is_found_in_its_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base._HOMES, "standalone", (__name__, "WrongFormat"))
    report = verify_graphs(config(piece_format="standalone"), [4])
    assert FormName.COMPILED in failed_forms(report)
    assert FormName.PADDED not in failed_forms(report)
    finding = next(finding for finding in report.findings if finding.form is FormName.COMPILED)
    assert (finding.piece, finding.op, finding.blame) == ("piece 1", "warmgraph::silu_and_mul", Blame.OP)
    assert report.safe_mode == "NONE"


@pytest.mark.parametrize(
    ("failed", "skipped", "mode"),
    [
        ([], [], CUDAGraphMode.FULL_AND_PIECEWISE),
        ([FormName.FULL_MIXED], [], CUDAGraphMode.FULL_AND_PIECEWISE),
        ([FormName.FULL_DECODE], [FormName.FULL_MIXED], CUDAGraphMode.PIECEWISE),
        ([FormName.PIECEWISE], [], CUDAGraphMode.FULL_DECODE_ONLY),
        ([FormName.PIECEWISE, FormName.FULL_DECODE], [], CUDAGraphMode.NONE),
        ([FormName.COMPILED], [], CUDAGraphMode.NONE),
        ([FormName.PADDED], [], CUDAGraphMode.NONE),
        ([], [FormName.FULL_DECODE, FormName.FULL_MIXED], CUDAGraphMode.PIECEWISE),
    ],
)
def test_the_safe_mode_uses_nothing_that_failed(
    failed: list[FormName], skipped: list[FormName], mode: CUDAGraphMode
) -> None:
    assert safe_mode(failed, skipped) is mode


def test_the_command_prints_its_account(tmp_path: Path) -> None:
    engine = config().model_dump(mode="json", exclude_unset=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"models": [{"name": "tiny", "engine": engine}]}))
    command = ["verify-graphs", str(tmp_path / "config.yaml"), "--sizes", "2"]
    result = CliRunner().invoke(app, [*command, "--json", "--plot", str(tmp_path / "errors.svg")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["is_ok"]
    assert (tmp_path / "errors.svg").read_text().startswith("<?xml")
    result = CliRunner().invoke(app, [*command, "--freeze-context"])
    assert "declares NEVER" in result.output
    assert "cudagraph_mode PIECEWISE is safe" in result.output
