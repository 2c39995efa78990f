"""The analysing commands from config to table, JSON and chart, on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from torch._C._autograd import DeviceType
from typer.testing import CliRunner

from cluster.cli.main import app
from tests.tiny_models import tiny_checkpoint
from workers.analysis.ablation import PLAIN, AblationCell, attribute
from workers.analysis.profile import Activity, _of_cuda, busy_time
from workers.errors import ConfigError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    engine = {
        "model": str(tiny_checkpoint("llama")),
        "device": "cpu",
        "dtype": "bfloat16",
        "max_model_len": 256,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 32,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"models": [{"name": "tiny", "engine": engine}]}))
    return path


def run(*args: Any) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_padding_prints_its_counts_and_draws_them(tmp_path: Path) -> None:
    output = run("analyze", "padding", "--sizes", "1,2,4,8", "--plot", tmp_path / "padding.png")
    assert "captures: 4 with padding, 8 without" in output
    assert (tmp_path / "padding.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(run("analyze", "padding", "--sizes", "1,2,4,8", "--json"))
    assert [row["graph_size"] for row in data["rows"]] == [1, 2, 4, 4, 8, 8, 8, 8]


def test_a_chart_is_drawn_from_an_earlier_result(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(run("analyze", "launches", "--ops", 10, "--split", 5, "--json"))
    run("analyze", "plot", tmp_path / "result.json", tmp_path / "launches.svg")
    assert "launches" in (tmp_path / "launches.svg").read_text()
    (tmp_path / "other.json").write_text('{"no": "chart"}')
    with pytest.raises(ConfigError, match="holds no chart"):
        run("analyze", "plot", tmp_path / "other.json", tmp_path / "launches.svg")
    with pytest.raises(ConfigError, match=r"writes \.png or \.svg"):
        run("analyze", "launches", "--plot", tmp_path / "launches.pdf")


def test_synthetic_launches() -> None:
    output = run("analyze", "launches", "--ops", 10, "--split", 5)
    assert "launches per step: eager 10, PIECEWISE 3, FULL 1" in output


def test_crossover_explains_every_row() -> None:
    output = run("analyze", "crossover")
    assert output.count("has paid for itself after") == 6
    assert output.count("never pays") == 2
    measured = json.loads(run("analyze", "crossover", "--measured", "--device", "cpu", "--num-ops", "1,32", "--json"))
    assert [row["costs"]["unit"] for row in measured["rows"]] == ["us", "us"]
    assert all(row["costs"]["eager"] > 0 for row in measured["rows"])
    assert "dispatching its ops again" in measured["source"]


def test_launches_of_a_model_are_counted_as_predicted(config: Path) -> None:
    data = json.loads(run("analyze", "launches", config, "--json"))
    rows = {row["form"]: row for row in data["rows"]}
    # Three layers: four pieces with three attention ops between them.
    assert [segment["is_captured"] for segment in data["segments"]] == [True, False] * 3 + [True]
    assert (rows["PIECEWISE"]["graphs"], rows["PIECEWISE"]["kernels"]) == (4, 3)
    assert (rows["FULL"]["graphs"], rows["FULL"]["kernels"]) == (1, 0)
    for form in ("eager", "PIECEWISE", "FULL"):
        assert rows[form]["predicted"] == rows[form]["kernels"] + rows[form]["graphs"]


def test_diagnose_says_what_to_change_and_where(config: Path, tmp_path: Path) -> None:
    document = yaml.safe_load(config.read_text())
    document["models"][0]["engine"]["enforce_eager"] = True
    config.write_text(yaml.safe_dump(document))
    output = run("diagnose", config, "--plot", tmp_path / "diagnose.svg")
    assert "no GPU: a launch is an op that Python dispatches" in output
    assert "gains less than 10 % from: predicted" in output
    assert "first fix: " in output
    rows = [line.split() for line in output.splitlines() if re.match(r" +[12] ", line)]
    assert [row[0] for row in rows] == ["1", "2"]
    assert all(float(row[4]) > 47 for row in rows)  # launches: the model's ops, and sampling
    assert {row[-1] for row in rows} <= {"launch", "memory", "compute"}
    assert all(float(row[2]) <= float(row[1]) for row in rows), "no step is faster than what is called best"
    assert (tmp_path / "diagnose.svg").is_file()


def test_ablation_ends_in_one_json_line(config: Path) -> None:
    output = run("bench", "ablation", config, "--batch", "1,2", "--steps", 2, "--rounds", 1)
    result = json.loads(output.splitlines()[-1])
    runs_as = {(cell["variant"], cell["batch"]): cell["runs_as"] for cell in result["cells"]}
    assert len(runs_as) == 12
    for batch in (1, 2):
        assert runs_as["compiled + PIECEWISE", batch] == "PIECEWISE"
        assert runs_as["compiled + FULL", batch] == runs_as["plain + FULL", batch] == "FULL"
        assert runs_as["compiled", batch] == runs_as["plain", batch] == runs_as["eager", batch] == "NONE"
    assert all(row["both"] is not None for row in result["attributions"])
    with pytest.raises(ConfigError, match="above max_num_seqs=2"):
        run("bench", "ablation", config, "--batch", "3")


def test_speedups_are_attributed_to_their_layers() -> None:
    times = {"plain": 8.0, "plain + FULL": 4.0, "compiled": 6.0, "compiled + PIECEWISE": 3.0, "compiled + FULL": 2.0}
    cells = [AblationCell(variant, 1, time, "") for variant, time in times.items()]
    row = attribute(cells, 1)
    assert (row.compile_alone, row.graphs_alone, row.both) == (8 / 6, 2.0, 4.0)
    assert (row.pieces_in_graphs, row.full_over_pieces, row.graphs_on_compiled) == (2.0, 1.5, 3.0)
    assert attribute([cell for cell in cells if cell.variant != PLAIN.name], 1).both is None


def test_busy_time_counts_what_overlaps_once() -> None:
    activities = [Activity("a", 0, 10), Activity("b", 5, 12), Activity("c", 13, 20), Activity("d", 14, 15)]
    assert busy_time(activities) == 19
    assert busy_time(activities, bridged_us=1.0) == 20
    assert busy_time([]) == 0


def cuda_event(name: str, start: float, end: float, *, on_device: bool, is_annotation: bool = False) -> SimpleNamespace:
    """As torch's profiler gives it."""
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CUDA if on_device else DeviceType.CPU,
        time_range=SimpleNamespace(start=start, end=end),
        is_user_annotation=is_annotation,
        cpu_parent=None,
    )


