"""What people take today in place of clipmill, each as its users run it: JPEG bytes to a file of embeddings.

transformers' CLIPModel with its slow (PIL) and its fast (torchvision) image processor; open_clip with its own
transform; ONNX Runtime behind PIL as fastembed has it; OpenVINO behind PIL. All get the same images, already in memory,
and as many threads as there are usable CPUs; loading the model counts for none.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from measure import Contestant, timed, unit_rows
from numpy.typing import NDArray
from optimum.exporters.onnx.convert import export as optimum_export
from optimum.exporters.onnx.model_configs import CLIPVisionModelOnnxConfig
from PIL import Image
from transformers import CLIPImageProcessorFast, CLIPModel, CLIPVisionModelWithProjection

from engine.bundle import Preprocessing
from engine.decode import decode
from engine.machine import usable_cpus
from export.checkpoint import RANDOM_MODEL, Checkpoint

SLOW, FAST = "transformers, slow processor", "transformers, fast processor"
TORCH_BATCH = 32
FASTEMBED_BATCH = 16  # fastembed's default
OPENVINO_BATCH = 8  # its fastest on two CPUs
OPSET = 17

Embed = Callable[[Sequence[bytes]], NDArray[np.float32]]


def rivals(
    checkpoint: Checkpoint, preprocessing: Preprocessing, images: Sequence[bytes], folder: Path
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants, each of which leaves its embeddings in `folder`/<name>.npy, and why others do not take part."""
    absent = {name: "not installed" for name in ("open_clip", "openvino") if find_spec(name) is None}
    if checkpoint.name != RANDOM_MODEL:
        absent.setdefault("open_clip", f"has no {checkpoint.name}")
    onnx = _export_plain(checkpoint, folder / "plain.onnx")
    model = transformers_model(checkpoint)
    fast = CLIPImageProcessorFast.from_dict(checkpoint.processor.to_dict())
    works = {
        SLOW: _loop(images, TORCH_BATCH, _transformers(model, checkpoint.processor)),
        FAST: _loop(images, TORCH_BATCH, _transformers(model, fast)),
        "ONNX Runtime with PIL": _loop(images, FASTEMBED_BATCH, _onnx_runtime(onnx, preprocessing)),
    }
    if "open_clip" not in absent:
        works["open_clip"] = _loop(images, TORCH_BATCH, _open_clip())
    if "openvino" not in absent:
        works["OpenVINO with PIL"] = _openvino_loop(images, onnx, preprocessing)
    return {name: timed(_saving(work, folder / f"{name}.npy")) for name, work in works.items()}, absent


def transformers_model(checkpoint: Checkpoint) -> Any:
    """The CLIPModel that from_pretrained would give; the checkpoint's own computes attention as the export needs it."""
    model = CLIPModel._from_config(checkpoint.model.config, attn_implementation="sdpa").eval()
    model.load_state_dict(checkpoint.model.state_dict())
    return model


def _saving(work: Callable[[], NDArray[np.float32]], output: Path) -> Callable[[], None]:
    return lambda: np.save(output, work())


def _loop(images: Sequence[bytes], batch_size: int, embed: Embed) -> Callable[[], NDArray[np.float32]]:
    """One batch after the other, everything in its turn."""
    starts = range(0, len(images), batch_size)
    return lambda: np.concatenate([embed(images[start : start + batch_size]) for start in starts])


def _transformers(model: Any, processor: Any) -> Embed:
    def embed(images: Sequence[bytes]) -> NDArray[np.float32]:
        pictures = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
        with torch.inference_mode():
            features = model.get_image_features(pixel_values=processor(pictures, return_tensors="pt").pixel_values)
            return unit_rows(features.numpy())

    return embed


def _open_clip() -> Embed:
    """ViT-B/32 as OpenAI trained it, with weights of its own chance: its speed does not depend on them."""
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms("ViT-B-32-quickgelu", pretrained=None)
    model.eval()

    def embed(images: Sequence[bytes]) -> NDArray[np.float32]:
        pixels = torch.stack([transform(Image.open(io.BytesIO(image))) for image in images])
        with torch.inference_mode():
            return unit_rows(model.encode_image(pixels).numpy())

    return embed


def _onnx_runtime(onnx: Path, preprocessing: Preprocessing) -> Embed:
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    session = ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])

    def embed(images: Sequence[bytes]) -> NDArray[np.float32]:
        (features,) = session.run(None, {"pixel_values": _pixel_values(images, preprocessing)})
        return unit_rows(features)

    return embed


def _openvino_loop(
    images: Sequence[bytes], onnx: Path, preprocessing: Preprocessing
) -> Callable[[], NDArray[np.float32]]:
    """As OpenVINO's guide has it for throughput: several streams, fed by an asynchronous queue."""
    import openvino

    hints = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_NUM_THREADS": usable_cpus(),
        "INFERENCE_PRECISION_HINT": "f32",  # where the processor has bfloat16 it would take that
    }
    queue = openvino.AsyncInferQueue(openvino.Core().compile_model(onnx, "CPU", hints))
    batches: dict[int, NDArray[np.float32]] = {}

    def keep(request: Any, start: int) -> None:
        batches[start] = request.get_output_tensor().data.copy()

    queue.set_callback(keep)

    def work() -> NDArray[np.float32]:
        for start in range(0, len(images), OPENVINO_BATCH):
            queue.start_async([_pixel_values(images[start : start + OPENVINO_BATCH], preprocessing)], start)
        queue.wait_all()
        return unit_rows(np.concatenate([batches[start] for start in sorted(batches)]))

    return work


def _pixel_values(images: Sequence[bytes], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """(B, 3, S, S) float32: PIL's resize and crop, then normalised in NumPy."""
    levels = np.stack([decode(image, (preprocessing.resize, preprocessing.crop)) for image in images])
    mean, std = (np.array(values, dtype=np.float32) for values in (preprocessing.mean, preprocessing.std))
    pixels = (levels / np.float32(255) - mean) / std
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)


def _export_plain(checkpoint: Checkpoint, path: Path) -> Path:
    """transformers' vision tower with its projection, as optimum exports it: pixel_values in, image_embeds out."""
    tower = CLIPVisionModelWithProjection(checkpoint.model.config.vision_config).eval()
    tower.vision_model, tower.visual_projection = checkpoint.model.vision_model, checkpoint.model.visual_projection
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, of what is a constant here
        optimum_export(tower, _ProjectedOnnxConfig(tower.config, task="feature-extraction"), path, opset=OPSET)
    return path


class _ProjectedOnnxConfig(CLIPVisionModelOnnxConfig):  # type: ignore[misc]
    """optimum's own names the output before the projection."""

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {"image_embeds": {0: "batch_size"}}
