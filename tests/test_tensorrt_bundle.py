"""Bundles for TensorRT: what their graphs are made of, and how close to PyTorch fp32 they are as they are written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner

import cli
from engine.bundle import DEFAULT_MODEL, TOWERS, Bundle, Target, TowerName, default_output, find_bundle, load_bundle
from export.to_onnx import choose_target, export_bundle

FP16 = Target("tensorrt", "fp16")
SHAPES = ({"batch": 4, "height": 32, "width": 32, "length": 16}, {"batch": 1, "height": 8, "width": 10, "length": 5})
SHAPE_ARITHMETIC = {"Shape", "Range", "NonZero", "ArgMax", "Size", "ConstantOfShape"}
CONTROL_FLOW = {"If", "Loop", "Scan"}


@pytest.fixture(scope="module")
def mini_tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle("mini", tmp_path_factory.mktemp("tensorrt") / "mini", FP16)


def test_the_fp32_graphs_are_as_close_as_fp32_is_and_the_certificate_says_what_they_do_not_show(
    mini_tensorrt: Bundle,
) -> None:
    certificate = load_bundle(mini_tensorrt.path).certificate
    assert certificate["provider"] == "cpu"
    assert certificate["caveat"].startswith("made on the CPU: it covers the fp32 graph, not what TensorRT makes of it")
    assert certificate["bar"] == {"min_cosine": 0.999}  # that of fp16, for a machine with TensorRT
    for tower in TOWERS:
        assert certificate[tower]["min_cosine"] > 0.9999
        assert certificate[tower]["min_centred_cosine"] > 0.9999
    assert certificate["top1_agreement"] == 1


@pytest.mark.parametrize("tower", TOWERS)
def test_the_graphs_hold_nothing_but_operators_of_onnx(mini_tensorrt: Bundle, tower: TowerName) -> None:
    model = onnx.load(mini_tensorrt.onnx_path(tower))
    onnx.checker.check_model(model)
    assert [(opset.domain, opset.version >= 17) for opset in model.opset_import] == [("", True)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not CONTROL_FLOW & {node.op_type for node in model.graph.node}
    assert onnx.TensorProto.FLOAT16 not in {tensor.data_type for tensor in model.graph.initializer}


@pytest.mark.parametrize("shape", SHAPES, ids=["32x32", "8x10"])
@pytest.mark.parametrize("tower", TOWERS)
def test_fixed_shapes_leave_no_shape_arithmetic(
    mini_tensorrt: Bundle, tower: TowerName, shape: dict[str, int], tmp_path: Path
) -> None:
    """The basic level is what ONNX Runtime does to a graph before TensorRT gets it."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    for dimension, size in shape.items():
        options.add_free_dimension_override_by_name(dimension, size)
    ort.InferenceSession(mini_tensorrt.onnx_path(tower), options, providers=["CPUExecutionProvider"])
    model = onnx.load(options.optimized_model_filepath)
    assert not SHAPE_ARITHMETIC & {node.op_type for node in model.graph.node}
    assert {node.domain for node in model.graph.node} == {""}


def test_tensorrt_gets_no_uint8_but_to_cast_it(mini_tensorrt: Bundle) -> None:
    nodes = onnx.load(mini_tensorrt.onnx_path("image")).graph.node
    assert {node.op_type for node in nodes if "pixels" in node.input} <= {"Cast", "Shape"}


def test_the_precision_that_tensorrt_is_told_is_part_of_the_fingerprint(mini_tensorrt: Bundle) -> None:
    fp32 = dataclasses.replace(mini_tensorrt, target=Target("tensorrt", "fp32"))
    assert fp32.fingerprint != mini_tensorrt.fingerprint


def test_the_default_output_and_bundle(mini_tensorrt: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = default_output(DEFAULT_MODEL, choose_target("tensorrt", None))
    assert output == Path("models/clip-vit-base-patch32-tensorrt-fp16")
    output.parent.mkdir()
    output.symlink_to(mini_tensorrt.path)
    assert find_bundle(None, "tensorrt").target == FP16


def test_int8_is_refused_in_one_line() -> None:
    result = CliRunner().invoke(cli.main, ["export", "--provider", "tensorrt", "--precision", "int8"])
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: no int8 for the tensorrt provider, which takes fp16 or fp32; see --precision and --provider\n"
    )
