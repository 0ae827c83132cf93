"""The bundles that benchmarks run, each exported once into a folder that they may share; and two ways to run one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
from measure import Contestant, timed
from numpy.typing import NDArray

from engine.bundle import Bundle, Target, load_bundle
from engine.datasets import Dataset
from engine.decode import decode
from engine.machine import usable_cpus
from engine.preprocess import image_feeds
from engine.session import Tower
from engine.stream import BATCH_SIZE, Settings, extract

PRECISIONS = ("fp32", "int8")

model_option = click.option(
    "--model", default="random-vit-b-32", show_default=True, help="What to measure, named as for `cli.py export`."
)
bundles_option = click.option(
    "--bundles",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of exported bundles; one that is missing is exported into it.  [default: a temporary folder]",
)


def get_bundle(model: str, precision: str, folder: Path) -> Bundle:
    """The CPU bundle of a model, from `folder`, or exported into it."""
    path = folder / (model if precision == "fp32" else f"{model}-{precision}")
    if path.exists():
        return load_bundle(path)
    from export.to_onnx import export_bundle  # ten seconds of imports, for which no benchmark of a ready bundle waits

    click.echo(f"exporting {model} in {precision}", err=True)
    return export_bundle(model, path, Target("cpu", precision))


def extraction(bundle: Bundle, dataset: Dataset, output: Path) -> Contestant:
    """The whole engine, with the settings that it chooses itself; its seconds begin when the session is open."""

    def contestant() -> float:
        manifest = extract(bundle, dataset, output, Settings(provider="cpu", overwrite=True))
        return float(manifest["summary"]["seconds"])

    return contestant


def bare_images(bundle: Bundle, images: Sequence[bytes | Path], resize: tuple[int, int] | None = None) -> Contestant:
    """The image tower alone on the batches and lanes of an extraction, decoded beforehand: what none can beat."""
    tower = Tower(bundle, "image", "cpu", threads=usable_cpus())
    pixels = np.stack([decode(image, resize) for image in images])
    size = BATCH_SIZE["cpu"]
    batches = [image_feeds(pixels[start : start + size], bundle.preprocessing) for start in range(0, len(pixels), size)]
    return bare_runs(tower.run, batches, tower.lanes)


def bare_runs(
    run: Callable[[Mapping[str, NDArray[Any]]], Any], batches: Sequence[Mapping[str, NDArray[Any]]], lanes: int
) -> Contestant:
    """`run`, such as a tower's, of ready batches from `lanes` threads, and nothing else."""

    def work() -> None:
        with ThreadPoolExecutor(lanes) as pool:
            for _ in pool.map(run, batches):
                pass

    return timed(work)
