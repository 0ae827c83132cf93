"""A Hugging Face CLIP checkpoint, and its image and text towers as modules that export whole.

The towers are cut from the reference model, not written anew: every weight and every encoder layer is
transformers' own. What is added is what a bundle promises: pixels in, projected and L2-normalised embeddings out.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import get_session
from torch import Tensor, nn
from transformers import AutoConfig, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast
from transformers.modeling_attn_mask_utils import _create_4d_causal_attention_mask

from engine.errors import ClipmillError
from export.preprocess import ResizeAndCrop

MINI_CHECKPOINT = Path(__file__).parent / "mini_clip" / "checkpoint"
RANDOM_MODEL = "random-vit-b-32"
RANDOM_SEED = 0
HUB_SECONDS = 10  # the hub's answer to a bare request
PARTS = "config.json, model.safetensors (no other format of weights), preprocessor_config.json and tokenizer.json"


@dataclass(frozen=True)
class Checkpoint:
    """A CLIP model in float32 on the CPU, with what belongs to it."""

    name: str  # what the user asked for: hub id, folder, "mini" or "random-vit-b-32"
    revision: str | None  # commit of a hub model
    weights_sha256: str
    random_weights: bool
    model: CLIPModel
    processor: CLIPImageProcessor
    tokenizer: CLIPTokenizerFast | None


def load_checkpoint(name: str) -> Checkpoint:
    """Load `mini`, `random-vit-b-32`, a local folder or a hub id; safetensors only, no remote code."""
    if name == RANDOM_MODEL:
        model, processor, tokenizer, revision = _random_model(), CLIPImageProcessor(), None, None
    else:
        model, processor, tokenizer = _load_pretrained(name)
        revision = getattr(model.config, "_commit_hash", None)
    return Checkpoint(name, revision, _weights_sha256(model), name == RANDOM_MODEL, model, processor, tokenizer)


def _random_model() -> CLIPModel:
    """ViT-B/32, the default CLIPConfig, with seeded random weights.

    transformers starts every bias at 0 and every LayerNorm at (1, 0), so a tower that drops or mixes them up would
    pass for right: the vectors get noise of the weights' own scale.
    """
    torch.manual_seed(RANDOM_SEED)
    model = CLIPModel._from_config(CLIPConfig(), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def _load_pretrained(name: str) -> tuple[CLIPModel, CLIPImageProcessor, CLIPTokenizerFast]:
    source = str(MINI_CHECKPOINT) if name == "mini" else name
    local = Path(source).expanduser()
    if local.is_dir():
        source = str(local)
        if not (local / "config.json").is_file():
            raise ClipmillError(f"{name} holds no config.json, so it is not a Hugging Face checkpoint; see --model")
    elif local.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ClipmillError(f"no checkpoint folder at {name}; --model takes a folder, a hub id, mini or {RANDOM_MODEL}")
    for library in ("transformers", "huggingface_hub"):  # their warnings come again as our one line
        logging.getLogger(library).setLevel(logging.ERROR)
    where: dict[str, Any] = {"source": source, "local_files_only": local.is_dir() or not _hub_answers()}
    config = _load(AutoConfig, name, **where, trust_remote_code=False)
    if not isinstance(config, CLIPConfig):
        raise ClipmillError(f"{name} is a {config.model_type} checkpoint; --model takes CLIP checkpoints only")
    model, problems = _load(
        CLIPModel,
        name,
        **where,
        use_safetensors=True,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, like the missing ones
    )
    if lacking := sorted([*problems["missing_keys"], *problems["mismatched_keys"]]):
        raise ClipmillError(
            f"{name} lacks {len(lacking)} of the weights that its config.json promises, or has them in another shape: "
            f"{lacking[0]}; see --model"
        )
    return model.eval(), _load(CLIPImageProcessor, name, **where), _load(CLIPTokenizerFast, name, **where)


def _hub_answers() -> bool:
    """Ask once: transformers would try six times, for 23 s, before it looks for the model in its cache."""
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except OSError:  # every exception of requests is one, and that of HF_HUB_OFFLINE
        return False
    return True


def _load(part: type[Any], name: str, *, source: str, **options: Any) -> Any:
    """`part.from_pretrained`, turning what it raises into one line."""
    try:
        return part.from_pretrained(source, **options)
    except Exception as error:  # safetensors and tokenizers have classes of their own; damaged files give any other
        if Path(source).is_dir():
            raise ClipmillError(
                f"{name} cannot be loaded as a CLIP checkpoint ({part.__name__}: {_line(error)}): a folder for --model "
                f"holds {PARTS}"
            ) from error
        if isinstance(error.__cause__, RepositoryNotFoundError):  # also a gated one
            raise ClipmillError(f"the hub has no {name} that you may read ({_line(error)}); see --model") from error
        raise ClipmillError(
            f"the hub could not give {name} ({_line(error)}); two ways on: --model FOLDER with a downloaded "
            "checkpoint, or --model mini, which is embedded"
        ) from error


def _line(error: BaseException, length: int = 200) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= length else line[: length - 3] + "..."


def _weights_sha256(model: CLIPModel) -> str:
    """sha256 over name, shape and float32 bytes of every weight, in name order.

    Taken from the loaded tensors, so that it does not depend on how a checkpoint is cut into files.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, list(weight.shape)]).encode())
        digest.update(weight.contiguous().numpy().tobytes())
    return digest.hexdigest()


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
        self.layers, self.last_layer = vision.encoder.layers[:-1], vision.encoder.layers[-1]
        self.post_layernorm = vision.post_layernorm
        self.projection = clip.visual_projection

    def forward(self, pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        levels = self.resize_and_crop(pixels, rows, columns)
        hidden = self.pre_layrnorm(self.patch_embedding(levels))
        for layer in self.layers:
            (hidden,) = layer(hidden, attention_mask=None, causal_attention_mask=None)
        return _unit_rows(self.projection(self.post_layernorm(_class_token_only(self.last_layer, hidden))))


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
        self.text = clip.text_model
        self.projection = clip.text_projection

    def forward(self, input_ids: Tensor, eos_position: Tensor) -> Tensor:
        hidden = self.text.embeddings(input_ids=input_ids)
        mask = _create_4d_causal_attention_mask(input_ids.size(), hidden.dtype, device=hidden.device)
        for layer in self.text.encoder.layers:
            (hidden,) = layer(hidden, attention_mask=None, causal_attention_mask=mask)
        index = eos_position.reshape(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
        pooled = hidden.gather(1, index).reshape(-1, hidden.shape[-1])  # the LayerNorm after it works a token at a time
        return _unit_rows(self.projection(self.text.final_layer_norm(pooled)))


def _class_token_only(layer: nn.Module, hidden: Tensor) -> Tensor:
    """A vision encoder layer whose output is needed for the class token alone: (B, T, D) -> (B, D).

    Keys and values need every token; queries, output projection and MLP only the first. Exact, about 7% less work.
    """
    attention = layer.self_attn
    batch, tokens, width = hidden.shape
    split = (attention.num_heads, attention.head_dim)
    normed = layer.layer_norm1(hidden)
    query = attention.q_proj(normed[:, :1]).reshape(batch, 1, *split).transpose(1, 2)
    key = attention.k_proj(normed).reshape(batch, tokens, *split).transpose(1, 2)
    value = attention.v_proj(normed).reshape(batch, tokens, *split).transpose(1, 2)
    weights = torch.softmax(query @ key.transpose(-1, -2) * attention.scale, dim=-1)
    attended = (weights @ value).transpose(1, 2).reshape(batch, width)
    class_token = hidden[:, 0] + attention.out_proj(attended)
    return class_token + layer.mlp(layer.layer_norm2(class_token))


def _unit_rows(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)
