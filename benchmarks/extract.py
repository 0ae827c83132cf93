"""End to end, JPEG bytes to embeddings on disk: clipmill against the loop that people write around transformers.

Both embed the same images with the same ViT-B/32 weights (random: speed does not depend on them), the same batch size
and the same number of threads, in turns, so that a noisy machine disturbs both alike. The loop is the usual one: PIL,
CLIPImageProcessor, CLIPModel in float32, np.save. Loading the model counts for neither.

    python benchmarks/extract.py --images 128 --rounds 5
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from machine_card import machine_card
from numpy.typing import NDArray
from PIL import Image

from engine.bundle import load_bundle
from engine.datasets import open_dataset
from engine.machine import usable_cpus
from engine.manifest import read_run
from engine.shards import embeddings_of
from engine.stream import Settings, extract
from export.to_onnx import export_bundle
from export.towers import RANDOM_MODEL, Checkpoint, load_checkpoint

BATCH_SIZE = 32


@click.command()
@click.option("--images", default=128, show_default=True, help="Images of the embedded sample, 32x32.")
@click.option("--rounds", default=5, show_default=True, help="Turns of each contestant.")
def main(images: int, rounds: int) -> None:
    """Measure images/s of clipmill and of a transformers loop, in turns."""
    card = machine_card()
    for name, value in card.items():
        click.echo(f"{name:<16} {value}")
    torch.set_num_threads(usable_cpus())
    with tempfile.TemporaryDirectory() as folder:
        export_bundle(RANDOM_MODEL, Path(folder, "bundle"))
        checkpoint = load_checkpoint(RANDOM_MODEL)
        seconds: dict[str, list[float]] = {"transformers": [], "clipmill": []}
        for turn in range(rounds + 1):
            for contestant in seconds:
                if contestant == "transformers":
                    taken, expected = _transformers(checkpoint, images, Path(folder, "loop.npy"))
                else:
                    taken, found = _clipmill(Path(folder, "bundle"), images, Path(folder, f"run-{turn}"))
                if turn:  # the first turn warms up
                    seconds[contestant].append(taken)
    speed = {name: images / statistics.median(times) for name, times in seconds.items()}
    cosine = float((expected * found).sum(axis=1).min())
    ratio = statistics.median(a / b for a, b in zip(seconds["transformers"], seconds["clipmill"], strict=True))
    click.echo(f"\n{'':<16} {'images/s':>9} {'slowest':>9} {'fastest':>9}")
    for name, times in seconds.items():
        click.echo(f"{name:<16} {speed[name]:>9.1f} {images / max(times):>9.1f} {images / min(times):>9.1f}")
    click.echo(f"ratio {ratio:.2f} (median of {rounds} turns), smallest cosine between the two {cosine:.7f}")
    result = {"images": images, "rounds": rounds, "images_per_second": speed, "ratio": ratio, "min_cosine": cosine}
    click.echo(json.dumps({"benchmark": "extract", "machine": card, **result}))


def _transformers(checkpoint: Checkpoint, images: int, output: Path) -> tuple[float, NDArray[np.float32]]:
    began = time.perf_counter()
    embeddings = []
    samples = list(open_dataset("cifar10-sample", "test", images).samples(0, images))
    with torch.inference_mode():
        for start in range(0, images, BATCH_SIZE):
            encoded = [sample.image for sample in samples[start : start + BATCH_SIZE]]
            pictures = [Image.open(io.BytesIO(image)).convert("RGB") for image in encoded if isinstance(image, bytes)]
            inputs = checkpoint.processor(pictures, return_tensors="pt")
            features = checkpoint.model.get_image_features(pixel_values=inputs.pixel_values)
            embeddings.append(torch.nn.functional.normalize(features, dim=-1).numpy())
    result = np.concatenate(embeddings)
    np.save(output, result)
    return time.perf_counter() - began, result


def _clipmill(bundle: Path, images: int, output: Path) -> tuple[float, NDArray[np.float32]]:
    dataset = open_dataset("cifar10-sample", "test", images)
    manifest = extract(load_bundle(bundle), dataset, output, Settings(provider="cpu", batch_size=BATCH_SIZE))
    return manifest["summary"]["seconds"], embeddings_of(read_run(output)[1])


if __name__ == "__main__":
    main()
