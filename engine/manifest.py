"""A run on disk: its plan, what makes it this run, which shards are committed, and when it is complete.

    runs/<name>/  part-00000.parquet ...  rejects.parquet (only if any)  manifest.json

The plan is known before the first image is decoded: shard k holds the source rows k * shard_size and on. While a run is
under way, each finished shard has a commit record in commits/; manifest.json says complete, and commits/ goes, only
when written + rejected = planned. Running the same command again does only the shards that have no commit record.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from engine.bundle import Bundle
from engine.errors import ClipmillError
from engine.files import read_json, sha256_file, write_json
from engine.shards import Reject, embedding_blocks, read_table, reject_table, write_table

FORMAT_VERSION = 1
OWN_FILES = ("part-[0-9]*", "rejects.parquet", ".part-[0-9]*.tmp", ".rejects.parquet.*.tmp", ".manifest.json.*.tmp")


@dataclass(frozen=True)
class ShardRange:
    """The source rows start <= row < stop, and the file they go to."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class Run:
    """A run folder, opened to be written. `fingerprint`: every setting that its bytes depend on, by name."""

    path: Path
    rows: int
    shard_size: int
    suffix: str  # of the shards: "parquet" or "arrow"
    fingerprint: Mapping[str, Any]
    bundle: Mapping[str, str]  # name and source model, to find the bundle again

    def plan(self) -> list[ShardRange]:
        starts = range(0, self.rows, self.shard_size)
        return [
            ShardRange(f"part-{index:05d}.{self.suffix}", start, min(start + self.shard_size, self.rows))
            for index, start in enumerate(starts)
        ]

    def open(self, *, overwrite: bool) -> list[ShardRange]:
        """Make or take up the folder; the shards still to be done.

        With `overwrite` a run in the folder loses its files, and only those: what else lies there stays.
        Raises ClipmillError when the folder holds another run (the first field that differs is named) or other files.
        """
        if not _holds_run(self.path):
            if self.path.exists() and not self._is_vacant():
                raise ClipmillError(f"{self.path} exists and holds no run: choose another --output")
            self._save("running", {})
        elif overwrite:
            _remove(self.path / "commits")  # first: nothing of the other run may count as this one's
            self._save("running", {})
        else:
            self._refuse_other(read_manifest(self.path))
        if self.complete:
            _remove(self.path / "commits")  # a crash at the very end left it
            return []
        pending = [shard for shard in self.plan() if not self._committed(shard)]
        committed = {shard.file for shard in self.plan()} - {shard.file for shard in pending}
        for pattern in OWN_FILES:
            for file in self.path.glob(pattern):
                if file.name not in committed:  # of the run replaced, or of a crash
                    _remove(file)
        return pending

    @property
    def complete(self) -> bool:
        return bool(read_manifest(self.path)["status"] == "complete")

    def commit(self, shard: ShardRange, table: pa.Table, rejects: Sequence[Reject], seconds: float) -> None:
        """Write a shard, then the record that makes it part of the run."""
        path = self.path / shard.file
        write_table(path, table)
        record = {
            **dataclasses.asdict(shard),
            "rows": table.num_rows,
            "rejects": len(rejects),
            "sha256": sha256_file(path),
            "bytes": path.stat().st_size,
            "seconds": round(seconds, 3),
        }
        write_json(self._commit_file(shard), {"shard": record, "rejects": [vars(reject) for reject in rejects]})

    def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Gather the commit records into manifest.json and rejects.parquet; the finished manifest."""
        records = [read_json(self._commit_file(shard)) for shard in self.plan()]
        shards = [record["shard"] for record in records]
        rejects = [Reject(**reject) for record in records for reject in record["rejects"]]
        written = sum(shard["rows"] for shard in shards)
        assert written + len(rejects) == self.rows, f"{written} + {len(rejects)} rejected, but {self.rows} planned"
        if rejects:
            write_table(self.path / "rejects.parquet", reject_table(rejects))
        manifest = self._save(
            "complete", {"written": written, "rejected": len(rejects), "shards": shards, "summary": dict(summary)}
        )
        _remove(self.path / "commits")
        return manifest

    def _save(self, status: str, results: Mapping[str, Any]) -> dict[str, Any]:
        manifest = {
            "format_version": FORMAT_VERSION,
            "status": status,
            "engine_version": importlib.metadata.version("clipmill"),
            "bundle": dict(self.bundle),
            "fingerprint": json.loads(json.dumps(self.fingerprint)),
            "plan": {"rows": self.rows, "shard_size": self.shard_size},
            **results,
        }
        write_json(self.path / "manifest.json", manifest)
        return manifest

    def _refuse_other(self, manifest: Mapping[str, Any]) -> None:
        stored, mine = manifest["fingerprint"], json.loads(json.dumps(self.fingerprint))
        for name in {**stored, **mine}:
            if stored.get(name) != mine.get(name):
                raise ClipmillError(
                    f"{self.path} holds a run with another {name} ({_short(stored.get(name))}, now "
                    f"{_short(mine.get(name))}): choose another --output, or replace it with --overwrite"
                )

    def _committed(self, shard: ShardRange) -> bool:
        record, path = self._commit_file(shard), self.path / shard.file
        return record.exists() and path.exists() and read_json(record)["shard"]["sha256"] == sha256_file(path)

    def _commit_file(self, shard: ShardRange) -> Path:
        return self.path / "commits" / f"{Path(shard.file).stem}.json"

    def _is_vacant(self) -> bool:
        """An empty folder; the temporary file of a run that died before it had a manifest counts as nothing."""
        return self.path.is_dir() and all(file.match(".manifest.json.*.tmp") for file in self.path.iterdir())


def holds_run_of(path: Path, bundle: Bundle, dataset: str, split: str, classes: Sequence[int] | None) -> bool:
    """Whether a complete run of this bundle over this split, cut down to these classes or not at all, is at path."""
    if not _holds_run(path):
        return False
    manifest = read_manifest(path)
    found = manifest["fingerprint"]
    return (
        manifest["status"] == "complete"
        and (found["bundle"], found["dataset"], found["split"]) == (bundle.fingerprint, dataset, split)
        and found["sample"] is found["limit"] is None
        and found["classes"] == (list(classes) if classes else None)
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json of a run; ClipmillError where there is none or it is of another format version."""
    if not _holds_run(path):
        raise ClipmillError(f"no run at {path}: it has no manifest.json of one; make one with `python cli.py extract`")
    manifest = read_json(path / "manifest.json")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ClipmillError(
            f"{path / 'manifest.json'} has format version {manifest.get('format_version')}, this clipmill reads "
            f"{FORMAT_VERSION}: extract again with --overwrite"
        )
    return manifest


