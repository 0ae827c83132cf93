"""Bundles in int8 and fp16: how close they are to PyTorch fp32, and what their graphs promise."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from engine.bundle import TOWERS, Bundle, Target, load_bundle
from engine.datasets import open_dataset
from engine.decode import decode
from engine.errors import ClipmillError
from engine.preprocess import image_feeds
from engine.session import Tower
from export import to_onnx, verify
from export.checkpoint import load_checkpoint
from export.int8 import WEIGHT_MAX, quantise
from export.to_onnx import choose_target, export_bundle
from export.towers import TextTower, to_half

INT8, FP16 = Target("cpu", "int8"), Target("cuda", "fp16")


@pytest.fixture(scope="module")
def mini_int8(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle("mini", tmp_path_factory.mktemp("int8") / "mini", INT8)


@pytest.fixture(scope="module")
def mini_fp16(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle("mini", tmp_path_factory.mktemp("fp16") / "mini", FP16)


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    """100 of the sample's test images that the certificate does not see, (100, 32, 32, 3)."""
    return np.stack([decode(sample.image, None) for sample in open_dataset("cifar10-sample", "test").samples(300, 400)])


def embed(bundle: Bundle, pixels: NDArray[np.uint8], batch_size: int = 8) -> NDArray[np.float32]:
    tower = Tower(bundle, "image", "cpu")
    batches = np.split(pixels, range(batch_size, len(pixels), batch_size))
    return np.concatenate([tower.run(image_feeds(batch, bundle.preprocessing)) for batch in batches])


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    cosine: NDArray[np.float32] = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return cosine


# int8 ---------------------------------------------------------------------------------------------------------------


def test_int8_is_close_to_fp32_and_decides_the_same(mini: Bundle, mini_int8: Bundle, pixels: NDArray[np.uint8]) -> None:
    certificate = mini_int8.certificate
    assert certificate["bar"] == {"mean_cosine": 0.99, "top1_agreement": 0.98}
    # measured 0.99990 and 0.996
    assert certificate["image"]["mean_cosine"] > 0.9995
    assert certificate["top1_agreement"] > 0.99
    assert certificate["text"]["min_cosine"] > 0.999999  # the text tower stays in fp32
    found, expected = embed(mini_int8, pixels), embed(mini, pixels)
    assert cosines(found, expected).min() > 0.998
    assert cosines(found - expected.mean(axis=0), expected - expected.mean(axis=0)).mean() > 0.999


def test_int8_of_random_weights_keeps_what_tells_images_apart(tmp_path: Path) -> None:
    """Embeddings of random weights differ little from each other, so the centred cosine is the one that counts."""
    certificate = export_bundle("random-vit-b-32", tmp_path / "bundle", INT8).certificate
    print(certificate["image"])
    assert certificate["image"]["mean_cosine"] > 0.999  # measured 0.9998
    assert certificate["image"]["mean_centred_cosine"] > 0.98  # measured 0.996


def test_an_int8_embedding_does_not_depend_on_its_batch(mini_int8: Bundle, pixels: NDArray[np.uint8]) -> None:
    alone = embed(mini_int8, pixels, 1)
    for batch_size in (3, 8, 100):
        np.testing.assert_array_equal(embed(mini_int8, pixels, batch_size), alone)
    black_and_white = np.stack([np.zeros_like(pixels[0]), np.full_like(pixels[0], 255), pixels[0]])
    np.testing.assert_array_equal(embed(mini_int8, black_and_white)[2], alone[0])


def test_int8_products_cannot_overflow_sixteen_bits(mini_int8: Bundle) -> None:
    """Processors without VNNI add pairs of uint8 x int8 products in int16."""
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph_of(mini_int8).graph.initializer}
    integers = [weight for weight in weights.values() if weight.dtype == np.int8]
    assert len(integers) == 1 + 5 * 6  # patches; queries, keys, values, output, up and down of all layers but the last
    assert max(np.abs(weight.astype(int)).max() for weight in integers) == WEIGHT_MAX
    assert 2 * 255 * WEIGHT_MAX < 2**15