def test_events_of_a_cuda_device_are_told_apart() -> None:
    events = [
        cuda_event("aten::add", 0, 9, on_device=False),
        cuda_event("cudaLaunchKernel", 1, 5, on_device=False),
        cuda_event("cuLaunchKernelEx", 6, 8, on_device=False),
        cuda_event("cudaGraphLaunch", 9, 11, on_device=False),
        cuda_event("cudaEventSynchronize", 11, 40, on_device=False),
        cuda_event("step", 0, 40, on_device=True, is_annotation=True),
        cuda_event("add_kernel", 10, 12, on_device=True),
        cuda_event("triton_norm", 13, 17, on_device=True),
        cuda_event("gemm", 30, 36, on_device=True),
        cuda_event("Memcpy DtoH (Device -> Pinned)", 36, 37, on_device=True),
    ]
    profiled = _of_cuda(events, 2)
    assert (profiled.kernels, profiled.kernel_launches, profiled.graph_launches, profiled.transfers) == (
        1.5,
        1,
        0.5,
        0.5,
    )
    assert profiled.launches == 1.5
    assert profiled.kernel_us == 4
    # From 10 to 17, the gap of 1 us being the device's own, and from 30 to 37.
    assert profiled.busy_us == 7
    assert profiled.dispatched == {"aten::add": 1}
