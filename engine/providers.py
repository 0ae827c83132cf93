"""What this machine can run a graph on: ONNX Runtime's package, NVIDIA's driver and devices, the libraries of CUDA and
TensorRT. Each reason why a provider cannot come up is told apart, with what mends it.

ONNX Runtime alone does not tell: it lists providers whose libraries are missing, and then runs on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort

from engine.errors import ClipmillError
from engine.machine import library_versions

EXECUTION_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # each overwrites the files of the other
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
CUDA_BUILD: str = getattr(ort, "cuda_version", "")  # that the package was built for; "" in one without CUDA
TENSORRT_LIBRARIES = ("libnvinfer.so.10", "libnvonnxparser.so.10")
LOADED_FILES = Path("/proc/self/maps")


def require(provider: str, device_id: int = 0) -> None:
    """Load what a provider needs; ClipmillError names the first thing that is missing, and what mends it."""
    if EXECUTION_PROVIDERS[provider] not in ort.get_available_providers():
        raise ClipmillError(_wrong_package(provider))
    if provider == "cpu":
        return
    driver = Driver()
    if driver.cuda_version < (int(CUDA_BUILD.partition(".")[0]), 0):
        raise ClipmillError(
            f"the NVIDIA driver is too old: it serves CUDA {driver.cuda_version[0]}.{driver.cuda_version[1]}, "
            f"onnxruntime-gpu is built for {CUDA_BUILD}; update the driver, or choose --provider cpu"
        )
    if device_id >= driver.device_count:
        raise ClipmillError(
            f"there is no CUDA device {device_id}, this machine shows {driver.device_count}, counted from 0; see "
            "--device-id and CUDA_VISIBLE_DEVICES"
        )
    missing = [library for library, path in libraries(provider).items() if path is None]
    if missing:
        extras = {"tensorrt" if library in TENSORRT_LIBRARIES else "cuda" for library in missing}
        raise ClipmillError(
            f"there is an NVIDIA driver, but {', '.join(missing)} cannot be loaded; pip install -e "
            f"'.[{','.join(sorted(extras))}]', or choose --provider cpu"
        )


def _wrong_package(provider: str) -> str:
    installed = library_versions(PACKAGES)
    lacks = f"has no {'TensorRT' if provider == 'tensorrt' else 'CUDA'} provider"
    if len(installed) > 1:
        return (
            f"onnxruntime and onnxruntime-gpu are installed together, and what they left of each other {lacks}; pip "
            "uninstall both, then pip install onnxruntime-gpu, or choose --provider cpu"
        )
    return (
        f"the installed {' '.join(installed) or 'onnxruntime'} {lacks}; pip uninstall it, then pip install "
        "onnxruntime-gpu, or choose --provider cpu"
    )


def libraries(provider: str) -> dict[str, str | None]:
    """The path of each library that a provider needs, None where it does not load. Known on Linux only."""
    cuda = CUDA_BUILD.partition(".")[0]
    if provider == "cpu" or not cuda or sys.platform != "linux":
        return {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses, and stdout is for data
        ort.preload_dlls()
    needed = [f"libcublasLt.so.{cuda}", f"libcublas.so.{cuda}", "libcurand.so.10", f"libcudart.so.{cuda}"]
    needed.append("libcudnn.so.9")
    if provider == "tensorrt":
        if importlib.util.find_spec("tensorrt_libs"):  # of NVIDIA's wheel, off the loader's path: importing loads them
            importlib.import_module("tensorrt_libs")
        needed.extend(TENSORRT_LIBRARIES)
    return {library: _path(library) for library in needed}


def _path(library: str) -> str | None:
    try:
        ctypes.CDLL(library)
    except OSError:
        return None
    files = (line.split(maxsplit=5)[-1] for line in LOADED_FILES.read_text().splitlines())
    return next((file for file in files if Path(file).name.startswith(library)), library)


class Driver:
    """NVIDIA's driver through the library that comes with it, which needs nothing of CUDA's.

    Raises ClipmillError where there is none, and where it finds no device.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(DRIVER)
        except OSError as error:
            raise ClipmillError(
                f"no NVIDIA driver on this machine ({DRIVER} does not load); install it, or choose --provider cpu"
            ) from error
        self._call("cuInit", 0)

    @property
    def cuda_version(self) -> tuple[int, int]:
        """The newest CUDA that it serves."""
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        return version.value // 1000, version.value % 1000 // 10

    @property
    def device_count(self) -> int:
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def device_name(self, device_id: int) -> str:
        name = ctypes.create_string_buffer(128)
        self._call("cuDeviceGetName", name, len(name), self._device(device_id))
        return name.value.decode()

    def free_memory(self, device_id: int) -> int:
        """Bytes; makes a context on the device unless a session has."""
        device, context = self._device(device_id), ctypes.c_void_p()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxPushCurrent_v2", context)
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        self._call("cuCtxPopCurrent_v2", ctypes.byref(context))
        self._call("cuDevicePrimaryCtxRelease_v2", device)
        return free.value

    def _device(self, device_id: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), device_id)
        return device

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(name))
            raise ClipmillError(
                f"the NVIDIA driver serves no device here ({function}: {(name.value or b'error').decode()}, {code}); "
                "is one visible (CUDA_VISIBLE_DEVICES, docker --gpus all)? or choose --provider cpu"
            )
