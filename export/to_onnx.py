"""Checkpoint -> bundle: each tower through optimum's exporter and ONNX Runtime's fusions, then certified."""

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
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.fusion_options import FusionOptions
from optimum.exporters.onnx.convert import export as optimum_export
from optimum.exporters.onnx.model_configs import CLIPTextWithProjectionOnnxConfig, CLIPVisionModelOnnxConfig
from torch import nn

from engine.bundle import Architecture, Bundle, Preprocessing, Source, Target, TowerName, describe_files, save_bundle
from engine.errors import ClipmillError
from engine.files import atomic_folder
from engine.machine import library_versions
from engine.preprocess import resize_matrices
from export.preprocess import read_preprocessing
from export.towers import Checkpoint, ImageTower, TextTower, load_checkpoint
from export.verify import certify

OPSET = 17
EXPORTING_LIBRARIES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "onnxruntime-gpu", "onnxruntime")


def export_bundle(model: str, output: Path, *, progress: Callable[[str], None] = lambda _: None) -> Bundle:
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
        for name in ("image", "text"):
            progress(f"exporting the {name} tower")
            _export_tower(checkpoint, name, preprocessing, folder / f"{name}.onnx")
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        bundle = Bundle(
            path=folder,
            source=Source(model, checkpoint.revision, checkpoint.weights_sha256, checkpoint.random_weights),
            architecture=architecture,
            preprocessing=preprocessing,
            target=Target(provider="cpu", precision="fp32"),
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


def _export_tower(checkpoint: Checkpoint, name: TowerName, preprocessing: Preprocessing, path: Path) -> None:
    """PyTorch module -> plain ONNX by optimum -> fused ONNX at `path`."""
    if name == "image":
        tower: nn.Module = ImageTower(checkpoint.model, list(preprocessing.mean), list(preprocessing.std))
        onnx_config: Any = _ImageOnnxConfig(tower.config, preprocessing)
    else:
        tower = TextTower(checkpoint.model)
        onnx_config = _TextOnnxConfig(tower.config, task="feature-extraction")
    plain = path.with_suffix(".plain.onnx")
    with _quiet():
        optimum_export(tower, onnx_config, plain, opset=OPSET, disable_dynamic_axes_fix=True)
        fused = optimizer.optimize_model(
            str(plain),
            model_type="clip",
            num_heads=tower.config.num_attention_heads,
            hidden_size=tower.config.hidden_size,
            optimization_options=FusionOptions("clip"),
            opt_level=0,
        )
    plain.unlink()
    attention = len(fused.get_nodes_by_op_type("Attention"))
    layers = tower.config.num_hidden_layers - (name == "image")  # its last layer is for the class token alone
    assert attention == layers, f"{attention} of {layers} attention layers fused: the exported pattern has changed"
    fused.save_model_to_file(str(path))  # not onnx.save: this one also declares the fused operators' domain


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
