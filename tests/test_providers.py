"""Why a provider cannot come up, each cause told apart with its mend; and what `providers` says of a machine."""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime as ort
import pytest
from click.testing import CliRunner
from gpus import Machine, machine

import cli
from engine import diagnosis, providers
from engine.errors import ClipmillError
from engine.providers import Driver, libraries, require

__all__ = ["machine"]  # a fixture


def refusal(provider: str = "cuda", device_id: int = 0) -> str:
    with pytest.raises(ClipmillError) as raised:
        require(provider, device_id)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The onnxruntime packages that are installed."""
    installed: dict[str, str] = {}
    for module in (providers, diagnosis):
        monkeypatch.setattr(module, "library_versions", lambda names: installed)
    return installed


# Causes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["cpu", "cuda", "tensorrt"])
def test_nothing_is_missing_where_all_is_there(provider: str, machine: Machine) -> None:
    require(provider)


@pytest.mark.parametrize(("provider", "lacks"), [("cuda", "CUDA"), ("tensorrt", "TensorRT")])
def test_a_package_without_the_provider(provider: str, lacks: str, machine: Machine, packages: dict[str, str]) -> None:
    machine.providers = ["CPUExecutionProvider"]
    packages["onnxruntime"] = "1.31.1"
    assert refusal(provider) == (
        f"the installed onnxruntime has no {lacks} provider; pip uninstall it, then pip install onnxruntime-gpu, or "
        "choose --provider cpu"
    )
    assert machine.loaded == []


def test_both_packages_installed_together(machine: Machine, packages: dict[str, str]) -> None:
    machine.providers = ["CPUExecutionProvider"]
    packages |= {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    message = refusal()
    assert message.startswith("onnxruntime and onnxruntime-gpu are installed together, and what they left")
    assert "has no CUDA provider; pip uninstall both, then pip install onnxruntime-gpu" in message


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_no_driver(provider: str, machine: Machine) -> None:
    machine.driver = False
    assert refusal(provider) == (
        "no NVIDIA driver on this machine (libcuda.so.1 does not load); install it, or choose --provider cpu"
    )
    assert machine.loaded == []  # no library is looked for in vain


def test_a_driver_without_a_device(machine: Machine) -> None:
    machine.failure = 100
    message = refusal()
    assert message.startswith("the NVIDIA driver serves no device here (cuInit: CUDA_ERROR_NO_DEVICE, 100); ")
    assert "CUDA_VISIBLE_DEVICES" in message


def test_a_driver_that_is_too_old(machine: Machine) -> None:
    machine.cuda = 12040
    assert refusal() == (
        "the NVIDIA driver is too old: it serves CUDA 12.4, onnxruntime-gpu is built for 13.0; update the driver, or "
        "choose --provider cpu"
    )


def test_a_device_that_is_not_there(machine: Machine) -> None:
    message = refusal(device_id=2)
    assert message.startswith("there is no CUDA device 2, this machine shows 2, counted from 0; see --device-id")
    require("cuda", 1)


@pytest.mark.parametrize(
    ("provider", "missing", "extra"),
    [
        ("cuda", {"libcublas.so.13"}, "cuda"),
        ("cuda", {"libcudnn.so.9"}, "cuda"),
        ("tensorrt", {"libcudnn.so.9"}, "cuda"),
        ("tensorrt", {"libnvinfer.so.10"}, "tensorrt"),
        ("tensorrt", {"libcudart.so.13", "libnvonnxparser.so.10"}, "cuda,tensorrt"),
    ],
)
def test_missing_libraries_are_named_with_the_extra_that_brings_them(
    provider: str, missing: set[str], extra: str, machine: Machine
) -> None:
    machine.missing = missing
    message = refusal(provider)
    assert message.startswith("there is an NVIDIA driver, but ")
    assert all(library in message for library in missing)
    assert f"; pip install -e '.[{extra}]', or choose --provider cpu" in message
    assert sum(library in message for library in libraries(provider)) == len(missing)


def test_cuda_does_without_tensorrt(machine: Machine) -> None:
    machine.missing = {"libnvinfer.so.10", "libnvonnxparser.so.10"}
    require("cuda")


def test_what_loading_prints_does_not_reach_stdout(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcudart"))
    require("cuda")
    assert capsys.readouterr().out == ""


def test_the_libraries_of_nvidias_tensorrt_wheel_are_loaded(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorrt_libs")
    monkeypatch.setattr(importlib, "import_module", lambda name: loaded.append(name) or ModuleType(name))
    libraries("cuda")
    assert loaded == []
    libraries("tensorrt")
    assert loaded == ["tensorrt_libs"]


def test_where_a_library_lies(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r--p 00000000 08:01 123 /opt/a folder/libcublasLt.so.13.1.0\n7f02-7f03 rw-p 00000000 00:00 0\n"
    )
    monkeypatch.setattr(providers, "LOADED_FILES", maps)
    machine.missing = {"libcudnn.so.9"}
    found = libraries("cuda")
    assert found["libcublasLt.so.13"] == "/opt/a folder/libcublasLt.so.13.1.0"
    assert (found["libcublas.so.13"], found["libcudnn.so.9"]) == ("libcublas.so.13", None)


def test_the_driver_tells_its_devices(machine: Machine) -> None:
    driver = Driver()
    assert (driver.cuda_version, driver.device_count) == ((13, 0), 2)
    assert [driver.device_name(device) for device in range(2)] == ["NVIDIA Test 0", "NVIDIA Test 1"]
    machine.free = [123]
    assert driver.free_memory(1) == 123


def test_the_functions_of_the_driver_exist() -> None:
    """Where there is one; a misspelt function is found nowhere else."""
    try:
        library = ctypes.CDLL(providers.DRIVER)
    except OSError:
        pytest.skip("no NVIDIA driver on this machine")
    names = ["cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuGetErrorName"]
    names += ["cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuMemGetInfo_v2", "cuCtxPopCurrent_v2"]
    for name in [*names, "cuDevicePrimaryCtxRelease_v2"]:
        assert getattr(library, name)


# The command --------------------------------------------------------------------------------------------------------


def told(*arguments: str) -> str:
    result = CliRunner().invoke(cli.main, ["providers", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_providers_of_a_machine_with_everything(machine: Machine, packages: dict[str, str]) -> None:
    packages["onnxruntime-gpu"] = "1.31.1"
    found: dict[str, Any] = json.loads(told("--json"))
    assert found["packages"] == {"onnxruntime-gpu": "1.31.1"}
    assert found["build"] == {"version": ort.__version__, "cuda": "13.0", "providers": machine.providers}
    assert found["driver"] == {"cuda": "13.0"}
    assert [device["name"] for device in found["devices"]] == ["NVIDIA Test 0", "NVIDIA Test 1"]
    assert found["providers"] == {"cpu": None, "cuda": None, "tensorrt": None}
    assert (found["auto"], found["why"], found["mixed"]) == ("cuda", "a CUDA session came up", None)
    # a session of each was tried, with the CPU out of the way
    tried = {made.asked_for[0]: made.config("session.disable_cpu_ep_fallback") for made in machine.sessions}
    assert tried == {"CPUExecutionProvider": "", "CUDAExecutionProvider": "1", "TensorrtExecutionProvider": "1"}
    text = told()
    assert "device 1  NVIDIA Test 1, 10.0 GiB free" in text
    assert "auto      takes cuda: a CUDA session came up" in text


def test_providers_tells_what_each_lacks(machine: Machine, packages: dict[str, str]) -> None:
    packages |= {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    machine.missing = {"libcudnn.so.9"}
    text = told()
    assert "installed together, they overwrite each other" in text
    assert "library   libcudnn.so.9        not found" in text
    assert "cuda      there is an NVIDIA driver, but libcudnn.so.9 cannot be loaded; pip install -e '.[cuda]'" in text
    assert "auto      takes cpu: there is an NVIDIA driver, but libcudnn.so.9 cannot be loaded\n" in text


def test_providers_tries_and_does_not_trust(machine: Machine) -> None:
    """Everything seems to be there, and still no session comes up."""
    machine.falls_back = True
    found = json.loads(told("--json"))
    assert found["providers"]["cpu"] is None
    assert found["providers"]["cuda"].startswith("provider cuda did not come up")
    assert found["auto"] == "cpu"


def test_providers_without_a_driver(machine: Machine) -> None:
    machine.driver = False
    text = told()
    assert "driver    no NVIDIA driver on this machine (libcuda.so.1 does not load)\n" in text
    assert "cpu       comes up" in text
    assert "auto      takes cpu: no NVIDIA driver" in text


@pytest.mark.skipif(sys.platform != "linux", reason="the libraries are known on Linux only")
def test_providers_of_this_machine_whatever_it_is() -> None:
    found = json.loads(told("--json"))
    assert found["providers"]["cpu"] is None
    assert found["auto"] in ("cpu", "cuda")
    assert set(found["libraries"]) == set(libraries("tensorrt"))
