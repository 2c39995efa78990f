"""One decoder for every supported architecture: Llama, Mistral, Qwen2, Qwen3 differ by flags of the config.

Knows the order of operations and the names of the parameters (those of the Hugging Face checkpoints, with q,
k, v and gate, up fused). Knows nothing about where weights come from, batches, or caches: attention is one
opaque op that reads the batch from the forward context. ``forward`` depends on tensor values nowhere and on
no shape but the number of tokens, dimension 0 of everything, so that it traces into a single graph.

Shape suffixes: T = tokens of the batch (padded), E = hidden size, H = query heads, K = KV heads, D = head
size, P = positions, N = rows whose logits are wanted, V = vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

import workers.attention.op  # noqa: F401  (defines torch.ops.warmgraph.attention)
from workers.attention.base import AttentionSpec
from workers.compile.decorator import support_torch_compile
from workers.graphs.context import keep_last_rows
from workers.kernels.functional import add_rms_norm, apply_rope, embedding, rms_norm
from workers.kernels.linear import Linear
from workers.model.config import ModelConfig
from workers.model.rope import compute_cos_sin_cache


@dataclasses.dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A parameter as loaded, before any kernel repacks it; compiled artifacts are checked against this."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True, slots=True)
class _Factory:
    """Where new parameters go."""

    dtype: torch.dtype
    device: torch.device

    def parameter(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False)

    def linear(self, in_features: int, out_features: int, bias: bool) -> Linear:
        """An uninitialised linear layer."""
        return Linear(in_features, out_features, bias, dtype=self.dtype, device=self.device)


class Embedding(nn.Module):
    """A table of token embeddings, ``weight`` [V, E]; when tied to the head, a ``Linear`` takes its place."""

    def __init__(self, config: ModelConfig, new: _Factory) -> None:
        super().__init__()
        self.weight = new.parameter(config.vocab_size, config.hidden_size)

    def rows(self, input_ids_T: torch.Tensor) -> torch.Tensor:
        """int64 ``[T]`` to ``[T, E]``."""
        return embedding(input_ids_T, self.weight)


class RMSNorm(nn.Module):
    """RMS normalisation over the last dimension, with a learned scale."""

    def __init__(self, size: int, eps: float, new: _Factory) -> None:
        super().__init__()
        self.weight = new.parameter(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., size]`` to the same shape."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, x_TE: torch.Tensor, residual_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of ``x + residual``, and that sum: the next residual."""
        return add_rms_norm(x_TE, residual_TE, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary embedding and, for Qwen3, normalised queries and keys."""

    def __init__(self, config: ModelConfig, layer: int, new: _Factory) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_size = self.num_heads * self.head_dim
        self.kv_size = self.num_kv_heads * self.head_dim
        self.qkv_proj = new.linear(config.hidden_size, self.q_size + 2 * self.kv_size, config.qkv_bias)
        self.o_proj = new.linear(self.q_size, config.hidden_size, config.o_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, new) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, new) if config.qk_norm else None

    def forward(self, x_TE: torch.Tensor, positions_T: torch.Tensor, cos_sin_cache_PD: torch.Tensor) -> torch.Tensor:
        """``[T, E]`` to the heads' results side by side, ``[T, H * D]``, which ``o_proj`` has yet to mix."""
        num_tokens = x_TE.shape[0]
        q, k, v = self.qkv_proj(x_TE).split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q_THD = q.view(num_tokens, self.num_heads, self.head_dim)
        k_TKD = k.view(num_tokens, self.num_kv_heads, self.head_dim)
        v_TKD = v.view(num_tokens, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TKD = self.q_norm(q_THD), self.k_norm(k_TKD)
        q_THD, k_TKD = apply_rope(q_THD, k_TKD, positions_T, cos_sin_cache_PD)
        out_THD = torch.empty_like(q_THD)
        torch.ops.warmgraph.attention(q_THD, k_TKD, v_TKD, out_THD, self.layer)
        return out_THD.view(num_tokens, self.q_size)


class MLP(nn.Module):
    """The gated feed-forward network (SwiGLU)."""

    def __init__(self, config: ModelConfig, new: _Factory) -> None:
        super().__init__()
        self.gate_up_proj = new.linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias)
        self.down_proj = new.linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        """``[T, E]`` to ``[T, E]``."""
        down_TE: torch.Tensor = self.down_proj(self.gate_up_proj.silu_and_mul(x_TE))
        return down_TE


class DecoderLayer(nn.Module):
    """Attention, then the feed-forward network, each after a norm and added to the residual stream.

    What a layer returns has yet to be added to the residual: the next norm does both in one call.

    Attributes:
        is_last: After its attention, nothing looks at any other row than its own.
    """

    def __init__(self, config: ModelConfig, layer: int, new: _Factory) -> None:
        super().__init__()
        self.is_last = layer == config.num_hidden_layers - 1
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, new)
        self.self_attn = Attention(config, layer, new)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, new)
        self.mlp = MLP(config, new)

    def forward(
        self,
        hidden_TE: torch.Tensor,
        residual_TE: torch.Tensor | None,
        positions_T: torch.Tensor,
        cos_sin_cache_PD: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (hidden, residual), of the last layer maybe those of chosen rows; the first takes no residual."""
        if residual_TE is None:
            residual_TE, hidden_TE = hidden_TE, self.input_layernorm(hidden_TE)
        else:
            hidden_TE, residual_TE = self.input_layernorm.add(hidden_TE, residual_TE)
        attended = self.self_attn(hidden_TE, positions_T, cos_sin_cache_PD)
        if self.is_last and not torch.compiler.is_compiling():
            # Of compiled pieces, whoever calls them sees to this.
            attended, residual_TE = keep_last_rows(attended, residual_TE)
        hidden_TE = self.self_attn.o_proj(attended)
        hidden_TE, residual_TE = self.post_attention_layernorm.add(hidden_TE, residual_TE)
        return self.mlp(hidden_TE), residual_TE


class DecoderModel(nn.Module):
    """Everything but the language-model head."""

    cos_sin_cache: torch.Tensor

    def __init__(self, config: ModelConfig, max_model_len: int, new: _Factory) -> None:
        super().__init__()
        self.embed_tokens: Embedding | Linear
        if config.tie_word_embeddings:
            self.embed_tokens = new.linear(config.hidden_size, config.vocab_size, False)
        else:
            self.embed_tokens = Embedding(config, new)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, new) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, new)
        cache_PD = compute_cos_sin_cache(config.rope, config.head_dim, max_model_len, new.device)
        self.register_buffer("cos_sin_cache", cache_PD, persistent=False)

    def forward(self, input_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Token ids and positions, int64 ``[T]`` each, to the last norm's output ``[T, E]``."""
        if torch.compiler.is_compiling():
            # Tells the tracer that both have the same length; without it each gets a symbol of its own. Nowhere else,
            # since it imports sympy, most of a second of a start.
            torch._check(positions_T.shape[0] == input_ids_T.shape[0])  # type: ignore[no-untyped-call]
        hidden_TE = self.embed_tokens.rows(input_ids_T)
        residual_TE: torch.Tensor | None = None
        for layer in self.layers:
            hidden_TE, residual_TE = layer(hidden_TE, residual_TE, positions_T, self.cos_sin_cache)
        assert residual_TE is not None
        hidden_TE, _ = self.norm.add(hidden_TE, residual_TE)
        return hidden_TE


@support_torch_compile
class DecoderForCausalLM(nn.Module):
    """A decoder with its language-model head, on uninitialised parameters (``load_model`` fills them).

    Args:
        config: Shape and arithmetic.
        dtype: Of parameters and activations.
        device: Where parameters are made; ``meta`` allocates nothing.
        max_model_len: Positions in the rotary table; None takes the model's ``max_position_embeddings``.

    Attributes:
        parameter_specs: Every parameter, as loaded; those that share memory (tied embeddings) appear once.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        new = _Factory(dtype, device)
        self.model = DecoderModel(config, max_model_len or config.max_position_embeddings, new)
        if isinstance(self.model.embed_tokens, Linear):
            # One module under two names: whatever form its weight takes, lookup and head read the same memory.
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = new.linear(config.hidden_size, config.vocab_size, False)
        self.parameter_specs = tuple(
            ParameterSpec(name, tuple(parameter.shape), parameter.dtype) for name, parameter in self.named_parameters()
        )

    def forward(self, input_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """One step of the model.

        Args:
            input_ids_T: int64 token ids. Padding rows may hold any valid id.
            positions_T: int64 positions, below ``max_model_len``, padding included.

        Returns:
            Hidden states ``[T, E]`` in the model's dtype, after the last norm; ``[R, E]`` if the forward context says
            that each request's last token suffices.
        """
        hidden_TE: torch.Tensor = self.model(input_ids_T, positions_T)
        return hidden_TE

    def compute_logits(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        """Logits ``[N, V]`` for chosen rows of ``forward``'s result, as precise as :meth:`Linear.logits` has them."""
        return self.lm_head.logits(hidden_NE)

    def attention_spec(self, block_size: int) -> AttentionSpec:
        """See :func:`attention_spec`."""
        return attention_spec(self.config, self.dtype, block_size)


def attention_spec(config: ModelConfig, dtype: torch.dtype, block_size: int) -> AttentionSpec:
    """What an attention backend needs to know about a model."""
    return AttentionSpec(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        block_size=block_size,
        dtype=dtype,
        sliding_window=config.sliding_window,
    )
