"""The key covers what compiled code depends on, and nothing else: every setting and every switch, one by one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import tiny_checkpoint
from workers.artifacts.factors import COMPILATION_FIELDS, ENGINE_FIELDS, Section
from workers.artifacts.key import BundleKey, differing_factors
from workers.checkpoint.cache import cache_root
from workers.compile import environment
from workers.compile.decorator import dynamic_arg_dims
from workers.compile.environment import (
    NEUTRAL_VARIABLES,
    compiler_variables,
    environment_factors,
    source_digests,
)
from workers.compile.key import PIECE_SECTIONS, bundle_key
from workers.config import CompilationConfig, EngineConfig
from workers.model.decoder import DecoderForCausalLM
from workers.runner.artifacts import key_of_config

ROOT = Path(__file__).parents[2]

#: Another value than the default, or than what the default stands for here.
ENGINE_CHANGES: dict[str, Any] = {
    "model": lambda: str(tiny_checkpoint("qwen2")),
    "tokenizer": "elsewhere",
    "skip_tokenizer_init": True,
    "load_format": "dummy",
    "dtype": "bfloat16",
    "device": None,  # changed by hand: there is one kind of device here
    "seed": 7,
    "max_model_len": 128,
    "block_size": 32,
    "num_gpu_blocks_override": 64,
    "gpu_memory_utilization": 0.5,
    "kv_cache_memory_bytes": 1 << 24,
    "enable_prefix_caching": False,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "num_threads": 7,
    "enforce_eager": True,
    "attention_backend": "sdpa",
    "artifacts": {"store": None},
}
COMPILATION_CHANGES: dict[str, Any] = {
    "mode": "DYNAMO_TRACE_ONCE",
    "compile_sizes": [4],
    "piece_format": "standalone",
    "pass_config": {"qk_rope": False},
    "inductor_compile_config": {"max_autotune": True},
    "inductor_compile_config_for_sizes": {"max_autotune": True},
    "cudagraph_mode": "NONE",
    "cudagraph_capture_sizes": [1, 2],
    "cudagraph_num_auto_sizes": 4,
    "max_cudagraph_capture_size": 8,
    "cudagraph_first_sizes": "all",
    "cudagraph_memory_limit_bytes": 1 << 30,
    "cudagraph_memory_policy": "error",
    "debug_graph_inputs": True,
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def key(**fields: Any) -> BundleKey:
    return key_of_config(EngineConfig(**{"model": str(tiny_checkpoint("llama")), "device": "cpu", **fields}))


def test_every_field_is_classified() -> None:
    assert {*ENGINE_FIELDS, "compilation_config"} == set(EngineConfig.model_fields)
    assert set(COMPILATION_FIELDS) == set(CompilationConfig.model_fields)
    assert set(ENGINE_CHANGES) == set(ENGINE_FIELDS)
    assert set(COMPILATION_CHANGES) == set(COMPILATION_FIELDS)


@pytest.mark.parametrize("name", sorted(set(ENGINE_CHANGES) - {"device"}))
def test_every_setting_of_the_engine(name: str) -> None:
    value = ENGINE_CHANGES[name]
    check(key(), key(**{name: value() if callable(value) else value}), ENGINE_FIELDS[name], name)


@pytest.mark.parametrize("name", sorted(COMPILATION_CHANGES))
def test_every_setting_of_the_compile_and_graph_layers(name: str) -> None:
    changed = key(compilation_config={name: COMPILATION_CHANGES[name]})
    check(key(), changed, COMPILATION_FIELDS[name], name)


def check(before: BundleKey, after: BundleKey, section: Section, name: str) -> None:
    assert (before.digest != after.digest) is (section is Section.GRAPH)
    differing = {
        part: differing_factors(getattr(before, part), getattr(after, part)) for part in ("graph", "capture", "runtime")
    }
    assert differing[section.value], f"{name} is not in section {section.value}"
    if section is not Section.GRAPH:
        assert [part for part, factors in differing.items() if factors] == [section.value]
        assert (before.capture_digest != after.capture_digest) is (section is Section.CAPTURE)


def test_a_default_is_the_value_that_it_stands_for() -> None:
    spelled_out = key(dtype="float32", max_model_len=512, num_threads=torch.get_num_threads(), attention_backend="cpu")
    assert spelled_out.digest == key().digest


def test_the_kind_of_device_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    dims = dynamic_arg_dims(DecoderForCausalLM)

    class Properties:
        name, major, minor, multi_processor_count = "NVIDIA H200", 9, 0, 132

    digests = {bundle_key(CompilationConfig(), torch.device("cpu"), dims).digest}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    for field, value in ((None, None), ("name", "NVIDIA H100"), ("minor", 1), ("multi_processor_count", 114)):
        if field is not None:
            monkeypatch.setattr(Properties, field, value)
        digests.add(bundle_key(CompilationConfig(), torch.device("cuda", 0), dims).digest)
    assert len(digests) == 5
    # Which of a host's equal devices it is does not matter.
    assert bundle_key(CompilationConfig(), torch.device("cuda", 3), dims).digest in digests


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TORCHINDUCTOR_MAX_AUTOTUNE", "1"),
        ("TORCHINDUCTOR_FREEZING", "1"),
        ("TORCHINDUCTOR_CPP_MARCH", "0"),
        ("TORCHINDUCTOR_SOMETHING_OF_THE_NEXT_RELEASE", "1"),
        ("TORCHDYNAMO_CAPTURE_SCALAR_OUTPUTS", "1"),
        ("TORCH_COMPILE_OVERRIDE_INDUCTOR_CONFIGS", "x"),
        ("TRITON_INTERPRET", "1"),
        ("TRITON_DEFAULT_FP_FUSION", "0"),
    ],
)
def test_switches_of_the_compilers_count(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    before = key()
    monkeypatch.setenv(name, value)
    after = key()
    assert before.digest != after.digest
    assert f"environment.variables.{name}" in [item[0] for item in differing_factors(before.graph, after.graph)]


@pytest.mark.parametrize(
    "name",
    [
        *sorted(NEUTRAL_VARIABLES),
        "HOME",
        "PATH",
        "TMPDIR",
        "XDG_CACHE_HOME",
        "WARMGRAPH_CACHE",
        "VIRTUAL_ENV",
        "HOSTNAME",
        "CUDA_VISIBLE_DEVICES",
        "TORCH_LOGS",
        "RAY_ADDRESS",
    ],
)
def test_where_things_lie_does_not_count(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = key()
    monkeypatch.setenv(name, os.environ["PATH"] + os.pathsep + "/elsewhere" if name == "PATH" else "/elsewhere")
    assert key().digest == before.digest


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        (torch, "__version__", "2.99.0"),
        (torch.version, "git_version", "0" * 40),
        (torch.version, "cuda", "99.0"),
        (sys, "version_info", (3, 99, 0)),
        (torch.backends.cpu, "get_cpu_capability", lambda: "AVX9"),
        (environment, "_instruction_sets", lambda: "amx_tile"),
        (torch, "get_float32_matmul_precision", lambda: "medium"),
        (torch, "get_num_threads", lambda: 99),
        (environment, "_version", lambda package: "99.0"),
        (environment, "_cxx_major", lambda compiler: "g++ 99"),
        (environment, "FORMAT_VERSION", 99),
        (environment.cpu_ops, "is_available", lambda: False),
    ],
)
def test_machine_and_versions_count(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, value: Any) -> None:
    before = environment_factors(torch.device("cpu"))
    monkeypatch.setattr(target, name, value)
    assert len(differing_factors(before, environment_factors(torch.device("cpu")))) == 1


def test_sources_and_passes_count() -> None:
    digests = source_digests()
    assert {"workers/model/decoder.py", "workers/compile/split.py", "workers/attention/op.py"} <= digests.keys()
    assert all((ROOT / name).is_file() for name in digests)
    assert set(key().graph["passes"]) == {"noop_elimination", "rope_kv_write", "qk_rope"}


def test_what_pieces_share_is_part_of_the_key() -> None:
    assert set(PIECE_SECTIONS) <= key().graph.keys()


def test_a_copy_of_the_model_is_the_same_model(tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "copy")
    copy = key(model=str(tmp_path / "copy"))
    assert copy.digest == key().digest
    assert copy.runtime["model"] == str(tmp_path / "copy")


REPLICA = """
import json, sys
import torch
from tests.compile_cases import MIXING_OPS, MixingModel, mixing_inputs
from workers.artifacts.library import ArtifactLibrary
from workers.compile import compile_model
from workers.compile.key import bundle_key
from workers.config import ArtifactConfig, CompilationConfig

