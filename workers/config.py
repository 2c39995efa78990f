"""The engine's configuration: one flat set of fields, named as vLLM's ``LLM`` arguments where it has them.

Imports neither torch nor transformers. A field that is not listed here is refused with the nearest valid name;
nothing is silently ignored.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, Self

import pydantic

from workers.errors import ConfigError
from workers.modes import CompilationMode, CUDAGraphMode

#: Fields of CompilationConfig that only VLLM_COMPILE reads.
_OF_PIECES = ("pass_config", "compile_sizes", "piece_format", "inductor_compile_config_for_sizes")


class CompilationConfig(pydantic.BaseModel):
    """The compile and graph layers.

    Attributes:
        mode: How the model is compiled, by name or number; None takes VLLM_COMPILE on CUDA and NONE on a CPU, whose
            native kernels leave a compiler nothing to fuse.
        compile_sizes: Batch sizes, in tokens, for which every piece is compiled once more with fixed shapes.
        piece_format: How compiled pieces are kept and loaded. ``auto`` loads ``aoti`` pieces if they have been built,
            and otherwise takes what is ready first: ``standalone`` on CUDA, and on a CPU ``fx``, which runs pieces as
            they are, without a compiler, and so takes no Inductor options.
        pass_config: Fusion passes by name, on or off; those not named are on.
        inductor_compile_config: Options of ``torch._inductor.config``, by name.
        inductor_compile_config_for_sizes: Options on top of them for the pieces of ``compile_sizes``, tuning say
            (``coordinate_descent_tuning``, ``max_autotune``). None takes what pays: ``aoti`` pieces on CUDA are tuned
            by coordinate descent while they are built, and carry what that found.
        cudagraph_mode: Which batches run as captured graphs; None takes FULL_AND_PIECEWISE on CUDA and NONE on a
            CPU, where padding costs more than launches. What the model and the attention backend cannot do is
            resolved at start, with one warning.
        cudagraph_capture_sizes: Batch sizes, in tokens, to capture; None takes the default grid. ``auto`` chooses those
            that waste the least padding on the batches seen so far, which are shared as an artifact.
        cudagraph_num_auto_sizes: Most sizes that ``auto`` chooses.
        max_cudagraph_capture_size: Largest of the default grid.
        cudagraph_first_sizes: Sizes captured before the engine is ready; the rest follows in idle gaps. None takes
            the powers of two up to ``max_num_seqs``, and the largest.
        cudagraph_memory_limit_bytes: Most memory for all graphs.
        cudagraph_memory_policy: ``shrink`` leaves out graphs that do not fit and goes on with smaller ones; ``error``
            refuses to start.
        debug_graph_inputs: Compare the address of every input with the captured one before each replay.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    mode: CompilationMode | None = None
    compile_sizes: list[Annotated[int, pydantic.Field(ge=1)]] = []
    piece_format: Literal["auto", "fx", "standalone", "aoti"] = "auto"
    pass_config: dict[str, bool] = {}
    inductor_compile_config: dict[str, bool | int | float | str | None] = {}
    inductor_compile_config_for_sizes: dict[str, bool | int | float | str | None] | None = None
    cudagraph_mode: CUDAGraphMode | None = None
    cudagraph_capture_sizes: list[int] | Literal["auto"] | None = None
    cudagraph_num_auto_sizes: int = pydantic.Field(default=16, ge=2)
    max_cudagraph_capture_size: int | None = pydantic.Field(default=None, ge=1)
    cudagraph_first_sizes: list[int] | Literal["all"] | None = None
    cudagraph_memory_limit_bytes: int | None = pydantic.Field(default=None, gt=0)
    cudagraph_memory_policy: Literal["shrink", "error"] = "shrink"
    debug_graph_inputs: bool = False

    def resolved_mode(self, device_type: str) -> CompilationMode:
        """The compilation mode for a kind of device."""
        if self.mode is not None:
            return self.mode
        return CompilationMode.VLLM_COMPILE if device_type == "cuda" else CompilationMode.NONE

    def without_effect(self, mode: CompilationMode) -> list[str]:
        """Settings that were changed and that ``mode`` does not read."""
        unread = {
            CompilationMode.NONE: (*_OF_PIECES, "inductor_compile_config"),
            CompilationMode.VLLM_COMPILE: () if self.compile_sizes else ("inductor_compile_config_for_sizes",),
        }
        defaults = type(self).model_fields
        return [name for name in unread.get(mode, _OF_PIECES) if getattr(self, name) != defaults[name].default]

    def all_sizes(self) -> list[int | None]:
        """Batch sizes that pieces are built for: None, which stands for every size, and ``compile_sizes``."""
        return [None, *sorted(set(self.compile_sizes))]

    def piece_formats(self, device_type: str) -> tuple[str, ...]:
        """Piece formats for a kind of device: the best one to load first, the one to build last."""
        if self.piece_format != "auto":
            return (self.piece_format,)
        return ("aoti", "standalone") if device_type == "cuda" else ("aoti", "fx")

    @pydantic.model_validator(mode="after")
    def _fx_takes_no_options(self) -> Self:
        if self.piece_format == "fx" and (self.inductor_compile_config or self.inductor_compile_config_for_sizes):
            raise ValueError(
                "piece_format fx runs pieces as they are and takes no Inductor options; use standalone or aoti,"
                " or remove inductor_compile_config and inductor_compile_config_for_sizes"
            )
        return self

    @pydantic.field_validator("mode", mode="before")
    @classmethod
    def _compilation_mode_by_name(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return CompilationMode[value.upper()]
        except KeyError:
            raise ValueError(f"use one of {', '.join(CompilationMode.__members__)}") from None

    @pydantic.field_serializer("mode")
    def _compilation_mode_to_name(self, mode: CompilationMode | None) -> str | None:
        return None if mode is None else mode.name

    @pydantic.field_validator("cudagraph_mode", mode="before")
    @classmethod
    def _mode_by_name(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return CUDAGraphMode[value.upper()]
        except KeyError:
            raise ValueError(f"use one of {', '.join(mode.name for mode in CUDAGraphMode)}") from None

    @pydantic.field_serializer("cudagraph_mode")
    def _mode_to_name(self, mode: CUDAGraphMode | None) -> str | None:
        return None if mode is None else mode.name


class ArtifactConfig(pydantic.BaseModel):
    """Where compiled artifacts are kept, whose are trusted, and what limits they have; see docs/artifacts.md.

    Attributes:
        store: ``local`` is a folder of this user's cache; otherwise a path (shared, if it is on NFS), or ``s3://``,
            ``gs://`` or ``az://``. None: nothing outlives the process.
        store_options: For an object store, by obstore's names: ``endpoint``, ``region``, ...
        local_tier: Keep what was read from an object store on this node's disk.
        local_tier_bytes: Most of it; what was used last stays.
        trust: ``local-only`` uses what this user made on this machine, with a key made at first use. ``signed`` uses
            what ``verifier_keys`` vouch for. ``none`` uses everything, and so runs whatever the store holds.
        verifier_keys: ``ed25519:...``, or files of such lines.
        signer_key_file: Publish under this key (``warmgraph artifacts keygen``); without one, ``signed`` only reads.
        publish: Write what was built to the store.
        timeout_s: Longest time that one call to the store may take; a store that fails is left alone for a minute.
        max_blob_bytes: Larger blobs are refused.
        max_unpacked_bytes: Archives that unpack to more are refused.
        self_check: ``node`` runs loaded code in a process of its own before it is first used on a node; ``off``
            trusts what was checked when it was built.
        self_check_timeout_s: After this time the check has failed.
        failure_ttl_s: How long a failed build keeps every replica from trying again.
        build_wait_s: Of several replicas that miss the same bundle one builds it. The others wait for it this long, and
            then build for themselves.
        serve_meanwhile: Do not wait for a build, one's own or another's, but serve eagerly until it is there.
        build_in_background: Once a replica serves and has nothing to do, build the piece formats that load faster
            (``aoti``) for the next start, in a process of the lowest priority; on CUDA it takes a context on the
            device. ``warmgraph warm`` does the same ahead of a roll-out.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    store: str | None = "local"
    store_options: dict[str, str] = {}
    local_tier: bool = True
    local_tier_bytes: int = pydantic.Field(default=8 << 30, gt=0)
    trust: Literal["signed", "local-only", "none"] = "local-only"
    verifier_keys: list[str] = []
    signer_key_file: str | None = None
    publish: bool = True
    timeout_s: float = pydantic.Field(default=15.0, gt=0)
    max_blob_bytes: int = pydantic.Field(default=1 << 30, gt=0)
    max_unpacked_bytes: int = pydantic.Field(default=4 << 30, gt=0)
    self_check: Literal["node", "off"] = "node"
    self_check_timeout_s: float = pydantic.Field(default=120.0, gt=0)
    failure_ttl_s: float = pydantic.Field(default=3600.0, gt=0)
    build_wait_s: float = pydantic.Field(default=300.0, ge=0)
    serve_meanwhile: bool = False
    build_in_background: bool = False


class EngineConfig(pydantic.BaseModel):
    """Everything one engine needs to know.

    Attributes:
        model: Local checkpoint folder, name of an imported model, or Hugging Face repo id.
        tokenizer: Folder of the tokenizer if it is not the model's.
        skip_tokenizer_init: Serve token ids only; no tokenizer is read.
        load_format: ``auto`` streams safetensors; ``dummy`` makes random weights from config.json alone.
        dtype: ``auto`` takes the checkpoint's.
        device: ``auto`` takes CUDA where there is one.
        seed: Seeds requests without a seed of their own, and dummy weights.
        max_model_len: Longest prompt plus output, in tokens; None takes the model's.
        block_size: Tokens per KV block.
        num_gpu_blocks_override: KV blocks (of the device in use, CPU included) instead of sizing by memory.
        gpu_memory_utilization: Share of the device's memory for weights, activations and KV cache (CUDA); this
            engine's alone, whoever else is on the device.
        kv_cache_memory_bytes: Memory for the KV cache instead of sizing by ``gpu_memory_utilization``; on a
            CPU the default is 1 GiB, or the size of ``max_num_seqs`` full contexts if that is less.
        enable_prefix_caching: Reuse the KV of full blocks that an earlier request computed.
        max_num_seqs: Most requests in a step.
        max_num_batched_tokens: Most tokens in a step, decodes and prefill chunks together.
        num_threads: CPU threads of the engine; None leaves torch's default.
        enforce_eager: No compilation and no graphs, whatever else is set.
        attention_backend: ``auto`` takes the best one for the device.
        compilation_config: The compile and graph layers.
        artifacts: Where what was compiled is kept.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    seed: int = 0
    max_model_len: int | None = pydantic.Field(default=None, gt=0)
    block_size: int = pydantic.Field(default=16, ge=1, le=256)
    num_gpu_blocks_override: int | None = pydantic.Field(default=None, ge=2)
    gpu_memory_utilization: float = pydantic.Field(default=0.9, gt=0, le=1)
    kv_cache_memory_bytes: int | None = pydantic.Field(default=None, gt=0)
    enable_prefix_caching: bool = True
    max_num_seqs: int = pydantic.Field(default=256, ge=1)
    max_num_batched_tokens: int = pydantic.Field(default=8192, ge=1)
    num_threads: int | None = pydantic.Field(default=None, ge=1)
    enforce_eager: bool = False
    attention_backend: str = "auto"
    compilation_config: CompilationConfig = CompilationConfig()
    artifacts: ArtifactConfig = ArtifactConfig()

    def compile_mode(self, device_type: str) -> CompilationMode:
        """How the model is compiled on a kind of device; ``enforce_eager`` is over all."""
        return CompilationMode.NONE if self.enforce_eager else self.compilation_config.resolved_mode(device_type)

    def compiles_pieces(self, device_type: str) -> bool:
        """Whether an engine on a kind of device has pieces, and so a bundle, at all."""
        return self.compile_mode(device_type) is CompilationMode.VLLM_COMPILE

    @classmethod
    def create(cls, **fields: Any) -> Self:
        """Validate keyword arguments.

        Raises:
            ConfigError: One sentence per problem; an unknown name is answered with the nearest valid one.
        """
        try:
            return cls(**fields)
        except pydantic.ValidationError as error:
            raise ConfigError(describe_validation_error(error, cls)) from None


def describe_validation_error(error: pydantic.ValidationError, model: type[pydantic.BaseModel]) -> str:
    """Turn pydantic's report into sentences that say which key to change, and to what."""
    return " ".join(_sentence(item, model) for item in error.errors())


def _sentence(item: Any, model: type[pydantic.BaseModel]) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{path}: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r})."
    names = _fields_at(model, item["loc"][:-1])
    near = difflib.get_close_matches(str(item["loc"][-1]), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys are {', '.join(sorted(names))}."
    return f"{path}: unknown key; {hint}"


def _fields_at(model: type[pydantic.BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """Field names of the nested model that ``loc`` leads to."""
    current: Any = model
    for part in loc:
        if isinstance(part, int) or not (isinstance(current, type) and issubclass(current, pydantic.BaseModel)):
            continue
        field = current.model_fields.get(str(part))
        if field is None:
            break
        current = _nested_model(field.annotation)
    if isinstance(current, type) and issubclass(current, pydantic.BaseModel):
        return list(current.model_fields)
    return list(model.model_fields)


def _nested_model(annotation: Any) -> Any:
    """The pydantic model inside ``X``, ``X | None``, ``list[X]`` or ``dict[str, X]``."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for arg in getattr(annotation, "__args__", ()):
        found = _nested_model(arg)
        if found is not None:
            return found
    return None
