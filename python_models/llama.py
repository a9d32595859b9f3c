"""Llama and its relatives: RMSNorm, RoPE, grouped-query attention, SwiGLU, in Hugging Face's numbers.

The model of Llama 1 to 3.2, TinyLlama, Mistral, Qwen2 and Qwen3, which `llama_configs.Config` tells apart;
`llama_files` reads and writes their checkpoints. Every heavy step is a function of `genai_kernels`; the same model in
plain PyTorch, its eager twin, is this model inside `with gk.use_backend("reference"):`.

q, k and v are one matrix, and so are gate and up: one product instead of three and two. The files keep them apart.

The logits of a token have the same bits whatever stands beside it in the batch, in whatever pieces its text comes, with
a cache or without, on any number of threads: `genai_kernels.linear` and the attention see to it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

import genai_kernels as gk
from genai_kernels.nn import Linear, RMSNorm
from python_models.llama_configs import Config
from python_models.llama_rope import RotaryTables


class Cache(Protocol):
    """Where the keys and values of earlier tokens are. The model calls nothing else of it."""

    def attend(
        self,
        layer_index: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        softmax_scale: float,
        window_size: tuple[int, int],
    ) -> torch.Tensor:
        """Stores k and v, then attends with q to all that its sequence has stored, causally.

        Args:
            layer_index: 0 up to layers - 1, in this order in each forward pass.
            q: `[total_tokens, heads, head_dim]`, rotated by its positions.
            k: `[total_tokens, kv_heads, head_dim]`, rotated; v: the same shape. Any strides.
            window_size: as in `flash_attention`.

        Returns:
            `[total_tokens, heads, head_dim]`.
        """
        ...


class Attention(nn.Module):
    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.sizes = [n * config.head_dim for n in (config.heads, config.kv_heads, config.kv_heads)]
        self.qkv = Linear(config.width, sum(self.sizes), bias=config.qkv_bias)
        self.out = Linear(self.sizes[0], config.width, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.eps) if config.qk_norm else None

    def forward(self, x, tables, positions, cache):
        """x `[batch, T, width]` without a cache, `[total_tokens, width]` with one."""
        config = self.config
        qkv = self.qkv(x).unflatten(-1, (-1, config.head_dim))
        qk, v = qkv.split([config.heads + config.kv_heads, config.kv_heads], dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split([config.heads, config.kv_heads], dim=-2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=-2)
        # q and k lie side by side: both are rotated in one call
        q, k = gk.rotary_embedding(qk, *tables, positions).split([config.heads, config.kv_heads], dim=-2)
        how = {"softmax_scale": config.head_dim**-0.5, "window_size": config.window_size(self.index)}
        if cache is None:
            y = gk.flash_attention(q, k, v, causal=True, **how)
        else:
            y = cache.attend(self.index, q, k, v, **how)
        return self.out(y.flatten(-2))


class GatedMLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_up = Linear(config.width, 2 * config.hidden, bias=config.mlp_bias)
        self.down = Linear(config.hidden, config.width, bias=config.mlp_bias)

    def forward(self, x):
        return self.down(gk.silu_and_mul(self.gate_up(x)))


class Layer(nn.Module):
    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.eps)
        self.attention = Attention(config, index)
        self.mlp_norm = RMSNorm(config.width, config.eps)
        self.mlp = GatedMLP(config)

    def forward(self, x, residual, tables, positions, cache):
        """x is what the layer before adds to the residual stream; it is added where the norm reads it anyway."""
        if residual is None:
            x, residual = self.attention_norm(x), x
        else:
            x, residual = gk.fused_add_rms_norm(x, residual, self.attention_norm.weight, self.attention_norm.eps)
        x = self.attention(x, tables, positions, cache)
        x, residual = gk.fused_add_rms_norm(x, residual, self.mlp_norm.weight, self.mlp_norm.eps)
        return self.mlp(x), residual


def _rows(x, which):
    return x.reshape(-1, x.shape[-1]).index_select(0, which)


class Llama(nn.Module):
    """`Llama(config)`: tokens to logits.

    Args:
        config: the sizes. Weights are drawn from torch's generator; `llama_files.load` fills in those of a checkpoint.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)
        self.head = Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.tables = RotaryTables(config)
        if not self.embedding.weight.is_meta:
            self._draw_weights()

    def _draw_weights(self) -> None:
        """As large as keeps the variance; the last product of each part 0, so that every layer begins as identity."""
        for part in self.modules():
            if isinstance(part, Attention):
                nn.init.normal_(part.qkv.weight, std=self.config.width**-0.5)
                nn.init.zeros_(part.out.weight)
            elif isinstance(part, GatedMLP):
                nn.init.normal_(part.gate_up.weight, std=self.config.width**-0.5)
                nn.init.zeros_(part.down.weight)
        if not self.config.tied:
            nn.init.normal_(self.head.weight, std=self.config.width**-0.5)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: Cache | None = None,
        *,
        logits_of: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of the token that follows each token.

        Args:
            tokens: int32 or int64. Without a cache `[batch, T]`, texts that begin at position 0 (or as `positions`
                says); with one `[total_tokens]`, tokens of one or several sequences as the cache knows them.
            positions: int32 or int64, of each token in its sequence: `[T]` or `[batch, T]`, or `[total_tokens]` with a
                cache, where it is needed.
            logits_of: int64 indices of the rows (of `[batch * T]` or of `[total_tokens]`) whose logits are wanted.

        Returns:
            `[batch, T, vocabulary]`, `[total_tokens, vocabulary]`, or `[len(logits_of), vocabulary]`; dtype of the
            weights.

        Raises:
            ValueError: shapes that do not fit.
            IndexError: a token outside of the vocabulary; a position outside of the context.
        """
        return self.head(self._last_hidden(tokens, positions, cache, logits_of))

    def _last_hidden(self, tokens, positions=None, cache=None, logits_of=None) -> torch.Tensor:
        """What the head makes logits of."""
        self._check(tokens, positions, cache)
        cos, sin = self.tables.on(tokens.device)
        tables = (cos, sin) if positions is not None else (cos[: tokens.shape[-1]], sin[: tokens.shape[-1]])
        x, residual = self.embedding(tokens), None
        for layer in self.layers:
            x, residual = layer(x, residual, tables, positions, cache)
        if logits_of is not None:
            x, residual = _rows(x, logits_of), _rows(residual, logits_of)
        x, _ = gk.fused_add_rms_norm(x, residual, self.norm.weight, self.norm.eps)
        return x

    def _check(self, tokens, positions, cache) -> None:
        rank, form = (2, "[batch, T] without a cache") if cache is None else (1, "[total_tokens] with a cache")
        if tokens.dim() != rank:
            raise ValueError(f"Llama: tokens: expected {form}, got shape {list(tokens.shape)}")
        if cache is not None and (positions is None or positions.shape != tokens.shape):
            got = None if positions is None else list(positions.shape)
            raise ValueError(f"Llama: positions: expected shape {list(tokens.shape)}, one for each token, got {got}")
        if positions is None and tokens.shape[-1] > self.config.context:
            raise IndexError(
                f"Llama: tokens: expected at most {self.config.context} positions (Config.context), "
                f"got {tokens.shape[-1]}"
            )

    def loss(self, tokens: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of the tokens that follow, `[batch, T]` both, in nats; float32, without the logits."""
        return gk.fused_linear_cross_entropy(self._last_hidden(tokens), self.head.weight, following, self.head.bias)