config = CompilationConfig(mode="VLLM_COMPILE", piece_format="fx")
key = bundle_key(config, torch.device("cpu"), {"x_TE": 0}, splitting_ops=MIXING_OPS, graph={"model": "mixing"})
compilers = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
library = ArtifactLibrary.from_config(ArtifactConfig(store=sys.argv[1], trust="none", self_check="off"))
model = compile_model(
    MixingModel(2), config, {"x_TE": mixing_inputs()}, splitting_ops=MIXING_OPS, library=library, key=key
)
print(json.dumps({
    "key": key.digest,
    "outcome": model.report.outcome,
    "file": __import__("workers").__file__,
    "prefix": sys.prefix,
    "compilers_for_the_key": compilers,
    "compilers": [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules],
}))
"""


def replica(python: str, store: Path, root: Path, home: Path) -> dict[str, Any]:
    """A start in a process of its own, with its own home, caches and temporary folder."""
    home.mkdir()
    if (cache_root() / "kernels").exists():  # or building them would take longer than all the rest
        shutil.copytree(cache_root() / "kernels", home / "cache" / "warmgraph" / "kernels")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TMPDIR": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"),
        "TRITON_CACHE_DIR": str(home / "triton"),
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
    }
    command = [python, "-W", "ignore", "-c", REPLICA, str(store)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert process.returncode == 0, process.stderr
    report: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return report


def test_another_environment_home_and_cache_hits(tmp_path: Path) -> None:
    store = tmp_path / "store"
    cold = replica(sys.executable, store, ROOT, tmp_path / "home")
    assert cold["outcome"] == "absent"
    elsewhere = tmp_path / "elsewhere"
    for package in ("workers", "tests"):
        shutil.copytree(ROOT / package, elsewhere / package, ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(tmp_path / "venv", symlinks=True)
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    (site / "moved.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    warm = replica(str(tmp_path / "venv" / "bin" / "python"), store, elsewhere, tmp_path / "other-home")
    assert warm["file"].startswith(str(elsewhere))
    assert warm["prefix"] == str(tmp_path / "venv")
    assert (warm["key"], warm["outcome"]) == (cold["key"], "hit")
    assert warm["compilers_for_the_key"] == warm["compilers"] == []


def test_an_assembler_counts_by_what_it_is_and_not_by_where_it_lies(tmp_path: Path) -> None:
    def variables(path: Path) -> dict[str, str]:
        return compiler_variables({"TRITON_PTXAS_PATH": str(path), "HOME": str(tmp_path)})

    for folder, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ptxas").write_bytes(content)
    here, there, other = (variables(tmp_path / folder / "ptxas") for folder in "abc")
    assert here == there != other
    assert str(tmp_path) not in str(here)
    assert variables(tmp_path / "absent" / "ptxas") == {"TRITON_PTXAS_PATH": "ptxas"}


def test_the_assembler_that_the_compiler_sets_by_itself_is_part_of_torch() -> None:
    own = Path(torch.__file__).parent / "bin" / "ptxas"
    assert compiler_variables({"TRITON_PTXAS_PATH": str(own)}) == compiler_variables({}) == {}
