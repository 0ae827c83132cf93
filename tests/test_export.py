"""export_bundle(): what it writes, how close it is to transformers, and that a wrong export leaves nothing behind."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

from engine.bundle import TOWERS, Bundle, Preprocessing, Target, TowerName, load_bundle
from engine.errors import ClipmillError
from export import to_onnx, verify
from export.checkpoint import MINI_CHECKPOINT
from export.to_onnx import export_bundle
from export.towers import ImageTower, TextTower

FILES = {"image.onnx", "text.onnx", "tokenizer.json", "bundle.json"}


def test_bundle_json_tells_what_the_checkpoint_tells(mini: Bundle) -> None:
    stored = stored_in(mini.path)
    config = json.loads((MINI_CHECKPOINT / "config.json").read_text())
    processor = json.loads((MINI_CHECKPOINT / "preprocessor_config.json").read_text())
    logit_scale = load_file(MINI_CHECKPOINT / "model.safetensors")["logit_scale"].item()
    assert stored["architecture"] == {
        "embedding_dim": config["projection_dim"],
        "image_size": config["vision_config"]["image_size"],
        "patch_size": config["vision_config"]["patch_size"],
        "context_length": config["text_config"]["max_position_embeddings"],
        "vocabulary_size": config["text_config"]["vocab_size"],
        "logit_scale": pytest.approx(math.exp(logit_scale), abs=1e-4),
        "activation": config["vision_config"]["hidden_act"],
    }
    assert stored["preprocessing"] == {
        "resize": processor["size"]["shortest_edge"],
        "crop": processor["crop_size"]["height"],
        "resample": "bicubic",
        "mean": processor["image_mean"],
        "std": processor["image_std"],
    }
    assert stored["normalised"] is True
    assert stored["opset"] == 17
    assert stored["target"] == {"provider": "cpu", "precision": "fp32"}
    assert {key: stored["source"][key] for key in ("model", "revision", "random_weights")} == {
        "model": "mini",
        "revision": None,
        "random_weights": False,
    }
    assert {"torch", "transformers", "optimum-onnx", "onnx"} <= stored["versions"].keys()
    assert all(importlib.metadata.version(library) == version for library, version in stored["versions"].items())
    assert load_bundle(mini.path) == mini


def test_random_weights_are_marked_and_come_without_tokenizer(random_vit_b_32: Bundle) -> None:
    stored = stored_in(random_vit_b_32.path)
    assert stored["source"]["random_weights"] is True
    assert stored["architecture"] | {"logit_scale": 0} == {
        "embedding_dim": 512,
        "image_size": 224,
        "patch_size": 32,
        "context_length": 77,
        "vocabulary_size": 49408,
        "logit_scale": 0,
        "activation": "quick_gelu",
    }
    assert {file.name for file in random_vit_b_32.path.iterdir()} == FILES - {"tokenizer.json"}
    assert not random_vit_b_32.has_tokenizer


def test_the_folder_holds_the_files_that_bundle_json_lists(mini: Bundle) -> None:
    content = content_of(mini.path)
    assert content.keys() == FILES
    listed = stored_in(mini.path)["files"]
    assert listed.keys() == FILES - {"bundle.json"}
    for name, file in listed.items():
        assert file == {"sha256": hashlib.sha256(content[name]).hexdigest(), "bytes": len(content[name])}


@pytest.mark.parametrize(("name", "agreement"), [("mini", 1.0), ("random_vit_b_32", None)])
def test_the_certificate_is_far_above_its_bar(
    name: str, agreement: float | None, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    certificate = stored_in(bundle.path)["certificate"]
    print({tower: certificate[tower] for tower in ("image", "text")})
    assert certificate["bar"] == {"min_cosine": 0.9999}
    assert certificate["top1_agreement"] == agreement
    assert (certificate["images"], certificate["prompts"]) == (256, 60)
    assert (certificate["provider"], certificate["caveat"]) == ("cpu", None)
    for tower in ("image", "text"):
        for measure in ("min_cosine", "mean_cosine", "min_centred_cosine", "mean_centred_cosine"):
            # measured: 1 - 1e-7 at worst
            assert 0.999999 <= certificate[tower][measure] <= 1 + 1e-12


@pytest.mark.parametrize(("tower", "layers"), [("image", 6), ("text", 3)])
def test_graphs_are_sound_and_fuse(mini: Bundle, tower: TowerName, layers: int) -> None:
    """The last layer attends from one token alone, by plain operators."""
    onnx.checker.check_model(mini.onnx_path(tower))
    nodes = optimised(mini.onnx_path(tower)).graph.node
    count = Counter(node.op_type for node in nodes)
    assert (count["QuickGelu"], count["MultiHeadAttention"]) == (layers, layers - 1)
    assert not count["Erf"] + count["Tanh"] + count["Gelu"] + count["Sigmoid"]
    for node in nodes:
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "QuickGelu":
            assert attributes["alpha"] == 1  # the fast kernel
        if node.op_type == "MultiHeadAttention":
            assert attributes["num_heads"] == 4
            assert attributes["unidirectional"] == (tower == "text")


def test_exporting_twice_gives_the_same_files(mini: Bundle, tmp_path: Path) -> None:
    again = export_bundle("mini", tmp_path / "again")
    first, second = content_of(mini.path), content_of(again.path)
    for name in FILES - {"bundle.json"}:
        assert first[name] == second[name], name
    assert again.fingerprint == mini.fingerprint
    # the certificate is measured with threads, whose last bits no one promises
    assert dataclasses.replace(again, path=mini.path, certificate=mini.certificate) == mini


def test_gelu_in_half_precision_is_exported_as_the_checkpoint_says(tmp_path: Path) -> None:
    export_bundle(str(tiny_gelu_clip(tmp_path / "clip")), tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.architecture.activation == "gelu"
    for tower in ("image", "text"):
        assert bundle.certificate[tower]["min_cosine"] >= 0.9999
        operators = {node.op_type for node in optimised(bundle.onnx_path(tower)).graph.node}
        assert operators & {"Gelu", "BiasGelu"}
        assert not operators & {"QuickGelu", "FastGelu"}


def with_gelu(clip: CLIPModel) -> CLIPModel:
    clip = copy.deepcopy(clip)
    for module in clip.modules():
        if hasattr(module, "activation_fn"):
            module.activation_fn = nn.GELU()
    return clip


def with_projection(clip: CLIPModel, projection: nn.Module) -> CLIPModel:
    clip = copy.deepcopy(clip)
    clip.visual_projection = clip.text_projection = projection
    return clip


# Min cosines of the embedded model, for which 0.9999 is the bar: GELU 0.99902 (images), no projection -0.15 and -0.24,
# (the widths are equal, so only the numbers can tell), ImageNet's mean 0.99956, one half as mean 0.935.
BROKEN: dict[str, tuple[dict[str, Callable[..., nn.Module]], str]] = {
    "GELU": (
        {
            "ImageTower": lambda clip, *rest: ImageTower(with_gelu(clip), *rest),
            "TextTower": lambda clip: TextTower(with_gelu(clip)),
        },
        "image tower differs",
    ),
    "image unprojected": (
        {"ImageTower": lambda clip, *rest: ImageTower(with_projection(clip, nn.Identity()), *rest)},
        "image tower differs",
    ),
    "text unprojected": (
        {"TextTower": lambda clip: TextTower(with_projection(clip, nn.Identity()))},
        "text tower differs",
    ),
    "another width": (
        {"ImageTower": lambda clip, *rest: ImageTower(with_projection(clip, nn.Linear(128, 64)), *rest)},
        "is the projection missing",
    ),
    "mean of ImageNet": (
        {"ImageTower": lambda clip, _, std: ImageTower(clip, [0.485, 0.456, 0.406], std)},
        "image tower differs",
    ),
    "mean of one half": (
        {"ImageTower": lambda clip, _, std: ImageTower(clip, [0.5, 0.5, 0.5], std)},
        "image tower differs",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_wrong_tower_is_refused_and_leaves_nothing(
    broken: str, mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, message = BROKEN[broken]
    for tower, build in wrong.items():
        monkeypatch.setattr(to_onnx, tower, build)
    keep(mini, monkeypatch, *(name for name in TOWERS if f"{name.title()}Tower" not in wrong))
    with pytest.raises(ClipmillError, match=message) as refusal:
        export_bundle("mini", tmp_path / "bundle")
    assert str(refusal.value).endswith("nothing was written")
    assert [*tmp_path.iterdir()] == []


def test_a_wrong_constant_in_bundle_json_is_refused(
    mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resize is the engine's, by bundle.json: the certificate covers it too."""
    keep(mini, monkeypatch, "image", "text")
    wrong = Preprocessing(resize=40, crop=32, resample="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    monkeypatch.setattr(to_onnx, "read_preprocessing", lambda *_: wrong)
    with pytest.raises(ClipmillError, match="image tower differs"):
        export_bundle("mini", tmp_path / "bundle")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_cosine_that_is_no_number_is_refused(
    tower: str, mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(mini, monkeypatch, "image", "text")
    name = f"_reference_{tower}s"
    reference = getattr(verify, name)
    monkeypatch.setattr(verify, name, lambda *inputs: reference(*inputs) * np.float32(np.nan))
    with pytest.raises(ClipmillError, match=f"{tower} tower differs .* min cosine nan"):
        export_bundle("mini", tmp_path / "bundle")
    assert [*tmp_path.iterdir()] == []


def test_an_earlier_bundle_is_replaced_by_a_good_export_only(
    mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    shutil.copytree(mini.path, output)
    (output / "bundle.json").write_text('{"format_version": 0}')
    (output / "left over").touch()
    before = content_of(output)

    keep(mini, monkeypatch, "image", "text")
    with monkeypatch.context() as patch:
        patch.setattr(verify, "_reference_texts", lambda *_: np.eye(60, 128, dtype=np.float32))
        with pytest.raises(ClipmillError, match="text tower differs"):
            export_bundle("mini", output)
    assert content_of(output) == before

    bundle = export_bundle("mini", output)
    assert [*tmp_path.iterdir()] == [output]
    assert content_of(output).keys() == FILES
    assert load_bundle(output) == bundle


@pytest.mark.parametrize("occupied", ["folder", "file"])
def test_what_is_no_bundle_is_never_replaced(occupied: str, tmp_path: Path) -> None:
    output = tmp_path / "precious"
    precious = output if occupied == "file" else output / "thesis.tex"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("precious")
    with pytest.raises(ClipmillError, match=r"is no bundle: .* choose another --output"):
        export_bundle("mini", output)
    assert [*tmp_path.rglob("*")] == ([output] if occupied == "file" else [output, precious])
    assert precious.read_text() == "precious"


def keep(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, *towers: TowerName) -> None:
    """Let export_bundle take these towers from a bundle: exported again they would be the same bytes."""
    export_tower = to_onnx._export_tower

    def export_or_copy(
        checkpoint: object, name: TowerName, preprocessing: Preprocessing, target: Target, path: Path
    ) -> None:
        if name in towers:
            shutil.copy(bundle.onnx_path(name), path)
        else:
            export_tower(checkpoint, name, preprocessing, target, path)

    monkeypatch.setattr(to_onnx, "_export_tower", export_or_copy)


def tiny_gelu_clip(folder: Path) -> Path:
    """A CLIP checkpoint in float16 with GELU, random weights, and the embedded model's tokenizer and processor."""
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "hidden_act": "gelu"}
    text = layers | {"num_hidden_layers": 2, "vocab_size": 900, "bos_token_id": 898, "eos_token_id": 899}
    vision = layers | {"num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=48))
    for weight in clip.parameters():  # the library's initial weights are so small that GELU is a line
        nn.init.normal_(weight, std=0.3)
    clip.half().save_pretrained(folder)
    for file in MINI_CHECKPOINT.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    return folder


def optimised(path: Path) -> onnx.ModelProto:
    """The graph that ONNX Runtime makes of a file on the CPU."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.parent / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath)
    Path(options.optimized_model_filepath).unlink()
    return graph


def stored_in(folder: Path) -> dict:
    return json.loads((folder / "bundle.json").read_text())


def content_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
