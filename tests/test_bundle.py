"""A bundle's checks: whatever is not the folder that was exported is refused in one line that says what to do."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import bundle as module
from engine.bundle import (
    Architecture,
    Bundle,
    Preprocessing,
    Source,
    Target,
    default_output,
    describe_files,
    find_bundle,
    load_bundle,
    save_bundle,
)
from engine.errors import ClipmillError
from engine.files import read_json, sha256_file, write_json


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of digests, in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "clipmill" / "sha256.json"


def make_bundle(folder: Path) -> Bundle:
    """A bundle whose files are no towers: loading does not look into them."""
    folder.mkdir(parents=True)
    for name in ("image.onnx", "text.onnx", "tokenizer.json"):
        (folder / name).write_bytes(name.encode() * 100)
    bundle = Bundle(
        path=folder.absolute(),
        source=Source("openai/clip-vit-base-patch32", "main", "0" * 64, random_weights=False),
        architecture=Architecture(512, 224, 32, 77, 49408, 100.0, "quick_gelu"),
        preprocessing=Preprocessing(224, 224, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        target=Target("cpu", "fp32"),
        opset=17,
        files=describe_files(folder),
        versions={"onnx": "1.23"},
        certificate={"image": {"min_cosine": 0.99999}},
    )
    save_bundle(bundle)
    return bundle


@pytest.fixture
def stored(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "models" / "vit")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were really read to be hashed."""
    names: list[str] = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(module, "sha256_file", counted)
    return names


def edit(bundle: Bundle, **changes: Any) -> None:
    write_json(bundle.path / "bundle.json", read_json(bundle.path / "bundle.json") | changes)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ClipmillError) as raised:
        load_bundle(path, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_bundle_comes_back_as_it_was_saved(stored: Bundle) -> None:
    loaded = load_bundle(stored.path)
    assert loaded == stored
    assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)
    assert (loaded.name, loaded.has_tokenizer) == ("vit", True)
    assert loaded.onnx_path("text") == stored.path / "text.onnx"
    assert loaded.fingerprint == stored.fingerprint
    assert load_bundle(str(stored.path)) == stored


def test_the_exported_bundle_loads(mini: Bundle) -> None:
    assert load_bundle(mini.path) == mini


def test_the_fingerprint_is_of_what_changes_embeddings(stored: Bundle) -> None:
    moved = dataclasses.replace(stored, path=Path("/elsewhere"), versions={}, certificate={})
    assert moved.fingerprint == stored.fingerprint
    other_mean = dataclasses.replace(stored.preprocessing, mean=(0.1, 0.2, 0.30001))
    other_file = {**stored.files, "text.onnx": dataclasses.replace(stored.files["text.onnx"], sha256="1" * 64)}
    others = [dataclasses.replace(stored, preprocessing=other_mean), dataclasses.replace(stored, files=other_file)]
    assert len({bundle.fingerprint for bundle in [stored, *others]}) == 3


@pytest.mark.parametrize("empty", [True, False])
def test_no_bundle_there(empty: bool, tmp_path: Path) -> None:
    if empty:
        (tmp_path / "vit").mkdir()
    message = refusal(tmp_path / "vit")
    assert message.startswith(f"no bundle at {tmp_path / 'vit'}: ")
    assert "python cli.py export" in message
    assert "--model" in message


@pytest.mark.parametrize("name", ["image.onnx", "text.onnx", "tokenizer.json"])
@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"\0"])
def test_a_file_of_another_size(name: str, change: Callable[[bytes], bytes], stored: Bundle, hashed: list[str]) -> None:
    file = stored.path / name
    file.write_bytes(change(file.read_bytes()))
    message = refusal(stored.path)
    assert message.startswith(f"{file} is not the file that was exported")
    assert "export the model again" in message
    assert "--no-verify" in message
    assert name not in hashed  # the size told


