"""End to end, JPEG bytes to embeddings on disk, 32x32 images: clipmill against what people take today (rivals.py).

All embed the same images with the same ViT-B/32 weights on the same number of threads. Loading the model counts for
none. "bare" is the image tower alone, on the very batches and lanes of clipmill's run, their pixels decoded
beforehand: the pipeline around it should cost next to nothing. Cosines are to transformers with its slow processor.

    python benchmarks/extract.py --images 64 --rounds 3
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bundles import PRECISIONS, bare_images, bundles_option, extraction, get_bundle, model_option
from measure import ratio, report, speeds, table, take_turns
from numpy.typing import NDArray
from rivals import FAST, SLOW, rivals

from engine.datasets import open_dataset
from engine.machine import usable_cpus
from engine.manifest import read_run
from engine.shards import embeddings_of
from export.checkpoint import load_checkpoint
from export.verify import cosines

COSINES = ("min_cosine", "mean_cosine", "min_centred_cosine", "mean_centred_cosine")
HEADER = ("", "images/s", "slowest", "fastest", "x slow", "x fast", "min cos", "mean", "centred min", "mean")


@click.command()
@click.option("--images", default=64, show_default=True, help="Images of the embedded sample.")
@click.option("--rounds", default=3, show_default=True, help="Turns of each contestant.")
@model_option
@bundles_option
def main(images: int, rounds: int, model: str, bundles: Path | None) -> None:
    """Images/s of clipmill, and of what people take today, end to end."""
    torch.set_num_threads(usable_cpus())
    dataset = open_dataset("cifar10-sample", "test", images)
    encoded = [sample.image for sample in dataset.samples(0, images) if isinstance(sample.image, bytes)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        exported = {precision: get_bundle(model, precision, bundles or folder) for precision in PRECISIONS}
        contestants, absent = rivals(load_checkpoint(model), exported["fp32"].preprocessing, encoded, folder)
        for precision, bundle in exported.items():
            contestants[f"clipmill {precision}"] = extraction(bundle, dataset, folder / f"clipmill {precision}")
            contestants[f"bare {precision}"] = bare_images(bundle, encoded)
        seconds = take_turns(contestants, rounds)
        embeddings = {name: _embeddings(folder, name) for name in contestants if _has_its_weights(name)}
    found: dict[str, dict[str, Any]] = {
        name: {
            "images_per_second": speeds(images, taken),
            "ratio_to_slow": ratio(seconds[SLOW], taken),
            "ratio_to_fast": ratio(seconds[FAST], taken),
            **(cosines(embeddings[name], embeddings[SLOW]) if name in embeddings else {}),
        }
        for name, taken in seconds.items()
    }
    over_bare = {
        precision: ratio(seconds[f"clipmill {precision}"], seconds[f"bare {precision}"]) - 1 for precision in PRECISIONS
    }
    result = {"images": images, "rounds": rounds, "model": model, "contestants": found}
    report("extract", _body(found, absent, over_bare), {**result, "absent": absent, "over_bare": over_bare})


def _has_its_weights(name: str) -> bool:
    """Whether a contestant writes embeddings of the same weights."""
    return not name.startswith("bare") and name != "open_clip"


def _embeddings(folder: Path, name: str) -> NDArray[np.float32]:
    if name.startswith("clipmill"):
        return embeddings_of(read_run(folder / name)[1])
    loaded: NDArray[np.float32] = np.load(folder / f"{name}.npy")
    return loaded


def _body(found: dict[str, dict[str, Any]], absent: dict[str, str], over_bare: dict[str, float]) -> str:
    rows = []
    for contestant, values in found.items():
        ratios = [f"{values[key]:.2f}" for key in ("ratio_to_slow", "ratio_to_fast")]
        similar = [f"{values[name]:.6f}" if name in values else "" for name in COSINES]
        rows.append([contestant, *values["images_per_second"].values(), *ratios, *similar])
    notes = [f"{name}: {reason}" for name, reason in absent.items()]
    notes += [
        f"clipmill {precision} takes {cost:+.1%} against bare {precision}" for precision, cost in over_bare.items()
    ]
    return "\n".join([table(HEADER, rows), "", *notes])


if __name__ == "__main__":
    main()
