"""What this process may use of the machine it runs on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Iterable
from pathlib import Path

CGROUP_V2_QUOTA = Path("/sys/fs/cgroup/cpu.max")
CGROUP_V1_QUOTA = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
CGROUP_V1_PERIOD = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
PROCESS_STATUS = Path("/proc/self/status")


def usable_cpus() -> int:
    """CPUs that this process may keep busy: its affinity, cut by a container's CPU quota (os.cpu_count is neither)."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def _cgroup_quota() -> float | None:
    """CPU seconds a second, or None where there is no limit."""
    try:
        if CGROUP_V2_QUOTA.exists():
            quota, period = CGROUP_V2_QUOTA.read_text().split()
        else:
            quota, period = CGROUP_V1_QUOTA.read_text(), CGROUP_V1_PERIOD.read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no cgroup, or "max"
        return None


def cache_folder() -> Path:
    """Where clipmill keeps what it can make again; not made yet, maybe."""
    # an empty XDG_CACHE_HOME counts as none, says its specification
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clipmill"


def peak_rss() -> int | None:
    """Bytes of memory that this process has held at most; None where the system does not tell (Windows)."""
    if PROCESS_STATUS.exists():  # on Linux getrusage also counts what the parent held before this program began
        high_water = next(line for line in PROCESS_STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(high_water.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others KiB


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of the packages of these names that are installed."""
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
