"""Peak memory of an extraction from webdataset tars, for 100 MB and for a hundred times as much: they should be one.

The tars hold JPEGs of 1 MB. The large source is the small one's tar under a hundred names (hard links), so it takes no
room on disk; every name is indexed, opened and read as a tar of its own. Each extraction is a process of its own, with
the embedded model and an empty cache folder, so the peak covers the index pass too. Linux only: it reads /proc.

    python benchmarks/webdataset_memory.py --tars 100
"""

from __future__ import annotations

import io
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
from machine_card import machine_card
from PIL import Image

from export.to_onnx import export_bundle

IMAGES = 100  # in the tar; more than are between the stages at batches of 8, so that one tar fills every queue too
EXTRACT = """
import json, sys
from pathlib import Path
from engine.bundle import load_bundle
from engine.datasets.webdataset import load
from engine.stream import Settings, extract
bundle, pattern, output = sys.argv[1:]
dataset = load(pattern)
summary = extract(load_bundle(Path(bundle)), dataset, Path(output), Settings(provider="cpu", batch_size=8))["summary"]
# getrusage(), and so the summary, counts what the process that started this one held
status = Path("/proc/self/status").read_text().splitlines()
summary["peak_rss_bytes"] = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
print(json.dumps(summary))
"""


@click.command()
@click.option("--tars", default=100, show_default=True, help="Names that the large source has for the 100 MB tar.")
def main(tars: int) -> None:
    """Measure the peak memory of one tar and of many."""
    card = machine_card()
    for name, value in card.items():
        click.echo(f"{name:<16} {value}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_bundle("mini", folder / "bundle")
        size = _write_tar(folder / "0.tar")
        for number in range(1, tars):
            os.link(folder / "0.tar", folder / f"{number}.tar")
        one = _extract(folder, "0.tar", "one")
        many = _extract(folder, f"{{0..{tars - 1}}}.tar", "many")
    click.echo(f"\n{'tars':>6} {'GB':>8} {'images':>8} {'seconds':>8} {'peak MiB':>9}")
    for count, found in ((1, one), (tars, many)):
        click.echo(
            f"{count:>6} {count * size / 1e9:>8.2f} {found['images']:>8} {found['seconds']:>8.1f} "
            f"{found['peak_rss_bytes'] / 2**20:>9.1f}"
        )
    ratio = many["peak_rss_bytes"] / one["peak_rss_bytes"]
    click.echo(f"\nthe large source takes {ratio:.3f} times the memory of the small one\n")
    click.echo(
        json.dumps({"benchmark": "webdataset_memory", "machine": card, "one": one, "many": many, "ratio": ratio})
    )


def _write_tar(path: Path) -> int:
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(IMAGES):
            # Noise is what JPEG compresses least: 1 MB in the fewest pixels.
            jpeg = io.BytesIO()
            pixels = random.integers(0, 256, (560, 560, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(jpeg, "JPEG", quality=98, subsampling=0)
            for suffix, content in (("cls", b"%d" % (number % 10)), ("jpg", jpeg.getvalue())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path.stat().st_size


def _extract(folder: Path, pattern: str, name: str) -> dict[str, Any]:
    command = [sys.executable, "-c", EXTRACT, *(str(folder / part) for part in ("bundle", pattern, name))]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / f"cache-{name}")}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    summary = json.loads(done.stdout)
    return {key: summary[key] for key in ("images", "seconds", "images_per_second", "peak_rss_bytes", "bound_by")}


if __name__ == "__main__":
    main()
