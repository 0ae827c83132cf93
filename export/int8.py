"""int8 for the CPU: the matrix products of an exported image tower in 8-bit integers.

An image's embedding does not depend on its batch-mates, to the bit: every scale is a constant of the graph. What they
are was chosen by measurement (time of a ViT-B/32 on one AVX-512 VNNI core against fp32; mean cosine of the trained
miniature; mean cosine of random ViT-B/32 weights after subtracting the mean embedding):

    static scale, weights of 8 bits      2.6x  0.99995  0.9985
    static scale, weights of 7 bits      2.6x  0.99991  0.9966   <- this file
    a scale for each token               2.2x  0.99997  0.9985
    a scale for each batch (dynamic)     2.7x  depends on the batch
    MatMulNBits, 8 bits, blocks of 256   1.2x  a scale for each block of each token

Weights have 7 bits because processors without VNNI instructions add pairs of products in 16 bits, which 8 bits overflow
without a word: the certificate would hold only on the machine that made it.

Channels of very different ranges, which trained transformers have, spoil a scale that they share; so the LayerNorm
before a product hands part of each channel's range to the weights (SmoothQuant, Xiao et al. 2023, equation 4 with
alpha = 0.5). Four channels of the miniature made thirty times as large, the function unchanged: 0.989 without, 0.99993
with it, at 8 bits. The patch embedding takes the pixels' levels as they are, and its bias absorbs what its weights'
rounding does to an average image (0.9943 centred without, 0.9970 with it, at 8 bits). The last layer works on one token
and stays in fp32, and so does attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

WEIGHT_MAX = 63  # 7 bits with the sign: two products with a uint8 sum to at most 2 * 255 * 63 < 2**15
LEVELS = 255  # steps of a uint8


@dataclass
class Range:
    """What a tensor was seen to hold in each channel, (D,) float32 each."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]


def quantise(path: Path, calibration: Iterable[Mapping[str, NDArray[Any]]], mean: tuple[float, ...]) -> None:
    """Quantise the fp32 image tower at `path` in place.

    calibration: feeds of the tower, whose activations set the scales. mean: of each colour channel, 0 to 1.
    """
    model = onnx.load(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and _is_matrix(weights, node.input[1])]
    patches = [node for node in products if "patch_embedding" in node.name]
    dense = [node for node in products if node.name.startswith("/layers.")]
    assert len(patches) == 1, f"{len(patches)} products over patches: the exported names have changed"
    assert dense, "no layer has products: the exported names have changed"
    ranges = _observe(path, model, sorted({node.input[0] for node in dense}), calibration)
    _smooth(model, weights, dense, ranges)
    graph = _Rewriting(model, weights)
    for node in dense:
        graph.quantise_dense(node, ranges[node.input[0]])
    graph.quantise_patches(patches[0], mean)
    graph.save(path)


def _is_matrix(weights: Mapping[str, TensorProto], name: str) -> bool:
    return name in weights and len(weights[name].dims) == 2


def _observe(
    path: Path, model: ModelProto, names: list[str], calibration: Iterable[Mapping[str, NDArray[Any]]]
) -> dict[str, Range]:
    """The range of each named tensor, channel by channel, over the calibration feeds."""
    observed = ModelProto()
    observed.CopyFrom(model)
    observed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    file = path.with_suffix(".observed.onnx")
    onnx.save(observed, file)
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    ranges: dict[str, Range] = {}
    for feeds in calibration:
        for name, values in zip(names, session.run(names, dict(feeds)), strict=True):
            channels = values.reshape(-1, values.shape[-1])
            low, high = channels.min(axis=0), channels.max(axis=0)
            if name in ranges:
                low, high = np.minimum(low, ranges[name].low), np.maximum(high, ranges[name].high)
            ranges[name] = Range(low, high)
    file.unlink()
    return ranges


def _smooth(
    model: ModelProto, weights: Mapping[str, TensorProto], dense: list[NodeProto], ranges: Mapping[str, Range]
) -> None:
    """Divide LayerNorm's channels by a factor each, and multiply the rows of the weights that they meet: exact."""
    for norm in model.graph.node:
        consumers = [node for node in model.graph.node if norm.output[0] in node.input]
        if norm.op_type != "LayerNormalization" or not all(node in dense for node in consumers):
            continue
        seen = ranges[norm.output[0]]
        activation = np.maximum(-seen.low, seen.high)
        weight = np.max([np.abs(_array(weights[node.input[1]])).max(axis=1) for node in consumers], axis=0)
        tiny = np.finfo(np.float32).tiny  # a channel without activations or weights
        factor = np.sqrt(np.maximum(activation, tiny) / np.maximum(weight, tiny)).astype(np.float32)
        for name in norm.input[1:]:
            _replace(weights[name], _array(weights[name]) / factor)
        for node in consumers:
            _replace(weights[node.input[1]], _array(weights[node.input[1]]) * factor[:, None])
        seen.low, seen.high = seen.low / factor, seen.high / factor


