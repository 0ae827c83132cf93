"""The image and text towers of a CLIP checkpoint as modules that export whole: pixels or token ids in, projected and
L2-normalised embeddings out. The weights are the reference model's; export/layers.py has their encoder layers.

In half precision (to_half) what needs more stays in float32: the resize, where 6% of the levels would differ, the
projection and the L2 norm. LayerNorm takes fp16 and computes its mean and variance in float32: the exported operator's
stash_type says so.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from export.layers import EncoderLayer, LastLayer
from export.preprocess import ResizeAndCrop


class ImageTower(nn.Module):
    """uint8 pixels and two resize matrices -> L2-normalised image embeddings.

    forward: pixels (B, H, W, 3) uint8, rows (S, H) float32, columns (S, W) float32 -> (B, dim) float32, unit rows.
    """

    def __init__(self, clip: CLIPModel, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.config = clip.config.vision_config
        vision = clip.vision_model
        self.resize_and_crop = ResizeAndCrop()
        self.patch_embedding = PatchEmbedding(clip, mean, std)
        self.pre_layrnorm = vision.pre_layrnorm  # transformers' spelling
        *layers, last = vision.encoder.layers
        self.layers = nn.ModuleList(EncoderLayer(layer, causal=False) for layer in layers)
        self.last_layer = LastLayer(last)
        self.post_layernorm = vision.post_layernorm
        self.projection = clip.visual_projection

    def forward(self, pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        levels = self.resize_and_crop(pixels, rows, columns)
        hidden = self.pre_layrnorm(self.patch_embedding(levels))
        for layer in self.layers:
            hidden = layer(hidden)
        class_token = self.last_layer(hidden, hidden[:, 0])
        return _unit_rows(self.projection(_cast(self.post_layernorm(class_token), torch.float32)))


class PatchEmbedding(nn.Module):
    """uint8 levels (B, 3, S, S) as float32 -> class and patch tokens with their positions, (B, 1 + patches, D).

    A convolution whose stride is its kernel is a matrix product over flattened patches. Rescaling and normalisation,
    (level / 255 - mean) / std, are affine in each channel, so they fold into that product's weight and bias: exact.
    """

    def __init__(self, clip: CLIPModel, mean: list[float], std: list[float]) -> None:
        super().__init__()
        embeddings = clip.vision_model.embeddings
        kernel = embeddings.patch_embedding.weight.detach().double()  # (D, 3, P, P)
        per_channel = (1, 3, 1, 1)
        scale = torch.tensor(std, dtype=torch.float64).reciprocal().reshape(per_channel)
        offset = torch.tensor(mean, dtype=torch.float64).reshape(per_channel)
        positions = embeddings.position_embedding.weight.detach().double()
        bias = -(kernel * offset * scale).sum(dim=(1, 2, 3))
        self.patch_size = kernel.shape[-1]
        self.grid = embeddings.image_size // self.patch_size
        self.register_buffer("weight", (kernel * scale / 255).flatten(1).T.float().contiguous())  # (3 P P, D)
        self.register_buffer("bias", (positions[1:] + bias).float())  # (patches, D)
        self.register_buffer("class_token", (embeddings.class_embedding.detach() + positions[0]).float()[None, None])

    def forward(self, levels: Tensor) -> Tensor:
        levels = _cast(levels, self.weight.dtype)
        patches = levels.reshape(-1, 3, self.grid, self.patch_size, self.grid, self.patch_size)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.grid**2, 3 * self.patch_size**2)
        tokens = patches @ self.weight + self.bias
        return torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)


class TextTower(nn.Module):
    """Token ids -> L2-normalised text embeddings.

    forward: input_ids (B, L) int64, eos_position (B,) int64 -> (B, dim) float32, unit rows. L may be anything up to the
    context length: under the causal mask nothing after the EOS token can reach it.
    """

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.config = clip.config.text_config
        text = clip.text_model
        *layers, last = text.encoder.layers
        self.embeddings = text.embeddings
        self.layers = nn.ModuleList(EncoderLayer(layer, causal=True) for layer in layers)
        self.last_layer = LastLayer(last)
        self.final_layer_norm = text.final_layer_norm
        self.projection = clip.text_projection

    def forward(self, input_ids: Tensor, eos_position: Tensor) -> Tensor:
        hidden = self.embeddings(input_ids=input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        index = eos_position.reshape(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
        eos_token = hidden.gather(1, index).reshape(-1, hidden.shape[-1])
        not_after = torch.arange(input_ids.shape[1], device=input_ids.device) <= eos_position[:, None]
        eos_token = self.last_layer(hidden, eos_token, not_after)
        return _unit_rows(self.projection(_cast(self.final_layer_norm(eos_token), torch.float32)))


def to_half(tower: ImageTower | TextTower) -> ImageTower | TextTower:
    """A copy of a tower in half precision, but for what needs more."""
    half = copy.deepcopy(tower).half()
    half.projection.float()
    return half


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # the exporter writes a Cast for every to()


def _unit_rows(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)