def test_an_int8_graph_quantises_each_tensor_once_and_keeps_no_fp32_twin(mini: Bundle, mini_int8: Bundle) -> None:
    graph = graph_of(mini_int8)
    onnx.checker.check_model(graph)
    count = Counter(node.op_type for node in graph.graph.node)
    # a layer quantises the input of queries, keys and values, of the output projection, and of both MLP layers
    assert (count["MatMulIntegerToFloat"], count["QuantizeLinear"]) == (31, 5 * 4)
    assert not count["DynamicQuantizeLinear"] + count["MatMulInteger"]
    assert mini_int8.files["image.onnx"].bytes < 0.45 * mini.files["image.onnx"].bytes


def test_channels_of_very_different_ranges_do_not_spoil_int8(
    mini: Bundle, tmp_path: Path, pixels: NDArray[np.uint8]
) -> None:
    """The same function with four channels after each LayerNorm made 30 times as large; 0.989 without smoothing."""
    path = tmp_path / "image.onnx"
    onnx.save(with_outliers(graph_of(mini)), path)
    shutil.copytree(mini.path, tmp_path / "bundle")
    outliers = load_bundle(tmp_path / "bundle")
    shutil.copy(path, outliers.onnx_path("image"))
    expected = embed(mini, pixels)
    np.testing.assert_allclose(embed(outliers, pixels), expected, atol=1e-4)
    train = open_dataset("cifar10-sample", "train")
    calibration = [decode(sample.image, None) for sample in train.samples(0, 64)]
    feeds = (image_feeds(image[None], mini.preprocessing) for image in calibration)
    quantise(outliers.onnx_path("image"), feeds, mini.preprocessing.mean)
    assert [file.name for file in outliers.path.iterdir() if "observed" in file.name] == []
    cosine = cosines(embed(outliers, pixels), expected)
    print(f"mean cosine {cosine.mean():.5f}")
    assert cosine.mean() > 0.9995


def with_outliers(model: ModelProto) -> ModelProto:
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    random = np.random.default_rng(0)
    for norm in model.graph.node:
        products = [node for node in model.graph.node if norm.output[0] in node.input]
        if norm.op_type == "LayerNormalization" and all(
            node.op_type == "MatMul" and node.input[1] in weights for node in products
        ):
            factor = np.ones(weights[norm.input[1]].dims[0], np.float32)
            factor[random.choice(len(factor), 4, replace=False)] = 30
            for name in norm.input[1:]:
                scale(weights[name], factor)
            for node in products:
                scale(weights[node.input[1]], 1 / factor[:, None])
    return model


def scale(tensor: onnx.TensorProto, factor: NDArray[np.float32]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * factor, tensor.name))


@pytest.mark.parametrize("measure", ["mean_cosine", "top1_agreement"])
def test_an_int8_bundle_below_its_bar_is_refused(measure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify.BARS, "int8", {measure: 1.0})
    with pytest.raises(ClipmillError, match=rf"{measure.replace('_', ' ')} 0\.99\d+, int8 needs 1.0; nothing"):
        export_bundle("mini", tmp_path / "bundle", INT8)
    assert [*tmp_path.iterdir()] == []


# fp16 ---------------------------------------------------------------------------------------------------------------


def test_fp16_runs_on_the_cpu_for_a_certificate_that_says_so(mini_fp16: Bundle) -> None:
    certificate = json.loads((mini_fp16.path / "bundle.json").read_text())["certificate"]
    assert certificate["provider"] == "cpu"
    for part in (
        "made on the CPU",
        "the weights' rounding, not that of the GPU's activations",
        "nor overflow",
        "no NVIDIA driver",
    ):
        assert part in certificate["caveat"]
    assert certificate["bar"] == {"min_cosine": 0.999}
    for tower in TOWERS:
        assert certificate[tower]["min_centred_cosine"] > 0.99999  # measured 1 - 5e-7


