"""Encoder layers of a transformers CLIP tower, rearranged so that they run faster and compute the same.

All rearrangements are exact but for float rounding; the certificate measures them with the rest. Figures: share of the
time of a ViT-B/32 image tower on one AVX-512 core, in fp32 and in int8, batches of 8.

- Attention is one MultiHeadAttention operator of ONNX Runtime's: 1% and 3% less than the plain operators. What its own
  fusion for CLIP makes of a tower, Attention and SkipLayerNormalization, takes 6% more than the plain operators.
  TensorRT knows only ONNX's own operators, and fuses these itself: to_plain() leaves them as they are.
- Softmax does not see what all keys have in common, so keys need no bias; the weights of a query sum to 1, so the bias
  of the values passes through to the output projection's.
- QuickGELU, x sigmoid(1.702 x), is SiLU between two layers with 1.702 and its reciprocal in their weights: ONNX Runtime
  has a kernel for that which is twice as fast (1.5% and 4% of the tower).
- Of the last layer one token is needed, so all but its attention runs on one token; and there keys and values are never
  computed: q (W x) = (q W) x, and W sum(p x) = sum(p W x). That is 8% less to multiply.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

QUICK_GELU_ALPHA = 1.702
# score of a token that is not attended to: the least of fp16, which TensorRT makes of fp32 graphs too; its exp is 0
MASKED = torch.finfo(torch.float16).min
T = TypeVar("T", bound=nn.Module)


class EncoderLayer(nn.Module):
    """forward: hidden (B, T, D) -> (B, T, D). `causal`: a token attends to itself and those before it."""

    def __init__(self, layer: nn.Module, *, causal: bool) -> None:
        super().__init__()
        attention = layer.self_attn
        self.heads, self.causal, self.fused = attention.num_heads, causal, True
        self.layer_norm1, self.layer_norm2 = layer.layer_norm1, layer.layer_norm2
        self.query = attention.q_proj
        self.key = _linear(attention.k_proj.weight)
        self.value = _linear(attention.v_proj.weight)
        self.output = _output_projection(attention)
        self.mlp = Mlp(layer.mlp)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.layer_norm1(hidden)
        attend = _MultiHeadAttention.apply if self.fused else _attention
        attended = attend(self.query(x), self.key(x), self.value(x), self.heads, self.causal)
        hidden = hidden + self.output(attended)
        return hidden + self.mlp(self.layer_norm2(hidden))


class LastLayer(nn.Module):
    """forward: hidden (B, T, D), token (B, D), one of each row of hidden, -> that token after the layer, (B, D).

    `mask` (B, T) bool, where given, says which tokens it attends to.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        attention = layer.self_attn
        self.scale = attention.scale
        self.layer_norm1, self.layer_norm2 = layer.layer_norm1, layer.layer_norm2
        self.query = attention.q_proj
        self.register_buffer("key", attention.k_proj.weight.detach())  # (D, D)
        self.register_buffer("value", attention.v_proj.weight.detach().T.contiguous())  # (D, D)
        own_channels = torch.eye(attention.num_heads).repeat_interleave(attention.head_dim, dim=1)
        self.register_buffer("own_channels", own_channels)  # (heads, D), 1 where a channel is of a head
        self.output = _output_projection(attention)
        self.mlp = Mlp(layer.mlp)

    def forward(self, hidden: Tensor, token: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.layer_norm1(hidden)
        query = self.query(self.layer_norm1(token)) * self.scale
        # each head's query among zeros: products of all heads with one matrix, which also keeps the batch out of the
        # way, for ONNX Runtime rounds a product of one row otherwise than one of several
        query = (query[:, None] * self.own_channels) @ self.key  # (B, heads, D)
        scores = query @ x.transpose(1, 2)  # (B, heads, T)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], MASKED)
        mixed = torch.softmax(scores, dim=-1) @ x  # (B, heads, D)
        attended = (mixed @ self.value * self.own_channels).sum(dim=1)  # (B, D)
        token = token + self.output(attended)
        return token + self.mlp(self.layer_norm2(token))


class Mlp(nn.Module):
    """The feed-forward block with its activation; QuickGELU as SiLU between scaled weights."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.activation = mlp.fc1, mlp.fc2, mlp.activation_fn
        if isinstance(self.activation, QuickGELUActivation):
            self.up = _linear(mlp.fc1.weight * QUICK_GELU_ALPHA, mlp.fc1.bias * QUICK_GELU_ALPHA)
            self.down = _linear(mlp.fc2.weight / QUICK_GELU_ALPHA, mlp.fc2.bias)
            self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


def to_plain(tower: T) -> T:
    """The tower, with attention that exports as ONNX's own operators."""
    for layer in tower.modules():
        if isinstance(layer, EncoderLayer):
            layer.fused = False
    return tower


def _attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head; inputs and output (B, T, D)."""
    tokens, channels = query.shape[1:]
    query, key, value = (x.unflatten(-1, (heads, channels // heads)).transpose(1, 2) for x in (query, key, value))
    scores = (query * (channels // heads) ** -0.5) @ key.transpose(2, 3)  # (B, heads, T, T)
    if causal:
        position = torch.arange(tokens, device=scores.device)
        scores = scores.masked_fill(position > position[:, None], MASKED)
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(2)


class _MultiHeadAttention(torch.autograd.Function):
    """_attention as one operator of the exported graph."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool) -> Tensor:
        return _attention(query, key, value, heads, causal)

    @staticmethod
    def symbolic(g: Any, query: Any, key: Any, value: Any, heads: int, causal: bool) -> Any:
        operator = "com.microsoft::MultiHeadAttention"
        output = g.op(operator, query, key, value, num_heads_i=heads, unidirectional_i=int(causal))
        return output.setType(query.type())


def _output_projection(attention: nn.Module) -> nn.Linear:
    weight = attention.out_proj.weight
    return _linear(weight, attention.out_proj.bias + weight @ attention.v_proj.bias)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.data = weight.detach()
    if bias is not None:
        linear.bias.data = bias.detach()
    return linear
