"""What a bundle is: two ONNX towers, a tokenizer, and bundle.json, which says what they are and proves it.

models/<name>/  image.onnx  text.onnx  tokenizer.json  bundle.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from engine.errors import ClipmillError
from engine.files import read_json, sha256_file, sha256_json, write_json
from engine.machine import cache_folder

FORMAT_VERSION = 1
DEFAULT_MODEL = "openai/clip-vit-base-patch32"
MODELS_FOLDER = Path("models")
TowerName = Literal["image", "text"]
TOWERS: tuple[TowerName, ...] = ("image", "text")
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Where the weights come from."""

    model: str
    revision: str | None
    weights_sha256: str
    random_weights: bool  # True: the architecture without training, for benchmarks only


@dataclass(frozen=True)
class Architecture:
    embedding_dim: int
    image_size: int
    patch_size: int
    context_length: int
    vocabulary_size: int
    logit_scale: float
    activation: str


@dataclass(frozen=True)
class Preprocessing:
    """Resize the short edge to `resize`, cut the centre `crop` x `crop`, then (level / 255 - mean) / std."""

    resize: int
    crop: int
    resample: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Target:
    """cpu and cuda: fused com.microsoft operators, in the precision. tensorrt: ONNX's own operators with fp32 weights,
    and the precision is what TensorRT is told to compute in."""

    provider: str  # the family that the graphs are made for
    precision: str


CPU_FP32 = Target("cpu", "fp32")


@dataclass(frozen=True)
class BundleFile:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Bundle:
    """bundle.json, and the folder it lies in."""

    path: Path = field(metadata={"stored": False})
    source: Source
    architecture: Architecture
    preprocessing: Preprocessing
    target: Target
    opset: int
    files: Mapping[str, BundleFile]
    versions: Mapping[str, str]
    certificate: Mapping[str, Any]
    normalised: bool = True
    format_version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def has_tokenizer(self) -> bool:
        return "tokenizer.json" in self.files

    @property
    def fingerprint(self) -> str:
        """Equal for bundles that compute the same embeddings: a digest of the files and the preprocessing."""
        told = {"precision": self.target.precision} if self.target.provider == "tensorrt" else {}  # not in the files
        return sha256_json(
            {
                **told,
                "format_version": self.format_version,
                "files": {name: file.sha256 for name, file in self.files.items()},
                "preprocessing": dataclasses.asdict(self.preprocessing),
            }
        )

    def onnx_path(self, tower: TowerName) -> Path:
        return self.path / f"{tower}.onnx"


def save_bundle(bundle: Bundle) -> None:
    """Write bundle.json into the bundle's folder."""
    values = dataclasses.asdict(bundle)
    del values["path"]
    write_json(bundle.path / "bundle.json", {"format_version": values.pop("format_version"), **values})


def describe_files(path: Path) -> dict[str, BundleFile]:
    """sha256 and size of the files that a bundle folder holds, without bundle.json."""
    files = sorted(file for file in path.iterdir() if file.name != "bundle.json")
    return {file.name: BundleFile(sha256_file(file), file.stat().st_size) for file in files}


def load_bundle(path: str | Path, *, verify: bool = True) -> Bundle:
    """Read and check a bundle folder: schema, and (unless verify=False) the sha256 of every file.

    Raises ClipmillError for a folder that is no bundle, another format version, or files that are not those exported.
    """
    path = Path(path).expanduser()
    if not (path / "bundle.json").is_file():
        command = "python cli.py export" + (" --model mini" if path.name == "mini" else "")
        raise ClipmillError(f"no bundle at {path}: make one with `{command}` or name another with --model BUNDLE")
    stored = read_json(path / "bundle.json")
    if stored.get("format_version") != FORMAT_VERSION:
        raise ClipmillError(
            f"{path / 'bundle.json'} has format version {stored.get('format_version')}, this clipmill reads "
            f"{FORMAT_VERSION}: export the model again"
        )
    try:
        files = {name: BundleFile(**file) for name, file in stored.pop("files").items()}
        bundle = _from_json(Bundle, {**stored, "path": path.absolute(), "files": files})
    except (KeyError, TypeError, AttributeError) as error:
        raise ClipmillError(f"{path / 'bundle.json'} is damaged ({error}): export the model again") from error
    for name in [f"{tower}.onnx" for tower in TOWERS]:
        if name not in bundle.files:
            raise ClipmillError(f"{path / 'bundle.json'} is damaged (it lists no {name}): export the model again")
    if verify:
        for name, file in bundle.files.items():
            _check_file(path / name, file)
    return bundle


def find_bundle(model: str | None, provider: str = "auto", *, verify: bool = True) -> Bundle:
    """The bundle named by --model (a folder, or a name under models/), else the default model's that suits a provider.

    For "cuda" and "tensorrt" that is the fp16 bundle of their own if there is one, else the fp32 one of the CPU.
    """
    if model is None:
        own = default_output(DEFAULT_MODEL, Target(provider, "fp16"))
        return load_bundle(own if own.exists() else default_output(DEFAULT_MODEL), verify=verify)
    named = MODELS_FOLDER / model
    is_name = not Path(model).exists() and len(Path(model).parts) == 1 and named.exists()
    return load_bundle(named if is_name else model, verify=verify)


def default_output(model: str, target: Target = CPU_FP32) -> Path:
    """Where the bundle of a model goes unless --output says otherwise: models/<last part of its name>.

    Others than fp32 for the CPU get a suffix, such as -cuda-fp16.
    """
    suffix = "" if target == CPU_FP32 else f"-{target.provider}-{target.precision}"
    return MODELS_FOLDER / (Path(model).expanduser().absolute().name + suffix)


def _from_json(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from its JSON object; TypeError names an unknown or missing field."""
    hints = get_type_hints(kind)
    built = {}
    for name, value in values.items():
        hint = hints.get(name)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            value = _from_json(hint, value)
        built[name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)


def _check_file(path: Path, expected: BundleFile) -> None:
    try:
        stat = path.stat()
    except OSError as error:
        raise ClipmillError(f"the bundle lacks {path}: export the model again") from error
    if stat.st_size != expected.bytes or _cached_sha256(path, stat) != expected.sha256:
        raise ClipmillError(
            f"{path} is not the file that was exported (size or sha256 differs): export the model again, or pass "
            "--no-verify if you changed it on purpose"
        )


def _cached_sha256(path: Path, stat: os.stat_result) -> str:
    """sha256 of a file; remembered for as long as its size, mtime and inode stay the same."""
    cache_file = cache_folder() / "sha256.json"
    key = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
    cache: dict[str, str] = {}
    with contextlib.suppress(ClipmillError):  # no cache yet, or a damaged one: hash again
        cache = {key: value for key, value in read_json(cache_file).items() if os.path.exists(key.rsplit(" ", 3)[0])}
    if key not in cache:
        cache[key] = sha256_file(path)
        with contextlib.suppress(ClipmillError):  # a read-only home costs time, not correctness
            write_json(cache_file, cache)
    return cache[key]
