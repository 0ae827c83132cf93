"""What ONNX Runtime makes of the towers with the fixed shapes of a GPU: no shape arithmetic and no integer ArgMax.

CUDA would leave both to the CPU, and a session for CUDA then refuses to come up.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from onnx import GraphProto, NodeProto

from engine.bundle import TOWERS, Bundle, Target, TowerName

SHAPES = {"image": {"batch": 256, "height": 32, "width": 32}, "text": {"batch": 64, "length": 32}}
NOT_ON_CUDA = {"Shape", "Range", "NonZero", "Size", "ConstantOfShape", "ArgMax"}


@pytest.fixture(scope="module")
def mini_fp16(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from export.to_onnx import export_bundle

    return export_bundle("mini", tmp_path_factory.mktemp("fp16") / "mini", Target("cuda", "fp16"))


def optimised(bundle: Bundle, tower: TowerName, tmp_path: Path) -> onnx.ModelProto:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / f"{tower}.onnx")
    for dimension, size in SHAPES[tower].items():
        options.add_free_dimension_override_by_name(dimension, size)
    ort.InferenceSession(bundle.onnx_path(tower), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath)


def nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Those of its subgraphs, too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes(attribute.g)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_no_node_is_left_for_the_cpu(
    precision: str, tower: TowerName, mini: Bundle, mini_fp16: Bundle, tmp_path: Path
) -> None:
    model = optimised(mini if precision == "fp32" else mini_fp16, tower, tmp_path)
    shapes = [[axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in model.graph.input]
    assert all(size > 0 for shape in shapes for size in shape)  # no dimension is free
    found = [node.op_type for node in nodes(model.graph)]
    assert "MatMul" in found or "Gemm" in found
    assert set(found).isdisjoint(NOT_ON_CUDA), sorted(set(found) & NOT_ON_CUDA)


@pytest.mark.parametrize("tower", TOWERS)
def test_without_fixed_shapes_there_would_be_such_nodes(tower: TowerName, mini: Bundle) -> None:
    """Or the test above would prove nothing."""
    exported = {node.op_type for node in nodes(onnx.load(mini.onnx_path(tower)).graph)}
    assert exported & NOT_ON_CUDA