@pytest.mark.parametrize("name", ["image.onnx", "text.onnx", "tokenizer.json"])
def test_a_file_of_the_same_size_after_it_was_found_good(name: str, stored: Bundle) -> None:
    load_bundle(stored.path)
    load_bundle(stored.path)
    file = stored.path / name
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # a clock may be too coarse for a quick test
    assert (file.stat().st_size, file.stat().st_ino) == (before.st_size, before.st_ino)
    assert refusal(stored.path).startswith(f"{file} is not the file that was exported")


def test_a_file_replaced_with_the_time_of_the_old_one(stored: Bundle) -> None:
    load_bundle(stored.path)
    file = stored.path / "image.onnx"
    before = file.stat()
    (stored.path / "new").write_bytes(b"\0" * before.st_size)
    os.utime(stored.path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (stored.path / "new").replace(file)
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert refusal(stored.path).startswith(f"{file} is not the file that was exported")


def test_a_file_mended_is_good_again(stored: Bundle) -> None:
    file = stored.path / "text.onnx"
    whole = file.read_bytes()
    file.write_bytes(whole[::-1])
    refusal(stored.path)
    file.write_bytes(whole)
    os.utime(file, (1, 1))
    assert load_bundle(stored.path) == stored


@pytest.mark.parametrize("name", ["image.onnx", "tokenizer.json"])
def test_a_missing_file(name: str, stored: Bundle) -> None:
    (stored.path / name).unlink()
    assert refusal(stored.path) == f"the bundle lacks {stored.path / name}: export the model again"


def test_verify_false_looks_at_no_file(stored: Bundle, hashed: list[str]) -> None:
    (stored.path / "image.onnx").write_bytes(b"edited on purpose")
    (stored.path / "text.onnx").unlink()
    assert load_bundle(stored.path, verify=False) == stored
    assert find_bundle(str(stored.path), verify=False) == stored
    assert hashed == []


@pytest.mark.parametrize("version", [0, 2, "1", None])
@pytest.mark.parametrize("verify", [True, False])
def test_another_format_version(version: Any, verify: bool, stored: Bundle) -> None:
    edit(stored, format_version=version, something="new")
    assert refusal(stored.path, verify=verify) == (
        f"{stored.path / 'bundle.json'} has format version {version}, this clipmill reads 1: export the model again"
    )


def test_json_cut_short(stored: Bundle) -> None:
    file = stored.path / "bundle.json"
    file.write_text(file.read_text()[:100])
    assert refusal(stored.path).startswith(f"cannot read {file}: ")


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.pop(name)


DAMAGED = {
    "unknown field": (lambda values: values.update(colour="red"), "colour"),
    "unknown field below": (lambda values: values["architecture"].update(colour="red"), "colour"),
    "missing field": (without("opset"), "opset"),
    "missing part": (without("preprocessing"), "preprocessing"),
    "missing field below": (lambda values: values["source"].pop("weights_sha256"), "weights_sha256"),
    "no files": (without("files"), "files"),
    "files are a list": (lambda values: values.update(files=["image.onnx"]), ""),
    "a file without sha256": (lambda values: values["files"]["image.onnx"].pop("sha256"), "sha256"),
    "a part is text": (lambda values: values.update(architecture="ViT"), ""),
    "a tower not listed": (lambda values: values["files"].pop("text.onnx"), "text.onnx"),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_description(
    damage: Callable[[dict[str, Any]], None], named: str, verify: bool, stored: Bundle
) -> None:
    values = read_json(stored.path / "bundle.json")
    damage(values)
    write_json(stored.path / "bundle.json", values)
    message = refusal(stored.path, verify=verify)
    assert message.startswith(f"{stored.path / 'bundle.json'} is damaged (")
    assert message.endswith("): export the model again")
    assert named in message


# Finding one --------------------------------------------------------------------------------------------------------


def test_a_bundle_is_found_by_name_and_by_path(stored: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for model in ("vit", "models/vit", "./models/vit/", str(stored.path)):
        assert find_bundle(model) == stored
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_bundle("~/models/vit") == stored


def test_a_folder_here_goes_before_a_name_under_models(
    stored: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_bundle(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    assert find_bundle("vit").path == here.path
    assert find_bundle("models/vit").path == stored.path


def test_without_a_name_it_is_the_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClipmillError, match=r"no bundle at models/clip-vit-base-patch32: .*cli\.py export"):
        find_bundle(None)
    default = make_bundle(tmp_path / "models" / "clip-vit-base-patch32")
    for provider in ("auto", "cpu", "cuda"):
        assert find_bundle(None, provider) == default
    half = make_bundle(tmp_path / "models" / "clip-vit-base-patch32-cuda-fp16")
    assert find_bundle(None, "cuda") == half
    assert find_bundle(None, "auto") == find_bundle(None, "cpu") == default


def test_a_name_that_is_nowhere_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClipmillError, match=r"no bundle at nowhere: .*cli\.py export.*--model"):
        find_bundle("nowhere")


@pytest.mark.parametrize(
    ("model", "folder"),
    [("openai/clip-vit-base-patch32", "clip-vit-base-patch32"), ("mini", "mini"), ("/data/my-clip/", "my-clip")],
)
def test_where_a_bundle_goes_by_default(model: str, folder: str) -> None:
    assert default_output(model) == Path("models") / folder
    assert default_output(model, Target("cpu", "int8")) == Path("models") / f"{folder}-cpu-int8"
    assert default_output(model, Target("cuda", "fp16")) == Path("models") / f"{folder}-cuda-fp16"


# The cache of digests -----------------------------------------------------------------------------------------------


def test_the_second_load_hashes_nothing(stored: Bundle, hashed: list[str], cache: Path) -> None:
    load_bundle(stored.path)
    assert sorted(hashed) == ["image.onnx", "text.onnx", "tokenizer.json"]
    assert cache.is_file()
    assert load_bundle(stored.path) == stored
    assert len(hashed) == 3


def test_a_copy_of_the_bundle_is_hashed_again(stored: Bundle, hashed: list[str], tmp_path: Path) -> None:
    load_bundle(stored.path)
    make_bundle(tmp_path / "models" / "copy")
    hashed.clear()
    load_bundle(tmp_path / "models" / "copy")
    assert len(hashed) == 3


def test_the_cache_forgets_bundles_that_are_gone(stored: Bundle, cache: Path, tmp_path: Path) -> None:
    load_bundle(stored.path)
    stored.path.rename(tmp_path / "moved")
    load_bundle(tmp_path / "moved")
    assert sorted(Path(key.rsplit(" ", 3)[0]) for key in read_json(cache)) == [
        tmp_path / "moved" / name for name in ("image.onnx", "text.onnx", "tokenizer.json")
    ]


@pytest.mark.parametrize(
    "garbage", [b"", b"\xff\x00garbage", b"[1, 2]", b'{"no path": 5, "": null}', b'{"' + b"x" * 5000 + b' 1 2 3": "0"}']
)
def test_a_garbage_cache_does_not_matter(garbage: bytes, stored: Bundle, hashed: list[str], cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(garbage)
    assert load_bundle(stored.path) == stored
    assert len(hashed) == 3
    assert load_bundle(stored.path) == stored
    assert len(hashed) == 3  # and it was put right


def test_a_cache_that_cannot_be_written_does_not_matter(
    stored: Bundle, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert load_bundle(stored.path) == stored
    assert len(hashed) == 6


@pytest.mark.parametrize("value", [None, ""])
def test_the_cache_is_at_home_unless_told_otherwise(
    value: str | None, stored: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME") if value is None else monkeypatch.setenv("XDG_CACHE_HOME", value)
    load_bundle(stored.path)
    assert (tmp_path / "home" / ".cache" / "clipmill" / "sha256.json").is_file()
    assert not (tmp_path / "clipmill").exists()
