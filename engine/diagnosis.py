"""What `providers` tells: the package, driver, libraries and devices of this machine, which provider comes up, and why
each of the others does not."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort
from onnxruntime.datasets import get_example

from engine.errors import ClipmillError
from engine.machine import library_versions
from engine.providers import CUDA_BUILD, EXECUTION_PROVIDERS, PACKAGES, Driver, libraries, require
from engine.session import CUDA_OPTIONS, open_session


def diagnose() -> dict[str, Any]:
    """As JSON. `providers`: for each, None where a session of it came up, else the cause and its mend in one line.

    `auto` is what it would take of a bundle that both can run, and why.
    """
    packages = library_versions(PACKAGES)
    came_up = {provider: _failure(provider) for provider in EXECUTION_PROVIDERS}
    why = "a CUDA session came up" if came_up["cuda"] is None else came_up["cuda"].partition("; ")[0]
    return {
        "packages": packages,
        "mixed": "installed together, they overwrite each other: uninstall both, then install onnxruntime-gpu"
        if len(packages) > 1
        else None,
        "build": {"version": ort.__version__, "cuda": CUDA_BUILD, "providers": ort.get_available_providers()},
        **_driver(),
        "libraries": libraries("tensorrt"),
        "providers": came_up,
        "auto": "cuda" if came_up["cuda"] is None else "cpu",
        "why": why,
    }


def _failure(provider: str) -> str | None:
    """Why no session of a provider comes up, tried with a graph of one multiplication."""
    try:
        require(provider)
        open_session(get_example("mul_1.onnx"), provider, CUDA_OPTIONS if provider == "cuda" else {}, {})
    except ClipmillError as error:
        return str(error)
    return None


def _driver() -> dict[str, Any]:
    try:
        driver = Driver()
        devices = [
            {"id": device, "name": driver.device_name(device), "free_bytes": driver.free_memory(device)}
            for device in range(driver.device_count)
        ]
        return {"driver": {"cuda": ".".join(map(str, driver.cuda_version))}, "devices": devices}
    except ClipmillError as error:
        return {"driver": {"missing": str(error).partition("; ")[0]}, "devices": []}
