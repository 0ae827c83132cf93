"""Time to the first batch: seconds from the start of a process to its first 8 embeddings.

Each is a fresh process that imports, loads, embeds 8 images of the embedded sample and prints a line; the clock stops
there. transformers loads the same weights from a local folder, as `save_pretrained` leaves them. Files are in the page
cache and the bundle's checksums are remembered, as they are from the second use on. `cli.py --help` is timed beside
them: it loads nothing that it does not need.

    python benchmarks/start.py --rounds 2
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from bundles import PRECISIONS, bundles_option, get_bundle, model_option
from measure import Contestant, ratio, report, table, take_turns

from engine.datasets import open_dataset
from export.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 8
TRANSFORMERS = "transformers"
CLIPMILL_PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from engine.bundle import load_bundle
from engine.decode import decode
from engine.preprocess import image_feeds
from engine.session import Tower
bundle = load_bundle(sys.argv[1])
tower = Tower(bundle, "image", "cpu")
pixels = np.stack([decode(file) for file in map(Path, sys.argv[2:])])
print(tower.run(image_feeds(pixels, bundle.preprocessing)).shape)
"""
TRANSFORMERS_PROGRAM = """
import sys
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel
model = CLIPModel.from_pretrained(sys.argv[1])
processor = CLIPImageProcessor.from_pretrained(sys.argv[1])
inputs = processor([Image.open(file) for file in sys.argv[2:]], return_tensors="pt")
with torch.inference_mode():
    print(tuple(model.get_image_features(**inputs).shape))
"""


@click.command()
@click.option("--rounds", default=2, show_default=True, help="Starts of each.")
@model_option
@bundles_option
def main(rounds: int, model: str, bundles: Path | None) -> None:
    """Seconds from the start of a process to its first 8 embeddings."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        exported = {precision: get_bundle(model, precision, bundles or folder) for precision in PRECISIONS}
        checkpoint = load_checkpoint(model)
        for part in (checkpoint.model, checkpoint.processor):
            part.save_pretrained(folder / "checkpoint")
        files = []
        for sample in open_dataset("cifar10-sample", "test").samples(0, IMAGES):
            assert isinstance(sample.image, bytes)
            files.append(folder / f"{sample.row}.jpg")
            files[-1].write_bytes(sample.image)
        contestants = {TRANSFORMERS: _start("-c", TRANSFORMERS_PROGRAM, folder / "checkpoint", *files)}
        for precision, bundle in exported.items():
            contestants[f"clipmill {precision}"] = _start("-c", CLIPMILL_PROGRAM, bundle.path, *files)
        contestants["python cli.py --help"] = _start("cli.py", "--help")
        seconds = take_turns(contestants, rounds)
    found: dict[str, dict[str, Any]] = {
        name: {
            "seconds": {"median": statistics.median(taken), "slowest": max(taken), "fastest": min(taken)},
            "ratio_to_transformers": ratio(seconds[TRANSFORMERS], taken),
        }
        for name, taken in seconds.items()
    }
    rows = []
    for name, values in found.items():
        rows.append([name, *(f"{second:.2f}" for second in values["seconds"].values())])
        rows[-1].append(f"{values['ratio_to_transformers']:.2f}")
    body = table(["", "seconds", "slowest", "fastest", "x transformers"], rows)
    report("start", body, {"images": IMAGES, "rounds": rounds, "model": model, "contestants": found})


def _start(*arguments: str | Path) -> Contestant:
    """A process of its own, until its first line."""

    def contestant() -> float:
        began = time.perf_counter()
        with subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            taken = time.perf_counter() - began
            process.stdout.read()
        assert line, "it printed nothing"
        assert process.returncode == 0
        return taken

    return contestant


if __name__ == "__main__":
    main()
