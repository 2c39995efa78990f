"""Deployment configs: defaults, errors that say what to change, overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import DeploymentConfig
from workers.config import CompilationConfig, EngineConfig
from workers.errors import ConfigError
from workers.modes import CompilationMode

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = {"models": [{"name": "m", "engine": {"model": "some/model"}}]}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    config = DeploymentConfig.from_file(path)
    assert DeploymentConfig.from_dict(config.to_dict()) == config


def test_defaults_are_filled_in() -> None:
    config = DeploymentConfig.from_dict(MINIMAL)
    assert config.http.host == "127.0.0.1"
    assert config.models[0].engine == EngineConfig(model="some/model")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("models.0.engine.max_num_seq=3", "models.0.engine.max_num_seq: unknown key; did you mean 'max_num_seqs'?"),
        ("http.prot=3", "http.prot: unknown key; did you mean 'port'?"),
        ("modles=[]", "modles: unknown key; did you mean 'models'?"),
        ("models.0.replicas.zzz=1", "unknown key; valid keys are autoscaling, engine_backlog"),
        ("http.port=99999", "http.port: Input should be less than or equal to 65535 (got 99999)"),
        ("models.0.engine.dtype=bf16", "'float32', 'bfloat16' or 'float16' (got 'bf16')"),
        ("models.0.name=''", "models.0.name: String should match pattern"),
        ("models=[]", "models: List should have at least 1 item"),
    ],
)
def test_a_wrong_key_or_value_is_named(change: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        DeploymentConfig.from_file(CONFIGS / "smollm2-cpu.yaml", [change])
    assert sentence in str(error.value)
    assert "smollm2-cpu.yaml" in str(error.value)


def test_two_models_need_two_names() -> None:
    with pytest.raises(ConfigError, match="the name 'm' is used twice"):
        DeploymentConfig.from_dict({"models": MINIMAL["models"] * 2})


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("http.port", "--set takes key.path=value"),
        ("models.7.name=x", "'7' must be an index from 0 to 0"),
        ("models.x.name=x", "'x' must be an index from 0 to 0"),
        ("name.deep.er=1", "'deep' lies below a single value"),
        ("name.deep=1", "name is a single value"),
    ],
)
def test_a_wrong_override_is_explained(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        DeploymentConfig.from_file(CONFIGS / "smollm2-cpu.yaml", [override])
    assert sentence in str(error.value)


def test_overrides_are_yaml() -> None:
    config = DeploymentConfig.from_file(
        CONFIGS / "smollm2-cpu.yaml", ["models.0.replicas.num_replicas=1", "models.0.engine.num_threads=2"]
    )
    assert config.models[0].replicas.num_replicas == 1
    assert config.models[0].engine.num_threads == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("a: [", "is not valid YAML"), ("- 1", "must be a mapping"), ("", "must be a mapping")],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        DeploymentConfig.from_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read .*none\.yaml: No such file"):
        DeploymentConfig.from_file(tmp_path / "none.yaml")


def test_engine_config_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size: unknown key"):
        EngineConfig.create(model="m", tensor_parallel_size=2)


def test_options_that_a_format_does_not_take_are_refused() -> None:
    options = {"max_autotune": True}
    for name in ("inductor_compile_config", "inductor_compile_config_for_sizes"):
        with pytest.raises(ConfigError, match="compilation_config: piece_format fx runs pieces as they are"):
            EngineConfig.create(model="m", compilation_config={"piece_format": "fx", name: options})
        EngineConfig.create(model="m", compilation_config={"piece_format": "auto", name: options})


def test_settings_that_a_mode_does_not_read_are_known() -> None:
    config = CompilationConfig(compile_sizes=[1], pass_config={"qk_rope": False}, inductor_compile_config={"a": 1})
    assert config.without_effect(CompilationMode.VLLM_COMPILE) == []
    assert config.without_effect(CompilationMode.DYNAMO_TRACE_ONCE) == ["pass_config", "compile_sizes"]
    assert "inductor_compile_config" in config.without_effect(CompilationMode.NONE)
    of_sizes = CompilationConfig(inductor_compile_config_for_sizes={"a": 1})
    assert of_sizes.without_effect(CompilationMode.VLLM_COMPILE) == ["inductor_compile_config_for_sizes"]
