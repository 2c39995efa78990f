"""One config file is one whole deployment: models, replicas, HTTP.

Reads YAML into pydantic models; an unknown key is refused with the nearest valid name. Knows the shape of a
deployment, not how Ray runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import yaml

from cluster.routing.registry import DEFAULT_POLICY, POLICIES
from workers.config import EngineConfig, describe_validation_error
from workers.errors import ConfigError

#: Pace at which replicas report their load to Serve's controller, in seconds. At its default of 10 Serve reacts in 40.
METRICS_INTERVAL_S = 0.25


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class HttpConfig(_Section):
    """Where and how the API listens.

    Attributes:
        host: Address to bind; the default is reachable from this machine only.
        port: TCP port.
        proxy: What clients connect to: ``haproxy``, Ray's own proxy in ``python``, or ``auto``, HAProxy where there is
            one for the platform (on Kubernetes it must be named). HAProxy took half the CPU time per token
            (docs/decisions.md).
        max_body_bytes: Largest request body; beyond it the answer is 413.
        stalled_client_timeout_s: A client that takes nothing for this long, while something waits to be sent, is given
            up and its request aborted.
        ingress_replicas: Processes that parse HTTP and tokenise.
        ingress_cpus: CPUs that Ray reserves for each of them.
    """

    host: str = "127.0.0.1"
    port: int = pydantic.Field(default=8000, ge=1, le=65535)
    proxy: Literal["auto", "haproxy", "python"] = "auto"
    max_body_bytes: int = pydantic.Field(default=8 * 2**20, ge=1024)
    stalled_client_timeout_s: float = pydantic.Field(default=60.0, gt=0)
    ingress_replicas: int = pydantic.Field(default=1, ge=1)
    ingress_cpus: float = pydantic.Field(default=0.1, ge=0)


class AutoscalingConfig(_Section):
    """How the number of a model's replicas follows its load.

    Attributes:
        min_replicas: Fewest; with 0 an idle model has none, and a request waits until one is ready.
        max_replicas: Most.
        queue_target_s: Time within which a queue should be worked off once the replicas started for it are ready.
        utilization: Share of a replica's full speed that steady load may use.
        downscale_delay_s: How long fewer replicas must suffice before one is drained.
        downscale_to_zero_delay_s: How long a model must be idle before its last replica is drained.
        expected_start_s: How long a start takes, as long as none was measured.
        policy: ``by_work``, or the import path of a function of your own, as ``package.module:function``.
    """

    min_replicas: int = pydantic.Field(default=1, ge=0)
    max_replicas: int = pydantic.Field(ge=1)
    queue_target_s: float = pydantic.Field(default=5.0, gt=0)
    utilization: float = pydantic.Field(default=0.8, gt=0, le=1)
    downscale_delay_s: float = pydantic.Field(default=60.0, ge=0)
    downscale_to_zero_delay_s: float = pydantic.Field(default=300.0, ge=0)
    expected_start_s: float = pydantic.Field(default=30.0, ge=0)
    policy: str = pydantic.Field(default="by_work", pattern=r"^by_work$|^[\w.]+:\w+$")

    @pydantic.model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas must not exceed max_replicas")
        return self


class ReplicaConfig(_Section):
    """How many engines a model gets, and what each may use.

    Attributes:
        num_replicas: Engines, each in a process of its own; with autoscaling, how many there are at first.
        autoscaling: Lets the number follow the load; None keeps it.
        num_cpus: CPUs that Ray reserves for each.
        num_gpus: GPUs that Ray reserves for each; a fraction shares a device.
        max_queued_requests: Requests that may wait for each replica; beyond it the answer is 429. They wait at the
            ingress, in fair order among API keys.
        max_queued_tokens: The same in tokens, prompt and output, at each ingress; None sets no bound.
        engine_backlog: Requests that may wait inside the engine beyond its batch, so that a place that becomes free
            is taken in the next step; None takes an eighth of ``max_num_seqs``.
        start_timeout_s: Longest time a request waits for a first replica to become ready.
        health_check_period_s: How often Serve asks a replica whether its engine lives; the third failure in a row
            replaces it.
        health_check_timeout_s: Longest wait for the answer.
        step_timeout_s: An engine that is at one step for longer than this hangs.
        heartbeat_timeout_s: A replica that an ingress has not heard of for this long is lost: its streams go on
            elsewhere.
        graceful_shutdown_timeout_s: How long a stopping replica may finish what it runs; then its streams go on at
            another one.
        keep_spare: Keep a process with torch imported on every node that runs an engine, so that the next replica
            there, or one that takes its place, pays no imports.
    """

    num_replicas: int = pydantic.Field(default=1, ge=0)
    autoscaling: AutoscalingConfig | None = None
    num_cpus: float = pydantic.Field(default=1.0, ge=0)
    num_gpus: float = pydantic.Field(default=0.0, ge=0)
    max_queued_requests: int = pydantic.Field(default=256, ge=1)
    max_queued_tokens: int | None = pydantic.Field(default=None, ge=1)
    engine_backlog: int | None = pydantic.Field(default=None, ge=0)
    start_timeout_s: float = pydantic.Field(default=60.0, gt=0)
    health_check_period_s: float = pydantic.Field(default=2.0, gt=0)
    health_check_timeout_s: float = pydantic.Field(default=10.0, gt=0)
    step_timeout_s: float = pydantic.Field(default=60.0, gt=0)
    heartbeat_timeout_s: float = pydantic.Field(default=10.0, gt=0)
    graceful_shutdown_timeout_s: float = pydantic.Field(default=20.0, ge=0)

    @pydantic.model_validator(mode="after")
    def _starts_within_bounds(self) -> Self:
        scaling = self.autoscaling
        if scaling is None and not self.num_replicas:
            raise ValueError("num_replicas must be at least 1 without autoscaling")
        if scaling is not None and not scaling.min_replicas <= self.num_replicas <= scaling.max_replicas:
            raise ValueError(
                f"num_replicas, with which a model begins, must lie between min_replicas={scaling.min_replicas} and "
                f"max_replicas={scaling.max_replicas}, got {self.num_replicas}"
            )
        return self

    keep_spare: bool = True


class AdmissionConfig(_Section):
    """Who is let in, and for how long.

    Attributes:
        api_keys_file: YAML file of API keys with their limits (docs/routing.md), on the ingress' node.
        api_keys_env: Environment variable of the ingress that holds ``name:key`` pairs, separated by commas. Without
            file and variable everybody is let in.
        request_timeout_s: Deadline of requests without the header X-Request-Timeout; None sets none.
        max_request_timeout_s: Longest deadline that a request may have; None sets no bound.
    """

    api_keys_file: str | None = None
    api_keys_env: str | None = pydantic.Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    request_timeout_s: float | None = pydantic.Field(default=None, gt=0)
    max_request_timeout_s: float | None = pydantic.Field(default=None, gt=0)

    @pydantic.model_validator(mode="after")
    def _keys_have_one_source(self) -> Self:
        if self.api_keys_file is not None and self.api_keys_env is not None:
            raise ValueError("give either api_keys_file or api_keys_env")
        return self


class RoutingConfig(_Section):
    """How the ingress picks a replica.

    Attributes:
        policy: ``balanced`` weighs cached prefix, padding and load; ``prefix_affinity``, ``capture_aware``,
            ``least_loaded`` and ``round_robin`` look at one of them or at none. Or the import path of a function of
            your own, as ``package.module:function``; it must be importable where the ingress runs.
    """

    policy: str = DEFAULT_POLICY

    @pydantic.field_validator("policy")
    @classmethod
    def _policy_has_a_name(cls, value: str) -> str:
        if value not in POLICIES and ":" not in value:
            raise ValueError(f"use one of {', '.join(POLICIES)} or an import path like package.module:function")
        return value


class ModelDeployment(_Section):
    """One served model.

    Attributes:
        name: The ``model`` of the API; also the name of the Serve deployment.
        engine: The engine's configuration.
        replicas: Number and resources of its replicas.
        routing: How requests are spread over them.
    """

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    engine: EngineConfig
    replicas: ReplicaConfig = ReplicaConfig()
    routing: RoutingConfig = RoutingConfig()


class DeploymentConfig(_Section):
    """A whole deployment, as in ``configs/*.yaml``.

    Attributes:
        name: Name of the Serve application.
        models: Models served; the API picks one by a request's ``model``.
        http: The API's address and limits.
        admission: API keys and deadlines.
    """

    name: str = pydantic.Field(default="warmgraph", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    models: list[ModelDeployment] = pydantic.Field(min_length=1)
    http: HttpConfig = HttpConfig()
    admission: AdmissionConfig = AdmissionConfig()

    @pydantic.model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [model.name for model in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"models: the name {twice[0]!r} is used twice; give each model its own name")
        return self

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Validate parsed YAML or JSON.

        Raises:
            ConfigError: One sentence per problem.
        """
        if not isinstance(data, dict):
            raise ConfigError(
                "The config must be a mapping with the keys 'models' and, optionally, 'name', 'http', 'admission'."
            )
        try:
            return cls.model_validate(data)
        except pydantic.ValidationError as error:
            raise ConfigError(describe_validation_error(error, cls)) from None

    @classmethod
    def from_file(cls, path: str | Path, overrides: list[str] | None = None) -> Self:
        """Read a YAML file, then apply ``key.path=value`` overrides (values are YAML; list items by index).

        Raises:
            ConfigError: The file cannot be read or parsed, or its contents are wrong; the message names the file.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"Cannot read {path}: {error.strerror}.") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from None
        for override in overrides or []:
            _apply_override(data, override)
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def model_named(self, name: str | None) -> ModelDeployment:
        """The model of that name; None takes the only one.

        Raises:
            ConfigError: There is none of that name, or there are several to choose from.
        """
        if name is None and len(self.models) == 1:
            return self.models[0]
        for model in self.models:
            if model.name == name:
                return model
        names = ", ".join(model.name for model in self.models)
        raise ConfigError(f"Name one of the config's models with --model: {names}.", param="model")

    def to_dict(self) -> dict[str, Any]:
        """The resolved config, defaults included, as plain data."""
        return self.model_dump(mode="json")


def _apply_override(data: Any, override: str) -> None:
    path, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"--set takes key.path=value, got {override!r}.")
    *parents, last = path.split(".")
    target = data
    for part in parents:
        target = _descend(target, part, path)
    parsed = yaml.safe_load(value)
    if isinstance(target, list):
        target[_index(target, last, path)] = parsed
    elif isinstance(target, dict):
        target[last] = parsed
    else:
        raise ConfigError(f"--set {path}: {'.'.join(parents)} is a single value and has no keys.")


def _descend(target: Any, part: str, path: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, part, path)]
    if isinstance(target, dict):
        return target.setdefault(part, {})
    raise ConfigError(f"--set {path}: {part!r} lies below a single value.")


def _index(items: list[Any], part: str, path: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"--set {path}: {part!r} must be an index from 0 to {len(items) - 1}.")
    return int(part)
