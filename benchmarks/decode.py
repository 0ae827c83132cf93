"""Decoding alone, images a second by worker threads; then what it costs an extraction from a folder of JPEGs.

The photographs are the embedded sample's, enlarged by PIL: smoother, so quicker to decode, than a camera's of their
size. A folder's images may be of any size, so its extraction resizes them on the host, beside the session; it should be
as fast as the slower of decoding alone and session alone, which is the ratio 1.

    python benchmarks/decode.py --images 320 --folder-images 64 --rounds 3
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from bundles import PRECISIONS, bare_images, bundles_option, extraction, get_bundle, model_option
from measure import Contestant, ratio, report, speeds, table, take_turns, timed
from PIL import Image

from engine.bundle import Bundle
from engine.datasets import open_dataset
from engine.decode import decode
from engine.machine import usable_cpus
from engine.stream import BATCH_SIZE

SIZES = {  # (width, height) of the JPEGs, and decode()'s (shortest edge, crop)
    "32x32": ((32, 32), None),
    "224x224": ((224, 224), None),
    "500x375, resized to 224x224": ((500, 375), (224, 224)),
}
FOLDER_SIZE = (224, 224)
JPEG_QUALITY = 90


@click.command()
@click.option("--images", default=320, show_default=True, help="JPEGs of each size to decode.")
@click.option("--folder-images", default=64, show_default=True, help="JPEGs in the folder that is extracted.")
@click.option("--rounds", default=3, show_default=True, help="Turns of each contestant.")
@model_option
@bundles_option
def main(images: int, folder_images: int, rounds: int, model: str, bundles: Path | None) -> None:
    """Images/s of decoding, and of a folder's extraction against decoding and session alone."""
    worker_counts = sorted({1, usable_cpus()})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        contestants = {}
        for name, (size, resize) in SIZES.items():
            files = _write_jpegs(folder / name, size, images)
            for workers in worker_counts:
                contestants[name, workers] = _decoding(files, resize, workers)
        seconds = take_turns(contestants, rounds)
        files = _write_jpegs(folder / "photographs", FOLDER_SIZE, folder_images)
        exported = {precision: get_bundle(model, precision, bundles or folder) for precision in PRECISIONS}
        claims = {precision: _folder_claim(bundle, files, rounds) for precision, bundle in exported.items()}
    decoded = {key: speeds(images, taken) for key, taken in seconds.items()}
    decoding = table(
        ["decode, images/s", *(f"workers: {workers}" for workers in worker_counts)],
        [[name, *(decoded[name, workers]["median"] for workers in worker_counts)] for name in SIZES],
    )
    names = ("decode alone", "session alone", "extract")
    extracting = table(
        ["folder of 224x224, images/s", *names, "ratio"],
        [
            [precision, *(claim[name]["median"] for name in names), f"{claim['ratio']:.3f}"]
            for precision, claim in claims.items()
        ],
    )
    result = {
        "images": images,
        "folder_images": folder_images,
        "rounds": rounds,
        "model": model,
        "decode": [
            {"jpeg": name, "workers": workers, "images_per_second": found} for (name, workers), found in decoded.items()
        ],
        "folder": claims,
    }
    report("decode", f"{decoding}\n\n{extracting}\n\nratio: extract to the slower of the other two", result)


def _write_jpegs(folder: Path, size: tuple[int, int], images: int) -> list[Path]:
    folder.mkdir()
    files = []
    for sample in open_dataset("cifar10-sample", "all", images).samples(0, images):
        files.append(folder / f"{sample.row:06d}.jpg")
        if isinstance(sample.image, bytes) and size == (32, 32):
            files[-1].write_bytes(sample.image)
        else:
            picture = Image.fromarray(decode(sample.image)).resize(size, Image.Resampling.BICUBIC)
            picture.save(files[-1], quality=JPEG_QUALITY)
    return files


def _decoding(files: Sequence[Path], resize: tuple[int, int] | None, workers: int) -> Contestant:
    """A batch a worker at a time, as the engine decodes."""
    batches = [files[start : start + BATCH_SIZE["cpu"]] for start in range(0, len(files), BATCH_SIZE["cpu"])]

    def decode_batch(batch: Sequence[Path]) -> None:
        for file in batch:
            decode(file, resize)

    def work() -> None:
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(decode_batch, batches):
                pass

    return timed(work)


def _folder_claim(bundle: Bundle, files: Sequence[Path], rounds: int) -> dict[str, Any]:
    """Speeds of decoding alone, of the session alone and of the extraction; how near it comes to the slower one."""
    folder, resize = files[0].parent, (bundle.preprocessing.resize, bundle.preprocessing.crop)
    contestants = {
        "decode alone": _decoding(files, resize, usable_cpus()),
        "session alone": bare_images(bundle, files, resize),
        "extract": extraction(bundle, open_dataset(f"folder:{folder}"), folder.parent / f"run-{bundle.name}"),
    }
    seconds = take_turns(contestants, rounds)
    slower = [max(alone) for alone in zip(seconds["decode alone"], seconds["session alone"], strict=True)]
    return {
        **{name: speeds(len(files), taken) for name, taken in seconds.items()},
        "ratio": ratio(slower, seconds["extract"]),
    }


if __name__ == "__main__":
    main()
