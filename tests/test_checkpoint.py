"""load_checkpoint(): which checkpoints are taken, and the one line that refuses every other."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from requests import Response
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

from engine.errors import ClipmillError
from export import checkpoint as loading
from export.checkpoint import MINI_CHECKPOINT, load_checkpoint
from export.to_onnx import export_bundle

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
NOT_IN_ANY_CACHE = "clipmill-tests/no-such-model"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint, to be damaged."""
    return Path(shutil.copytree(MINI_CHECKPOINT, tmp_path / "checkpoint"))


def refusal(model: Path | str, tmp_path: Path) -> str:
    """The message with which the export is refused; it is one line, and nothing is written."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ClipmillError) as error:
        export_bundle(str(model), tmp_path / "bundle")
    assert sorted(tmp_path.iterdir()) == before
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert "--model" in message
    return message


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("bert", lambda: BertModel(BertConfig(vocab_size=9, **TINY))),
        ("vit", lambda: ViTModel(ViTConfig(image_size=8, patch_size=4, **TINY))),
        ("clip_vision_model", lambda: CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **TINY))),
    ],
)
def test_a_checkpoint_that_is_not_clip_is_refused(kind: str, model: Callable[[], Any], tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "other")
    assert f"is a {kind} checkpoint; --model takes CLIP checkpoints only" in refusal(tmp_path / "other", tmp_path)


def test_a_folder_without_config_is_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "config.json").unlink()
    assert "holds no config.json" in refusal(checkpoint, tmp_path)


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "../nowhere"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(path: str, tmp_path: Path) -> None:
    assert f"no checkpoint folder at {path}" in refusal(path, tmp_path)


def test_only_safetensors_are_read(checkpoint: Path, tmp_path: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    message = refusal(checkpoint, tmp_path)
    assert "no file named model.safetensors" in message
    assert "no other format of weights" in message


@pytest.mark.parametrize("shape", [None, (3, 128)])
def test_a_weight_that_is_missing_or_misshapen_is_named(
    shape: tuple[int, int] | None, checkpoint: Path, tmp_path: Path
) -> None:
    """transformers itself would put random numbers in its place."""
    weights = load_file(checkpoint / "model.safetensors")
    del weights["visual_projection.weight"]
    if shape:
        weights["visual_projection.weight"] = torch.zeros(shape)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    assert "lacks 1 of the weights" in refusal(checkpoint, tmp_path)
    assert "visual_projection.weight; see --model" in refusal(checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"model.safetensors": b"\x00" * 7}, "CLIPModel: "),
        ({"config.json": b"{"}, "not a valid JSON"),
        ({"config.json": b"{}"}, "Unrecognized model"),
        ({"config.json": b'{"model_type": "next-year"}'}, "next-year"),
        ({"preprocessor_config.json": None}, "CLIPImageProcessor: "),
        ({"tokenizer.json": b"{}"}, "CLIPTokenizerFast: "),
        ({"tokenizer.json": None, "vocab.json": None, "merges.txt": None}, "CLIPTokenizerFast: "),
    ],
)
def test_a_damaged_file_is_told_in_one_line(
    damage: dict[str, bytes | None], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    for name, content in damage.items():
        (checkpoint / name).unlink()
        if content is not None:
            (checkpoint / name).write_bytes(content)
    assert message in refusal(checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"do_center_crop": False}, "do_center_crop"),
        ({"do_normalize": False}, "do_normalize"),
        ({"do_rescale": False, "rescale_factor": None}, "do_rescale"),
        ({"rescale_factor": 1 / 127.5}, "a rescale factor of 1/255"),
        ({"resample": 2}, "bicubic"),
        ({"size": {"height": 32, "width": 32}}, "shortest_edge"),
        ({"size": {"shortest_edge": 16}}, "shortest_edge"),
        ({"crop_size": {"height": 28, "width": 28}}, "a centre crop of 32 x 32"),
        ({"image_mean": 0.5, "image_std": 0.5}, "three means"),
    ],
)
def test_another_preprocessing_is_refused(
    change: dict[str, Any], expected: str, checkpoint: Path, tmp_path: Path
) -> None:
    edit(checkpoint / "preprocessor_config.json", change)
    message = refusal(checkpoint, tmp_path)
    assert "image processor is not CLIP's" in message
    assert expected in message


@pytest.mark.parametrize("model_type", ["clip", "its-own"])
def test_code_in_a_checkpoint_is_never_run(model_type: str, checkpoint: Path) -> None:
    edit(
        checkpoint / "config.json",
        {"model_type": model_type, "auto_map": {"AutoConfig": "hostile.Config", "AutoModel": "hostile.Model"}},
    )
    edit(checkpoint / "preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "hostile.Processor"}})
    edit(checkpoint / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["hostile.Slow", "hostile.Fast"]}})
    ran = checkpoint / "ran"
    (checkpoint / "hostile.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    if model_type == "clip":
        assert load_checkpoint(str(checkpoint)).weights_sha256 == load_checkpoint("mini").weights_sha256
    else:
        with pytest.raises(ClipmillError, match="contains custom code"):
            load_checkpoint(str(checkpoint))
    assert not ran.exists()


def test_weights_are_known_by_their_values_not_their_file(checkpoint: Path, tmp_path: Path) -> None:
    mini = load_checkpoint("mini")
    mini.model.save_pretrained(checkpoint, max_shard_size="1MB")
    assert len([*checkpoint.glob("model-*.safetensors")]) > 1
    (checkpoint / "model.safetensors").unlink()
    assert load_checkpoint(str(checkpoint)).weights_sha256 == mini.weights_sha256

    mini.model.logit_scale.data += 0.5
    mini.model.save_pretrained(tmp_path / "other")
    shutil.copytree(
        checkpoint, tmp_path / "other", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*model*", "config*")
    )
    assert load_checkpoint(str(tmp_path / "other")).weights_sha256 != mini.weights_sha256


def test_a_hub_out_of_reach_is_told_at_once_with_two_ways_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers alone would try six times, with pauses of 23 s in all."""
    asked = []

    def no_such_host(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_host)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s to try again"))
    message = refusal(NOT_IN_ANY_CACHE, tmp_path)
    assert f"the hub could not give {NOT_IN_ANY_CACHE} (We couldn't connect to" in message
    assert "two ways on: --model FOLDER with a downloaded checkpoint, or --model mini" in message
    assert len(asked) <= 1


@pytest.mark.parametrize(
    ("raised", "cause", "message"),
    [
        (LocalEntryNotFoundError("cannot find the files"), None, "the hub could not give"),
        (OSError("We couldn't connect\nCheck it"), LocalEntryNotFoundError("x"), "the hub could not give"),
        (OSError("not a valid model identifier"), RepositoryNotFoundError("404", Response()), "the hub has no"),
    ],
)
def test_what_the_hub_answers_becomes_one_line(
    raised: OSError, cause: Exception | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised from cause

    monkeypatch.setattr(loading, "_hub_answers", lambda: True)
    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    assert f"{message} {NOT_IN_ANY_CACHE} " in refusal(NOT_IN_ANY_CACHE, tmp_path)


def test_a_local_checkpoint_never_asks_the_hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked for the address of a host"))
    assert load_checkpoint(str(checkpoint)).revision is None


def edit(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