class _Rewriting:
    """A graph whose products are replaced one by one, and the constants that this adds."""

    def __init__(self, model: ModelProto, weights: dict[str, TensorProto]) -> None:
        self.model, self.nodes, self.weights = model, list(model.graph.node), weights

    def quantise_dense(self, node: NodeProto, seen: Range) -> None:
        """MatMul and the Add of its bias -> MatMulIntegerToFloat of its quantised input."""
        tensor, weight = node.input
        quantised = f"{tensor}_quantised"
        low, high = min(float(seen.low.min()), 0.0), max(float(seen.high.max()), 0.0)
        scale = (high - low) / LEVELS
        scale_name = self._constant(f"{tensor}_scale", np.float32(scale))
        zero_point = self._constant(f"{tensor}_zero_point", np.uint8(np.rint(-low / scale)))
        if not any(quantised in other.output for other in self.nodes):  # queries, keys and values share theirs
            self._insert(node, helper.make_node("QuantizeLinear", [tensor, scale_name, zero_point], [quantised]))
        bias, output = self._take_bias(node)
        integers, scales = self._quantised_weight(weight)
        self._become(node, [quantised, integers, scale_name, scales, zero_point, "", bias], output)

    def quantise_patches(self, node: NodeProto, mean: tuple[float, ...]) -> None:
        """The product over patches takes the levels 0..255 of the pixels as the uint8 that they are."""
        tensor, weight = node.input
        clip = self._producer(tensor)
        while clip.op_type in ("Reshape", "Transpose"):
            clip = self._producer(clip.input[0])
        assert clip.op_type == "Clip", "the levels come from elsewhere: the exported pattern has changed"
        levels = clip.output[0]
        clip.output[0] = f"{levels}_float"
        cast = helper.make_node("Cast", [clip.output[0]], [levels], to=TensorProto.UINT8)
        self.nodes.insert(self.nodes.index(clip) + 1, cast)

        exact = _array(self.weights[weight])  # (3 P P, D), a colour channel after the other
        integers, scales = self._quantised_weight(weight)
        error = exact - _array(self.weights[integers]) * _array(self.weights[scales])
        average = np.repeat(np.multiply(mean, LEVELS), len(exact) // len(mean))
        (add,) = (other for other in self.nodes if node.output[0] in other.input)
        bias = self.weights[next(name for name in add.input if name in self.weights)]
        _replace(bias, _array(bias) + (average @ error).astype(np.float32))
        one, zero = self._constant("level_scale", np.float32(1)), self._constant("level_zero_point", np.uint8(0))
        self._become(node, [tensor, integers, one, scales, zero], node.output[0])

    def save(self, path: Path) -> None:
        graph = self.model.graph
        used = {name for node in self.nodes for name in node.input}
        tensors = [tensor for name, tensor in self.weights.items() if name in used]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(tensors)
        onnx.save(self.model, path)

    def _quantised_weight(self, name: str) -> tuple[str, str]:
        """Names of the int8 weight (K, N) and of its scales, one a column (N,)."""
        weight = _array(self.weights[name])
        scales = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny) / np.float32(WEIGHT_MAX)
        integers = np.clip(np.rint(weight / scales), -WEIGHT_MAX, WEIGHT_MAX).astype(np.int8)
        return self._constant(f"{name}_quantised", integers), self._constant(f"{name}_scale", scales)

    def _take_bias(self, node: NodeProto) -> tuple[str, str]:
        """(name of the bias that is added to a product, or "", and of the sum); that Add is removed."""
        output = node.output[0]
        consumers = [other for other in self.nodes if output in other.input]
        if len(consumers) == 1 and consumers[0].op_type == "Add":
            (other,) = (name for name in consumers[0].input if name != output)
            if other in self.weights:
                self.nodes.remove(consumers[0])
                return other, consumers[0].output[0]
        return "", output

    def _become(self, node: NodeProto, inputs: list[str], output: str) -> None:
        product = helper.make_node("MatMulIntegerToFloat", inputs, [output], node.name, domain="com.microsoft")
        self.nodes[self.nodes.index(node)] = product

    def _insert(self, before: NodeProto, node: NodeProto) -> None:
        self.nodes.insert(self.nodes.index(before), node)

    def _producer(self, tensor: str) -> NodeProto:
        return next(node for node in self.nodes if tensor in node.output)

    def _constant(self, name: str, value: Any) -> str:
        self.weights[name] = numpy_helper.from_array(np.asarray(value), name)
        return name


def _array(tensor: TensorProto) -> NDArray[Any]:
    array: NDArray[Any] = numpy_helper.to_array(tensor)
    return array


def _replace(tensor: TensorProto, value: NDArray[np.float32]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
