"""What the process may use: affinity and container quota on made-up machines, memory on this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine import machine
from engine.machine import peak_rss, usable_cpus


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 8 CPUs without any cgroup file, to be written into the folder."""
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "CGROUP_V2_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(machine, "CGROUP_V1_QUOTA", tmp_path / "cfs_quota_us")
    monkeypatch.setattr(machine, "CGROUP_V1_PERIOD", tmp_path / "cfs_period_us")
    return tmp_path


@pytest.mark.parametrize(
    ("cpu_max", "cpus"),
    [
        ("max 100000\n", 8),
        ("150000 100000\n", 1),  # one and a half: a second thread would only be throttled
        ("200000 100000\n", 2),
        ("100000 50000\n", 2),
        ("50000 100000\n", 1),  # less than one is still one
        ("1600000 100000\n", 8),  # more than there are
        ("nonsense\n", 8),
        ("", 8),
    ],
)
def test_cgroup_v2(cpu_max: str, cpus: int, cgroup: Path) -> None:
    (cgroup / "cpu.max").write_text(cpu_max)
    assert usable_cpus() == cpus


@pytest.mark.parametrize(
    ("quota", "period", "cpus"),
    [("-1\n", "100000\n", 8), ("300000\n", "100000\n", 3), ("20000\n", "100000\n", 1), ("0\n", "100000\n", 8)],
)
def test_cgroup_v1(quota: str, period: str, cpus: int, cgroup: Path) -> None:
    (cgroup / "cfs_quota_us").write_text(quota)
    (cgroup / "cfs_period_us").write_text(period)
    assert usable_cpus() == cpus


def test_no_cgroup_leaves_the_affinity(cgroup: Path) -> None:
    assert usable_cpus() == 8


def test_affinity_counts_and_not_the_machine(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 64)
    (cgroup / "cpu.max").write_text("500000 100000\n")
    assert usable_cpus() == 2


@pytest.mark.parametrize(("count", "cpus"), [(6, 6), (None, 1)])
def test_without_affinity_the_machine_counts(
    count: int | None, cpus: int, cgroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(machine.os, "sched_getaffinity")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: count)
    assert usable_cpus() == cpus


@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc")
def test_peak_memory_is_in_bytes() -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    now = int(Path("/proc/self/statm").read_text().split()[1]) * page
    peak = peak_rss()
    assert peak is not None
    # the kernel keeps its counters by CPU and lets them differ by a little
    assert 0.9 * now < peak < os.sysconf("SC_PHYS_PAGES") * page


@pytest.mark.skipif(sys.platform != "linux", reason="starts from Linux's KiB")
def test_macos_counts_bytes_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROCESS_STATUS", Path("/nowhere"))
    peak = peak_rss()
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert peak is not None
    assert peak_rss() == pytest.approx(peak / 1024, rel=0.01)


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROCESS_STATUS", Path("/nowhere"))
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_rss() is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the parent")
def test_peak_memory_is_not_the_parents() -> None:
    ballast = np.ones(300 << 17)  # 300 MiB
    program = "from engine.machine import peak_rss; print(peak_rss())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < ballast.nbytes
