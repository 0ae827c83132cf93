"""What a benchmark ran on: without it, its figures say nothing."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from engine.machine import library_versions, usable_cpus

LIBRARIES = (
    "onnxruntime-gpu", "onnxruntime", "torch", "transformers", "open_clip_torch", "openvino", "numpy", "pillow",
)  # fmt: skip


def machine_card() -> dict[str, str | int]:
    """Processor, CPUs, memory, system and library versions."""
    card: dict[str, str | int] = {
        "processor": _processor(),
        "usable_cpus": usable_cpus(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    if hasattr(os, "sysconf"):
        card["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return card | library_versions(LIBRARIES)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
