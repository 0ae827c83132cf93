"""The rearranged encoder layers against transformers' own, on the embedded model's weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPModel
from transformers.modeling_attn_mask_utils import _create_4d_causal_attention_mask

from export.checkpoint import load_checkpoint
from export.layers import EncoderLayer, LastLayer

ATOL = 2e-5  # of hidden states of up to 30; measured 8e-6


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    """With biases everywhere, as trained: those that the rearrangement moves must not be zero."""
    model = load_checkpoint("mini").model
    for tower in (model.vision_model, model.text_model):
        for layer in tower.encoder.layers:
            assert all(
                bias.abs().max() > 1e-3
                for bias in (layer.self_attn.q_proj.bias, layer.self_attn.v_proj.bias, layer.mlp.fc1.bias)
            )
            nn.init.normal_(layer.self_attn.k_proj.bias)
    return model


@pytest.fixture(scope="module", params=["vision", "text"])
def tower(request: pytest.FixtureRequest, clip: CLIPModel) -> tuple[nn.Module, Tensor, Tensor | None]:
    """(encoder, hidden states (B, T, D) of ordinary size, causal mask or None)"""
    torch.manual_seed(0)
    encoder = clip.vision_model.encoder if request.param == "vision" else clip.text_model.encoder
    hidden = 3 * torch.randn(5, 11, encoder.config.hidden_size)
    mask = None if request.param == "vision" else _create_4d_causal_attention_mask((5, 11), hidden.dtype, "cpu")
    return encoder, hidden, mask


@torch.no_grad()
def test_every_layer_computes_the_same(tower: tuple[nn.Module, Tensor, Tensor | None]) -> None:
    encoder, hidden, mask = tower
    for layer in encoder.layers:
        (expected,) = layer(hidden, attention_mask=None, causal_attention_mask=mask)
        found = EncoderLayer(layer, causal=mask is not None)(hidden)
        torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


@torch.no_grad()
def test_the_last_layer_computes_one_token_of_the_same(tower: tuple[nn.Module, Tensor, Tensor | None]) -> None:
    encoder, hidden, mask = tower
    layer = encoder.layers[-1]
    (expected,) = layer(hidden, attention_mask=None, causal_attention_mask=mask)
    row = torch.arange(len(hidden))
    for position in (torch.zeros(5, dtype=torch.int64), torch.tensor([10, 3, 0, 7, 1])):
        visible = None if mask is None else torch.arange(hidden.shape[1]) <= position[:, None]
        found = LastLayer(layer)(hidden, hidden[row, position], visible)
        torch.testing.assert_close(found, expected[row, position], atol=ATOL, rtol=0)


@torch.no_grad()
def test_the_layers_leave_the_checkpoint_as_it_is(clip: CLIPModel) -> None:
    before = {name: weight.clone() for name, weight in clip.state_dict().items()}
    for layer in clip.text_model.encoder.layers:
        EncoderLayer(layer, causal=True)
        LastLayer(layer)
    for name, weight in clip.state_dict().items():
        assert torch.equal(weight, before[name]), name