@pytest.mark.parametrize("tower", TOWERS)
def test_fp16_keeps_the_resize_the_projection_the_norm_and_layernorm_statistics_in_float32(
    mini_fp16: Bundle, tower: str
) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(mini_fp16.path / f"{tower}.onnx"))
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    kinds |= {value.name: value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]}
    kinds |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    fp32_products = 0
    single, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    for node in model.graph.node:
        found = {kinds[name] for name in [*node.input, *node.output] if kinds.get(name) in (single, half)}
        if node.op_type == "Cast":
            continue
        if node.name.startswith(("/resize_and_crop", "/projection", "/ReduceL2")) or node.name == "/Div":
            assert found <= {single}, node.name
            fp32_products += node.op_type == "MatMul"
        else:
            assert found <= {half}, node.name
        if node.op_type == "LayerNormalization":
            stash = [attribute.i for attribute in node.attribute if attribute.name == "stash_type"]
            assert stash in ([], [single])  # float32 is also the default
    assert fp32_products == (3 if tower == "image" else 1)  # rows, columns, projection
    casts = [node for node in model.graph.node if node.op_type == "Cast" and is_float(node)]
    assert len(casts) == (3 if tower == "image" else 1)  # pixels to fp32, levels to fp16, and back for the projection
    assert mini_fp16.files[f"{tower}.onnx"].bytes < 2_600_000  # mini has 1.95M parameters


def is_float(cast: onnx.NodeProto) -> bool:
    return cast.attribute[0].i in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


def test_half_precision_leaves_the_reference_in_float32() -> None:
    """The towers share their weights with the reference model, which would then agree with anything."""
    clip = load_checkpoint("mini").model
    before = {name: weight.clone() for name, weight in clip.state_dict().items()}
    half = to_half(TextTower(clip))
    assert half.layers[0].query.weight.dtype == torch.float16
    assert half.projection.weight.dtype == torch.float32
    for name, weight in clip.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name]), name


# targets ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def require(provider: str) -> None:
        if not request.param:
            raise ClipmillError("no NVIDIA driver")

    monkeypatch.setattr(to_onnx, "require", require)
    return


@pytest.mark.parametrize(
    ("cuda", "provider", "precision", "expected"),
    [
        (False, "auto", None, ("cpu", "fp32")),
        (False, "auto", "int8", ("cpu", "int8")),
        (True, "auto", None, ("cuda", "fp16")),
        (True, "auto", "fp32", ("cuda", "fp32")),
        (False, "cuda", None, ("cuda", "fp16")),
        (True, "cpu", None, ("cpu", "fp32")),
        (False, "tensorrt", None, ("tensorrt", "fp16")),
        (True, "tensorrt", "fp32", ("tensorrt", "fp32")),
    ],
    indirect=["cuda"],
)
def test_provider_and_precision_name_a_target(
    cuda: None, provider: str, precision: str | None, expected: tuple[str, str]
) -> None:
    assert choose_target(provider, precision) == Target(*expected)


@pytest.mark.parametrize(
    ("cuda", "provider", "precision", "offered"),
    [
        (False, "cpu", "fp16", "fp32 or int8"),
        (False, "cuda", "int8", "fp16 or fp32"),
        (True, "auto", "int8", "fp16 or fp32"),
        (False, "tensorrt", "int8", "fp16 or fp32"),
        (False, "auto", "fp16", "fp32 or int8"),
    ],
    indirect=["cuda"],
)
def test_a_precision_that_a_provider_has_not_is_refused(
    cuda: None, provider: str, precision: str, offered: str
) -> None:
    with pytest.raises(ClipmillError, match=f"no {precision} for .*, which takes {offered}; see --precision"):
        choose_target(provider, precision)


def graph_of(bundle: Bundle) -> ModelProto:
    return onnx.load(bundle.onnx_path("image"))
