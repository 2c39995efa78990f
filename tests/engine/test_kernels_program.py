"""Recorded programs: equal to the model to the bit at any number of tokens, or absent."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.paged import PagedSession
from tests.tiny_models import NAMES, tiny_checkpoint
from workers.attention.cpu import CpuPagedAttention
from workers.attention.sdpa import SdpaPagedAttention
from workers.kernels import cpu_ops, functional
from workers.kernels.linear import Linear
from workers.kernels.program import NativeProgram, ObstacleError
from workers.model.config import ModelConfig
from workers.model.decoder import DecoderForCausalLM
from workers.model.loader import load_model
from workers.runner.cpu_model import CpuModel

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not cpu_ops.is_available(), reason="the native kernels cannot be built here")


class Counting:
    """A model that counts its own calls: those that no program made."""

    def __init__(self, model: DecoderForCausalLM) -> None:
        self.model = model
        self.num_calls = 0

    def __call__(self, input_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        hidden_TE: torch.Tensor = self.model(input_ids_T, positions_T)
        return hidden_TE


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def load(name: str, dtype: torch.dtype) -> DecoderForCausalLM:
    folder = tiny_checkpoint(name)
    return load_model(folder, ModelConfig.from_folder(folder), dtype, CPU)


def run_both(name: str, dtype: torch.dtype) -> tuple[Counting, int]:
    """Prefills, decodes and mixed batches with and without a program; both must agree to the bit."""
    model = load(name, dtype)
    sessions = []
    counting = Counting(model)
    for programmed in (False, True):
        session = PagedSession(model, CpuPagedAttention(model.attention_spec(4), CPU))
        if programmed:
            session.model = _with_logits(CpuModel(counting, session.backend, session.kv_caches), model)
        sessions.append(session)
    calls_of_recording = counting.num_calls
    for chunks in ({"a": [5, 6, 7]}, {"a": [8]}, {"a": [9], "b": [3, 4, 5, 6, 7, 8, 9]}, {"a": [1], "b": [2]}):
        expected, actual = (session.step(chunks) for session in sessions)
        for key in chunks:
            assert torch.equal(expected[key], actual[key])
    return counting, calls_of_recording


def _with_logits(run: CpuModel, model: DecoderForCausalLM) -> DecoderForCausalLM:
    """What a session wants of a model, with another forward."""

    class Stand:
        config = model.config
        compute_logits = staticmethod(model.compute_logits)
        __call__ = staticmethod(run.__call__)

    return Stand()  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_model_to_the_bit(name: str) -> None:
    counting, before = run_both(name, torch.float32)
    assert counting.num_calls == before, "a step ran without the program"


@pytest.mark.usefixtures("num_threads")
def test_in_bf16_on_any_number_of_threads() -> None:
    counting, before = run_both("llama-tied", torch.bfloat16)
    assert counting.num_calls == before


def test_padded_batches_and_other_caches_run_without_it() -> None:
    model = load("llama", torch.float32)
    backend = CpuPagedAttention(model.attention_spec(16), CPU)
    counting = Counting(model)
    session, other = PagedSession(model, backend), PagedSession(model, backend)
    session.model = other.model = _with_logits(CpuModel(counting, backend, session.kv_caches), model)
    before = counting.num_calls
    session.step({"a": [1, 2]})
    assert counting.num_calls == before
    session.step({"a": [3]}, num_padding_tokens=1)
    assert counting.num_calls == before + 1
    other.step({"a": [1, 2]})
    assert counting.num_calls == before + 2


def test_another_backend_means_no_program() -> None:
    model = load("llama", torch.float32)
    backend = SdpaPagedAttention(model.attention_spec(16), CPU)
    assert not CpuModel(model, backend, PagedSession(model, backend).kv_caches).has_program


def make_mlp() -> tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], list[Linear]]:
    torch.manual_seed(0)
    layers = [Linear(64, 128), Linear(64, 64), Linear(64, 100)]
    for layer in layers:
        assert layer.weight is not None
        layer.weight.data.normal_()
        layer.finalize()

    def run(ids: torch.Tensor, other_ids: torch.Tensor) -> torch.Tensor:
        x = layers[2].rows(ids)
        y = functional.silu_and_mul(layers[0](x))
        z, _ = functional.add_rms_norm(y, layers[2].rows(other_ids), WEIGHT, 1e-5)
        y = layers[1](z)
        assert isinstance(y, torch.Tensor)
        return y

    return run, layers


WEIGHT = torch.linspace(0.5, 2, 64)


@torch.inference_mode()
def test_runs_any_number_of_tokens_from_one_recording() -> None:
    run, _ = make_mlp()
    step = cpu_ops.AttentionStep()
    ids = torch.arange(4), torch.arange(4, 8)
    output, program = NativeProgram.record(run, ids, step, max_tokens=50)
    assert torch.equal(output, run(*ids))
    for num_tokens in (1, 2, 7, 50):
        inputs = torch.randint(0, 100, (num_tokens,)), torch.randint(0, 100, (num_tokens,))
        assert torch.equal(program(inputs, step), run(*inputs))


@torch.inference_mode()
@pytest.mark.parametrize(
    "foreign",
    [lambda x: x + 1, lambda x: x.t().contiguous().t(), lambda x: x.to(torch.float64), lambda x: x.zero_()],
    ids=["add", "contiguous", "to", "in place"],
)
def test_any_other_operation_is_an_obstacle(foreign: Callable[[torch.Tensor], torch.Tensor]) -> None:
    run, _ = make_mlp()
    with pytest.raises(ObstacleError, match="not a native kernel"):
        NativeProgram.record(
            lambda a, b: foreign(run(a, b)),
            (torch.arange(4), torch.arange(4, 8)),
            cpu_ops.AttentionStep(),
            max_tokens=8,
        )


@torch.inference_mode()
def test_a_fallback_inside_an_operator_is_an_obstacle() -> None:
    """A norm whose weight has another dtype is computed by torch, out of the recorder's kernels."""
    run, _ = make_mlp()
    weight = WEIGHT.double()
    with pytest.raises(ObstacleError):
        NativeProgram.record(
            lambda a, b: functional.rms_norm(run(a, b), weight, 1e-5),
            (torch.arange(4), torch.arange(4, 8)),
            cpu_ops.AttentionStep(),
            max_tokens=8,
        )


def test_recording_imports_no_compiler() -> None:
    """It would take seconds of every start."""
    program = (
        "import sys, torch; from workers.kernels import cpu_ops; from workers.kernels.linear import Linear\n"
        "from workers.kernels.program import NativeProgram\n"
        "layer = Linear(64, 32); layer.weight.data.zero_(); layer.finalize()\n"
        "_, program = NativeProgram.record(layer.rows, [torch.arange(4)], cpu_ops.AttentionStep(), 8)\n"
        "assert program([torch.arange(5)], cpu_ops.AttentionStep()).shape == (5, 64)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
