"""A Hugging Face CLIP checkpoint: from a folder, from the hub, embedded, or with random weights."""

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
from transformers import AutoConfig, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from engine.errors import ClipmillError

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
