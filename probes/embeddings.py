"""Runs and text tables as arrays, and whether two of them may be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.errors import ClipmillError
from engine.files import sha256_json
from engine.manifest import read_manifest, read_run, run_embeddings
from engine.shards import embeddings_of, read_table


@dataclass(frozen=True)
class ImageEmbeddings:
    """A complete, verified run."""

    path: Path
    X: NDArray[Any]  # (N, dim) float32 or float16 unit rows
    y: NDArray[np.int64]  # (N,) labels, -1 where unknown
    keys: list[str]
    class_names: tuple[str, ...]
    classes: tuple[int, ...]  # the labels to decide between: all, or those that the run was cut down to
    dataset: str
    split: str
    bundle: str  # fingerprint
    bundle_name: str
    digest: str  # sha256 over those of the shards: the same embeddings, keys and labels

    def decided(self) -> list[str]:
        """The names of `classes`; ClipmillError where there are none."""
        if not self.classes:
            raise ClipmillError(f"the run at {self.path} has no classes, so there is nothing to decide between")
        return [self.class_names[label] for label in self.classes]

    def positions(self) -> NDArray[np.int64]:
        """(N,) the position of each label in `classes`, -1 where it is unknown."""
        position = np.full(len(self.class_names) + 1, -1)
        position[list(self.classes)] = np.arange(len(self.classes))
        return position[self.y]  # the label -1 takes the last, which stays -1


@dataclass(frozen=True)
class RunBlocks:
    """A complete run to be read block by block, however large it is."""

    path: Path
    bundle: str  # fingerprint
    bundle_name: str

    def embeddings(self) -> Iterator[NDArray[Any]]:
        """Blocks (n, dim) of unit rows; the shards are verified first."""
        return run_embeddings(self.path)


@dataclass(frozen=True)
class TextEmbeddings:
    """Prompts and their embeddings."""

    prompts: list[str]
    X: NDArray[Any]  # (K, dim) unit rows, in the order of the prompts
    bundle: str  # fingerprint


def load_run(path: str | Path) -> ImageEmbeddings:
    """Read a run folder; ClipmillError when it is none, is incomplete or damaged, or holds no row."""
    path = Path(path).expanduser()
    manifest, table = read_run(path)
    if table.num_rows == 0:
        raise ClipmillError(f"the run at {path} holds no embedding: all of its images were rejected")
    metadata = _metadata(table, path)
    class_names = tuple(json.loads(metadata["class_names"]))
    return ImageEmbeddings(
        path=path,
        X=embeddings_of(table),
        y=pc.fill_null(table.column("label"), -1).to_numpy().astype(np.int64),
        keys=table.column("key").to_pylist(),
        class_names=class_names,
        classes=tuple(json.loads(metadata["classes"])) if "classes" in metadata else tuple(range(len(class_names))),
        dataset=metadata["dataset"],
        split=metadata["split"],
        bundle=metadata["bundle"],
        bundle_name=manifest["bundle"]["name"],
        digest=sha256_json([shard["sha256"] for shard in manifest["shards"]]),
    )


def open_run(path: str | Path) -> RunBlocks:
    """A run folder whose embeddings are not read yet; ClipmillError when it is none."""
    path = Path(path).expanduser()
    manifest = read_manifest(path)
    return RunBlocks(path, manifest["fingerprint"]["bundle"], manifest["bundle"]["name"])


def load_text_table(path: str | Path) -> TextEmbeddings:
    """Read a table that `embed-text` wrote; ClipmillError when it is none."""
    path = Path(path).expanduser()
    table = read_table(path)
    if not {"prompt", "embedding"} <= set(table.column_names):
        raise ClipmillError(f"{path} is no table of prompts: make one with `python cli.py embed-text`")
    return TextEmbeddings(table.column("prompt").to_pylist(), embeddings_of(table), _metadata(table, path)["bundle"])


def require_same_bundle(first: ImageEmbeddings | RunBlocks, second: ImageEmbeddings | TextEmbeddings) -> None:
    """ClipmillError unless both come from one bundle: embeddings of different models have nothing in common."""
    if first.bundle != second.bundle:
        what = f"the run at {second.path}" if isinstance(second, ImageEmbeddings) else "the text embeddings"
        raise ClipmillError(
            f"{what} and the run at {first.path} come from different bundles ({second.bundle[:12]} and "
            f"{first.bundle[:12]}): embed both with the same --model"
        )


def require_same_classes(train: ImageEmbeddings, test: ImageEmbeddings) -> None:
    """ClipmillError unless a label means the same class in both runs."""
    if train.class_names != test.class_names:
        raise ClipmillError(
            f"the runs at {train.path} and {test.path} have different classes ({_short(train.class_names)} and "
            f"{_short(test.class_names)}): --train and --test must come from the same dataset"
        )
    if train.classes != test.classes:
        names = [_short(tuple(run.class_names[label] for label in run.classes)) for run in (train, test)]
        raise ClipmillError(
            f"the runs at {train.path} and {test.path} are cut down to different classes ({' and '.join(names)}): "
            "extract both with the same --classes"
        )


def _metadata(table: pa.Table, path: Path) -> dict[str, str]:
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if "bundle" not in metadata:
        raise ClipmillError(f"{path} was not written by clipmill: its schema names no bundle")
    return metadata


def _short(names: tuple[str, ...]) -> str:
    return f"{len(names)}: {', '.join(names[:3])} ..." if len(names) > 3 else ", ".join(names) or "none"
