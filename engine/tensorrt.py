"""What ONNX Runtime is told for TensorRT: one engine of one static shape, built once and kept.

~/.cache/clipmill/tensorrt/<bundle>/<GPU>-<TensorRT version>/  engines and the timings that building another starts from
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from engine.bundle import Bundle, TowerName
from engine.errors import ClipmillError
from engine.machine import cache_folder
from engine.providers import TENSORRT_LIBRARIES, Driver


def tensorrt_options(bundle: Bundle, name: TowerName, device_id: int, shape: Mapping[str, int]) -> dict[str, str]:
    """The provider options of a tower; makes the folder that its engines are kept in.

    Raises ClipmillError where that cannot be made. TensorRT must be loaded (engine/providers.py, require).
    """
    device = "-".join(Driver().device_name(device_id).split())
    folder = cache_folder() / "tensorrt" / bundle.fingerprint[:16] / f"{device}-{_version()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClipmillError(
            f"cannot keep TensorRT engines in {folder} ({error.strerror}); set XDG_CACHE_HOME to a folder that can be "
            "written, or choose --provider cuda"
        ) from error
    inputs = _input_shapes(bundle, name, shape)
    profile = ",".join(f"{input_name}:{'x'.join(map(str, sizes))}" for input_name, sizes in inputs.items())
    return {
        "device_id": str(device_id),
        "trt_fp16_enable": str(bundle.target.precision == "fp16"),  # of an fp32 graph
        "trt_layer_norm_fp32_fallback": "True",
        "trt_builder_optimization_level": "3",  # TensorRT's own; higher ones build longer, for what was not measured
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": "-".join([name, *(f"{dimension}{size}" for dimension, size in shape.items())]),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
        "trt_profile_min_shapes": profile,
        "trt_profile_opt_shapes": profile,
        "trt_profile_max_shapes": profile,
    }


def _version() -> str:
    """Such as "10.14.1", of the library that is loaded."""
    version = ctypes.CDLL(TENSORRT_LIBRARIES[0]).getInferLibVersion()
    return f"{version // 10_000}.{version // 100 % 100}.{version % 100}"


def _input_shapes(bundle: Bundle, name: TowerName, shape: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    if name == "text":
        return {"input_ids": (shape["batch"], shape["length"]), "eos_position": (shape["batch"],)}
    crop, height, width = bundle.preprocessing.crop, shape["height"], shape["width"]
    return {"pixels": (shape["batch"], height, width, 3), "rows": (crop, height), "columns": (crop, width)}
