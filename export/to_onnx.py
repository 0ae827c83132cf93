"""Checkpoint -> bundle: each tower through optimum's exporter, in the target's precision, then certified.

A bundle for TensorRT is made of ONNX's own operators and fp32 weights, whatever its precision: that is what the engine
tells TensorRT to compute in, which makes fp16 of an fp32 graph itself. Unlike the fp16 graphs for CUDA these cannot
keep the resize in fp32. In fp16, played with PyTorch on the CPU, 6% of the levels of a 32x32 image at 224x224 differ,
by at most 2: cosine 0.999998, after subtracting the mean embedding 0.99994 (ViT-B/32, random weights).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimum.exporters.onnx.convert import export as optimum_export
from optimum.exporters.onnx.model_configs import CLIPTextWithProjectionOnnxConfig, CLIPVisionModelOnnxConfig

from engine.bundle import (
    CPU_FP32,
    TOWERS,
    Architecture,
    Bundle,
    Preprocessing,
    Source,
    Target,
    TowerName,
    describe_files,
    save_bundle,
)
from engine.errors import ClipmillError
from engine.files import atomic_folder
from engine.machine import library_versions
from engine.preprocess import image_feeds, resize_matrices
from engine.providers import require
from export.checkpoint import Checkpoint, load_checkpoint
from export.int8 import quantise
from export.layers import to_plain
from export.preprocess import read_preprocessing
from export.samples import sample_images
from export.towers import ImageTower, TextTower, to_half
from export.verify import certify

OPSET = 17
PRECISIONS = {  # by provider; the first is its own
    "cpu": ("fp32", "int8"),
    "cuda": ("fp16", "fp32"),
    "tensorrt": ("fp16", "fp32"),
}
EXPORTING_LIBRARIES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "onnxruntime-gpu", "onnxruntime")


def choose_target(provider: str, precision: str | None) -> Target:
    """What --provider and --precision (None: the provider's own) come to; ClipmillError if nothing.

    `auto` is never tensorrt, whose engines take minutes to build.
    """
    if provider == "auto":
        try:
            require("cuda")
            provider = "cuda"
        except ClipmillError:
            provider = "cpu"
    offered = PRECISIONS[provider]
    if precision is not None and precision not in offered:
        raise ClipmillError(
            f"no {precision} for the {provider} provider, which takes {' or '.join(offered)}; see --precision and "
            "--provider"
        )
    return Target(provider, precision or offered[0])


def export_bundle(
    model: str,
    output: Path,
    target: Target = CPU_FP32,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Export a checkpoint to a certified bundle at `output`, which appears only when it has passed.

    model: hub id, folder, "mini" or "random-vit-b-32". An earlier bundle at `output` is replaced.
    Raises ClipmillError when the checkpoint is not CLIP, cannot be had, or the bundle misses the bar of its precision.
    """
    if output.exists() and not (output / "bundle.json").is_file():
        raise ClipmillError(f"{output} exists and is no bundle: move it away or choose another --output")
    progress(f"loading {model}")
    checkpoint = load_checkpoint(model)
    architecture = _architecture(checkpoint)
    preprocessing = read_preprocessing(checkpoint.processor, architecture.image_size)
    with atomic_folder(output) as folder:
        for name in TOWERS:
            progress(f"exporting the {name} tower for {target.provider} with {_weights(name, target)} weights")
            _export_tower(checkpoint, name, preprocessing, target, folder / f"{name}.onnx")
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        bundle = Bundle(
            path=folder,
            source=Source(model, checkpoint.revision, checkpoint.weights_sha256, checkpoint.random_weights),
            architecture=architecture,
            preprocessing=preprocessing,
            target=target,
            opset=OPSET,
            files=describe_files(folder),
            versions=library_versions(("clipmill", *EXPORTING_LIBRARIES)),
            certificate={},
        )
        progress("certifying against PyTorch")
        bundle = dataclasses.replace(bundle, certificate=certify(bundle, checkpoint))
        save_bundle(bundle)
    return dataclasses.replace(bundle, path=output.absolute())


def _architecture(checkpoint: Checkpoint) -> Architecture:
    config = checkpoint.model.config
    vision, text = config.vision_config, config.text_config
    if vision.hidden_act != text.hidden_act:
        raise ClipmillError(
            f"{checkpoint.name} mixes activations ({vision.hidden_act} and {text.hidden_act}), which no CLIP does"
        )
    return Architecture(
        embedding_dim=config.projection_dim,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        context_length=text.max_position_embeddings,
        vocabulary_size=text.vocab_size,
        logit_scale=round(checkpoint.model.logit_scale.exp().item(), 4),
        activation=vision.hidden_act,
    )


def _export_tower(
    checkpoint: Checkpoint, name: TowerName, preprocessing: Preprocessing, target: Target, path: Path
) -> None:
    """PyTorch module -> ONNX at `path`, by optimum."""
    tower: ImageTower | TextTower
    if name == "image":
        tower = ImageTower(checkpoint.model, list(preprocessing.mean), list(preprocessing.std))
        onnx_config: Any = _ImageOnnxConfig(tower.config, preprocessing)
    else:
        tower = TextTower(checkpoint.model)
        onnx_config = _TextOnnxConfig(tower.config, task="feature-extraction")
    if target.provider == "tensorrt":
        tower = to_plain(tower)
    weights = _weights(name, target)
    with _quiet():
        optimum_export(
            to_half(tower) if weights == "fp16" else tower,
            onnx_config,
            path,
            opset=OPSET,
            disable_dynamic_axes_fix=True,
        )
    if weights == "int8":
        images, _ = sample_images("train", photos=48, digits=16)
        quantise(path, (image_feeds(image[None], preprocessing) for image in images), preprocessing.mean)


def _weights(name: TowerName, target: Target) -> str:
    """The precision of a tower's graph."""
    if target.provider == "tensorrt":
        return "fp32"
    # int8 would be 2.5 times as fast (180 prompts/s of 12 tokens on a core, fp32 70), but prompts are few, embedded
    # once, and every decision rests on them: centred cosine 0.994 at least, random weights
    return "fp32" if (name, target.precision) == ("text", "int8") else target.precision


class _ImageOnnxConfig(CLIPVisionModelOnnxConfig):  # type: ignore[misc]
    """Names and shapes of ImageTower's inputs and output for optimum."""

    def __init__(self, config: Any, preprocessing: Preprocessing) -> None:
        super().__init__(config, task="feature-extraction")
        self._preprocessing = preprocessing

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {"pixels": {0: "batch", 1: "height", 2: "width"}, "rows": {1: "height"}, "columns": {1: "width"}}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {"embedding": {0: "batch"}}

    def generate_dummy_inputs(self, framework: str = "pt", **_: Any) -> dict[str, torch.Tensor]:
        height, width = 40, 48  # all sizes differ, so that the tracer cannot take one for another
        rows, columns = resize_matrices(height, width, self._preprocessing.resize, self._preprocessing.crop)
        pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        arrays = {"pixels": pixels, "rows": rows.copy(), "columns": columns.copy()}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class _TextOnnxConfig(CLIPTextWithProjectionOnnxConfig):  # type: ignore[misc]
    """Names and shapes of TextTower's inputs and output for optimum."""

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {"input_ids": {0: "batch", 1: "length"}, "eos_position": {0: "batch"}}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {"embedding": {0: "batch"}}

    def generate_dummy_inputs(self, framework: str = "pt", **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(3 * 7).reshape(3, 7), "eos_position": torch.tensor([6, 4, 5])}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracer's and the optimizer's remarks off the user's terminal."""
    levels = {name: logging.getLogger(name).level for name in ("optimum", "onnxruntime", "torch.onnx")}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
