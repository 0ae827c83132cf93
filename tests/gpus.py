"""A machine with NVIDIA GPUs, as far as the engine can tell: the driver and the libraries are stubs, and a session runs
on the CPU with the shapes and options that it was given for the GPU."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from typing import Any

import onnxruntime as ort
import pytest

REAL_SESSION, REAL_CDLL, REAL_BUFFER = ort.InferenceSession, ctypes.CDLL, ort.OrtValue.ortvalue_from_shape_and_type
GIB = 2**30


@dataclass
class Machine:
    """What there is, to be changed by a test; and what was made on it."""

    providers: list[str] = field(
        default_factory=lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    driver: bool = True
    cuda: int = 13000
    devices: int = 2
    failure: int = 0  # of the driver
    missing: set[str] = field(default_factory=set)  # libraries
    free: list[int] = field(default_factory=list)  # memory, each time it is asked
    falls_back: bool = False  # as a provider does that cannot be loaded
    refuses: str = ""  # what a session is refused with
    loaded: list[str] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    buffers: list[tuple[Any, ...]] = field(default_factory=list)  # shape, dtype, device, id

    def load(self, name: Any, *arguments: Any, **options: Any) -> Any:
        if name is None or ("libcu" not in str(name) and "libnv" not in str(name)):
            return REAL_CDLL(name, *arguments, **options)
        if name in self.missing or (name == "libcuda.so.1" and not self.driver):
            raise OSError(f"{name}: cannot open shared object file")
        self.loaded.append(name)
        return Library(self)

    def open(self, path: Any, options: ort.SessionOptions, **keywords: Any) -> Session:
        session = Session(self, path, options, keywords)
        self.sessions.append(session)
        if self.refuses and keywords["providers"][0][0] != "CPUExecutionProvider":
            raise RuntimeError(self.refuses)
        return session

    def buffer(self, shape: Any, dtype: Any, *device: Any) -> ort.OrtValue:
        self.buffers.append((tuple(shape), dtype, *device))
        return REAL_BUFFER(shape, dtype, "cpu", 0)


class Library:
    """libcuda and libnvinfer in one."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def __getattr__(self, name: str) -> Any:  # what needs no answer
        return lambda *_: self.machine.failure

    def cuGetErrorName(self, code: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_NO_DEVICE"
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.machine.cuda
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.machine.devices
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        name.value = b"NVIDIA Test " + str(device.value).encode()
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        free._obj.value = self.machine.free.pop(0) if self.machine.free else 10 * GIB
        total._obj.value = 80 * GIB
        return 0

    def getInferLibVersion(self) -> int:
        return 101401


class Session:
    """Takes what InferenceSession takes; claims the provider asked for."""

    def __init__(self, machine: Machine, path: Any, options: ort.SessionOptions, keywords: dict[str, Any]) -> None:
        self.machine, self.path, self.options, self.keywords = machine, path, options, keywords
        self.asked_for = keywords["providers"][0]
        self.lock = threading.Lock()

    @property
    def real(self) -> ort.InferenceSession:
        with self.lock:
            if "_real" not in self.__dict__:
                self.options.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
                self._real = REAL_SESSION(self.path, self.options, providers=["CPUExecutionProvider"])
        return self._real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"] if self.machine.falls_back else [self.asked_for[0], "CPUExecutionProvider"]

    def config(self, key: str) -> str:
        """A session config entry; "" where it was not set."""
        try:
            return str(self.options.get_session_config_entry(key))
        except Exception:
            return ""

    @property
    def input_shapes(self) -> dict[str, list[int | str]]:
        return {value.name: value.shape for value in self.real.get_inputs()}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Machine:
    pretended = Machine()
    monkeypatch.setattr(ort, "get_available_providers", lambda: pretended.providers)
    monkeypatch.setattr(ort, "preload_dlls", lambda: pretended.loaded.append("preload"), raising=False)
    monkeypatch.setattr(ort, "InferenceSession", pretended.open)
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", pretended.buffer)
    monkeypatch.setattr(ctypes, "CDLL", pretended.load)
    monkeypatch.setattr("engine.providers.CUDA_BUILD", "13.0")
    monkeypatch.setattr("engine.providers.sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return pretended
