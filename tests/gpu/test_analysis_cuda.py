"""What the analysing code counts and finds on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import tiny_checkpoint
from workers.analysis.costs import measure_rates, measure_step_costs
from workers.analysis.diagnose import diagnose
from workers.analysis.model_launches import count_model_launches
from workers.analysis.profile import profile_work
from workers.analysis.verify import verify_graphs
from workers.analysis.verify_report import FormName
from workers.attention.sdpa import SdpaPagedAttention
from workers.config import EngineConfig
from workers.modes import AttentionCGSupport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def config() -> EngineConfig:
    return EngineConfig.create(
        model=str(tiny_checkpoint("llama")),
        dtype="bfloat16",
        device="cuda",
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        skip_tokenizer_init=True,
        compilation_config={"mode": "VLLM_COMPILE", "piece_format": "standalone"},
    )


def test_the_profiler_sees_kernels_and_graph_launches(device: torch.device) -> None:
    x = torch.zeros(4, device=device)

    def work() -> None:
        for _ in range(10):
            x.add_(1)

    work()
    torch.cuda.synchronize()
    eager = profile_work(work, 2, device)
    assert (eager.kernels, eager.kernel_launches, eager.graph_launches) == (5, 5, 0)
    assert 0 < eager.kernel_us <= eager.busy_us
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    torch.cuda.synchronize()
    replayed = profile_work(graph.replay, 1, device)
    assert (replayed.kernels, replayed.kernel_launches, replayed.graph_launches) == (10, 0, 1)


def test_launches_of_a_model() -> None:
    rows = {row.form: row for row in count_model_launches(config(), batch=2).rows}
    assert (rows["FULL"].kernels, rows["FULL"].graphs) == (0, 1)
    assert rows["PIECEWISE"].graphs == 4
    assert rows["eager"].kernels > rows["compiled pieces"].kernels > rows["PIECEWISE"].measured > 1
    assert rows["eager"].predicted == pytest.approx(rows["eager"].kernels, rel=0.25)


def test_a_graph_of_many_ops_pays_and_is_cheaper(device: torch.device) -> None:
    costs = {cost.num_ops: cost for cost in measure_step_costs([1, 300], device).costs}
    assert costs[300].replay < costs[300].eager / 2
    rates = measure_rates(device, torch.bfloat16)
    assert rates.bandwidth > 1e11
    assert rates.matmul_flops > 1e13


def test_every_form_agrees_on_the_device() -> None:
    report = verify_graphs(config(), [1, 2, 8])
    assert report.is_ok, (report.checks, report.findings)
    assert report.safe_mode == "FULL_AND_PIECEWISE"


def test_an_attention_that_plans_on_the_host_breaks_full_only() -> None:
    class ReadsTheHostAtCapture(SdpaPagedAttention):
        cudagraph_support = AttentionCGSupport.ALWAYS

    report = verify_graphs(config(), [2], attention=ReadsTheHostAtCapture)
    failed = {check.form for check in report.checks if check.problem is not None}
    assert failed == {FormName.FULL_DECODE, FormName.DECODE_STEP, FormName.FULL_MIXED}
    assert report.safe_mode == "PIECEWISE"
    assert {finding.op for finding in report.findings} == {"warmgraph::attention(0)"}


def test_diagnose_finds_a_tiny_model_launch_bound_without_graphs() -> None:
    found = diagnose(config().model_copy(update={"enforce_eager": True}), [1, 8])
    assert found.limits[0] == "launch-bound"
    assert found.fix.key == "enforce_eager"
    assert found.comparisons[0].speedup > 1.5