def read_run(path: Path) -> tuple[dict[str, Any], pa.Table]:
    """The manifest and the table of a complete run whose every shard is the file that was committed."""
    manifest = _checked(path)
    return manifest, pa.concat_tables(read_table(path / shard["file"]) for shard in manifest["shards"])


def run_embeddings(path: Path) -> Iterator[NDArray[Any]]:
    """The embeddings of such a run in blocks (n, dim), which never stand in memory together."""
    for shard in _checked(path)["shards"]:
        yield from embedding_blocks(path / shard["file"])


def _checked(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    if manifest["status"] != "complete":
        raise ClipmillError(f"the run at {path} is not complete: run its extract command again to finish it")
    for shard in manifest["shards"]:
        file = path / shard["file"]
        if not file.is_file() or sha256_file(file) != shard["sha256"]:
            raise ClipmillError(f"{file} is missing or not the shard that was written: extract again with --overwrite")
    return manifest


def _holds_run(path: Path) -> bool:
    file = path / "manifest.json"  # a name that others use too
    return file.is_file() and {"format_version", "fingerprint"} <= read_json(file).keys()


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ClipmillError(f"cannot remove {path}: {error.strerror}; see --output") from error


def _short(value: Any, length: int = 40) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= length else text[: length - 3] + "..."
