"""The same twenty photographs of the embedded sample as each of the generic sources, and one row of it spoilt."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.datasets import cifar10_sample
from engine.decode import decode

PHOTOS = 20
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def photographs() -> list[tuple[int, bytes, int]]:
    """Row, JPEG and label; two of each class."""
    samples = cifar10_sample.load("test").samples(0, PHOTOS)
    return [(sample.row, sample.image, sample.label) for sample in samples]  # type: ignore[misc]


def make_folder(root: Path) -> str:
    for row, image, label in photographs():
        path = root / "photos" / CLASSES[label] / f"{row:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return f"folder:{root}/photos"


def make_tars(root: Path) -> str:
    for number in range(2):
        with tarfile.open(root / f"photos-{number}.tar", "w") as tar:
            for row, image, label in photographs()[number * 10 : number * 10 + 10]:
                for suffix, content in (("cls", b"%d" % label), ("jpg", image)):
                    member = tarfile.TarInfo(f"{row:02d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (root / "classnames.txt").write_text("\n".join(CLASSES))
    return f"wds:{root}/photos-{{0..1}}.tar"


def make_parquet(root: Path) -> str:
    rows, images, labels = zip(*photographs(), strict=True)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(CLASSES)}}
    table = pa.table(
        {"image": [{"bytes": image, "path": f"{row}.jpg"} for row, image in zip(rows, images, strict=True)]}
    ).append_column("label", pa.array(labels, pa.int64()))
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), root / "photos.parquet", row_group_size=6)
    return f"parquet:{root}/photos.parquet"


def make_npy(root: Path) -> str:
    _, images, labels = zip(*photographs(), strict=True)
    np.save(root / "photos.npy", np.stack([decode(image) for image in images]))
    np.save(root / "photos-labels.npy", np.array(labels))
    return f"npy:{root}/photos.npy"


def make_list(root: Path) -> str:
    make_folder(root)
    lines = [f"photos/{CLASSES[label]}/{row:02d}.jpg,{CLASSES[label]}" for row, _, label in photographs()]
    (root / "photos.csv").write_text("\n".join(["path,label", *lines]))
    return f"list:{root}/photos.csv"


def spoil_folder(root: Path) -> None:
    (root / "photos/cat/03.jpg").write_bytes(b"no picture")


def spoil_tars(root: Path) -> None:
    with tarfile.open(root / "photos-0.tar") as tar:
        offset = tar.getmember("03.jpg").offset
    with (root / "photos-0.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 512)


def spoil_parquet(root: Path) -> None:
    table = pq.read_table(root / "photos.parquet")
    labels = [99 if row == 3 else label for row, label in enumerate(table["label"].to_pylist())]
    pq.write_table(table.set_column(1, "label", pa.array(labels, pa.int64())), root / "photos.parquet")


def spoil_npy(root: Path) -> None:
    labels = np.load(root / "photos-labels.npy")
    labels[3] = -1
    np.save(root / "photos-labels.npy", labels)


def spoil_list(root: Path) -> None:
    (root / "photos/cat/03.jpg").unlink()


SOURCES: dict[str, tuple[Callable[[Path], str], str, Callable[[Path], None], str]] = {
    # makes it in a folder and names it, the key of row 3, spoils one row, the class of the reject
    "folder": (make_folder, "automobile/11.jpg", spoil_folder, "not-an-image"),
    "wds": (make_tars, "03", spoil_tars, "corrupt-member"),
    "parquet": (make_parquet, "photos.parquet#3", spoil_parquet, "bad-label"),
    "npy": (make_npy, "photos.npy#3", spoil_npy, "missing-label"),
    "list": (make_list, "photos/cat/03.jpg", spoil_list, "unreadable"),
}
