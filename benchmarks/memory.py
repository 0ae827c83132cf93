"""Peak memory of an extraction, however long: of the embedded sample repeated, and of webdataset tars of large images.

Memory should not grow with the dataset, though a run shorter than a shard holds less: the rows of one shard are kept
until it is written. Each extraction is a process of its own, `cli.py extract` as users run it, on the embedded model,
which is the fastest; a source is compared with the smallest of its kind. The repeated sample is one Parquet file in
small row groups. The tars hold JPEGs of 1 MB; a large set is one tar under many names (hard links), so it takes no room
on disk, but each is indexed, opened and read as a tar of its own. The cache is empty each time: the index pass counts.

    python benchmarks/memory.py --images 2000 --images 20000 --images 100000 --tars 1 --tars 10
"""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bundles import bundles_option, get_bundle
from measure import report, table
from PIL import Image

from engine.bundle import Bundle
from engine.datasets import open_dataset

ROOT = Path(__file__).resolve().parents[1]
ROW_GROUP = 1000
TAR_IMAGES = 100  # more than are between the stages, so that one tar fills every queue too


@click.command()
@click.option("--images", multiple=True, default=(2_000, 20_000, 100_000), show_default=True, help="Rows, ascending.")
@click.option("--tars", multiple=True, default=(1, 10), show_default=True, help="Tars of 100 MB, ascending.")
@bundles_option
def main(images: tuple[int, ...], tars: tuple[int, ...], bundles: Path | None) -> None:
    """Peak memory of extractions of growing size."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = get_bundle("mini", "fp32", bundles or folder)
        _write_tar(folder / "0.tar")
        for number in range(1, max(tars)):
            os.link(folder / "0.tar", folder / f"{number}.tar")
        kinds = {
            "repeated sample": [f"parquet:{_write_parquet(folder / f'{rows}.parquet', rows)}" for rows in images],
            "tars of 1 MB images": [f"wds:{folder}/{{0..{count - 1}}}.tar" for count in tars],
        }
        found = {kind: [_extract(bundle, source, folder) for source in sources] for kind, sources in kinds.items()}
    rows = []
    for kind, summaries in found.items():
        for summary in summaries:
            summary["ratio_to_smallest"] = summary["peak_rss_bytes"] / summaries[0]["peak_rss_bytes"]
            figures = (f"{summary['peak_rss_bytes'] / 2**20:.1f}", f"{summary['ratio_to_smallest']:.3f}")
            rows.append([kind, summary["images"], f"{summary['seconds']:.1f}", *figures])
    body = table(["", "images", "seconds", "peak MiB", "x smallest"], rows)
    report("memory", body, {"extractions": found})


def _write_parquet(path: Path, rows: int) -> Path:
    """The embedded sample's 5,000 JPEGs, over and over."""
    samples = open_dataset("cifar10-sample", "all").samples(0, rows)
    images = itertools.cycle([sample.image for sample in samples])
    with pq.ParquetWriter(path, pa.schema({"image": pa.binary()})) as writer:
        for start in range(0, rows, ROW_GROUP):
            group = list(itertools.islice(images, min(ROW_GROUP, rows - start)))
            writer.write_table(pa.table({"image": pa.array(group, pa.binary())}))
    return path


def _write_tar(path: Path) -> None:
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(TAR_IMAGES):
            # Noise is what JPEG compresses least: 1 MB in the fewest pixels.
            jpeg = io.BytesIO()
            pixels = random.integers(0, 256, (560, 560, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(jpeg, "JPEG", quality=98, subsampling=0)
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = jpeg.tell()
            jpeg.seek(0)
            tar.addfile(member, jpeg)


def _extract(bundle: Bundle, source: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "cli.py", "extract", "--dataset", source, "--model", str(bundle.path)]
    command += ["--provider", "cpu", "--overwrite", "--output", str(folder / "run"), "--json"]
    click.echo(f"extracting {source}", err=True)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    summary = json.loads(done.stdout)["summary"]
    return {name: summary[name] for name in ("images", "seconds", "bound_by", "peak_rss_bytes")}


if __name__ == "__main__":
    main()
