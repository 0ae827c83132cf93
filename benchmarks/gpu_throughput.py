"""Images a second, JPEG bytes to embeddings, on one device: clipmill's bundles against transformers in fp16.

transformers is run as its users would for speed: the fast image processor on the GPU, the model in fp16 with PyTorch's
own fused attention, large batches. "forward alone" is its model on pixels that are on the GPU already: no loop around
it can be faster. clipmill's time is that of an extraction, with everything written to disk; its stages follow. All get
the 32x32 JPEGs of the embedded sample, and nobody's loading counts.

    python benchmarks/gpu_throughput.py models/clip-vit-base-patch32-cuda-fp16
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from measure import Contestant, ratio, report, speeds, table, take_turns, timed
from PIL import Image
from rivals import transformers_model
from transformers import CLIPImageProcessorFast

from engine.bundle import Bundle, load_bundle
from engine.datasets import Dataset, open_dataset
from engine.manifest import read_manifest
from engine.stream import Settings, extract
from export.checkpoint import Checkpoint, load_checkpoint

BATCH_SIZE = 256  # of transformers, and what clipmill takes on a GPU with memory enough
LOOP, FORWARD = "transformers fp16", "transformers fp16, forward alone"


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--images", default=5_000, show_default=True, help="Images of the embedded sample.")
@click.option("--rounds", default=5, show_default=True, help="Turns of each contestant.")
def main(bundles: tuple[Path, ...], images: int, rounds: int) -> None:
    """Images/s of BUNDLES, each on the provider that it is made for, and of transformers."""
    loaded = [load_bundle(path) for path in bundles]
    device = "cpu" if loaded[0].target.provider == "cpu" else "cuda"
    dataset = open_dataset("cifar10-sample", "all", images)
    encoded = [sample.image for sample in dataset.samples(0, images) if isinstance(sample.image, bytes)]
    contestants = _transformers(load_checkpoint(loaded[0].source.model), encoded, device)
    with tempfile.TemporaryDirectory() as temporary:
        runs = {_name(bundle): Path(temporary) / _name(bundle) for bundle in loaded}
        for bundle in loaded:
            contestants[_name(bundle)] = _extraction(bundle, dataset, runs[_name(bundle)])
        seconds = take_turns(contestants, rounds)
        stages = {name: read_manifest(run)["summary"]["stages"] for name, run in runs.items()}
    speed = {name: speeds(images, taken) for name, taken in seconds.items()}
    rows = [[name, *found.values(), f"{ratio(seconds[LOOP], seconds[name]):.2f}"] for name, found in speed.items()]
    busy = [[name, *(clock["busy"] for clock in found.values())] for name, found in stages.items()]
    body = "\n\n".join(
        (
            table(["", "images/s", "slowest", "fastest", "x transformers"], rows),
            table(["busy seconds of a stage", *next(iter(stages.values()))], busy),
        )
    )
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    report("gpu_throughput", body, {"gpu": gpu, "images": images, "rounds": rounds, "speeds": speed, "stages": stages})


def _name(bundle: Bundle) -> str:
    return f"clipmill {bundle.target.provider} {bundle.target.precision}"


def _extraction(bundle: Bundle, dataset: Dataset, output: Path) -> Contestant:
    """The seconds of an extraction begin when its session is open, and TensorRT's engine built."""

    def contestant() -> float:
        manifest = extract(bundle, dataset, output, Settings(provider=bundle.target.provider, overwrite=True))
        return float(manifest["summary"]["seconds"])

    return contestant


def _transformers(checkpoint: Checkpoint, images: Sequence[bytes], device: str) -> dict[str, Contestant]:
    model = transformers_model(checkpoint).half().to(device)
    processor = CLIPImageProcessorFast.from_dict(checkpoint.processor.to_dict())
    batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]

    def pixel_values(batch: Sequence[bytes]) -> Any:
        pictures = [Image.open(io.BytesIO(image)).convert("RGB") for image in batch]
        return processor(pictures, return_tensors="pt", device=device).pixel_values.half()

    def embed(pixels_of: Callable[[Sequence[bytes]], Any]) -> Callable[[], None]:
        def work() -> None:
            with torch.inference_mode():
                for batch in batches:
                    features = model.get_image_features(pixel_values=pixels_of(batch))
                    torch.nn.functional.normalize(features.float(), dim=-1).cpu()  # which waits for the GPU

        return work

    ready = pixel_values(batches[0])
    return {LOOP: timed(embed(pixel_values)), FORWARD: timed(embed(lambda batch: ready[: len(batch)]))}


if __name__ == "__main__":
    main()
