"""What is written for people with a GPU: docs/gpu.md, the extras, and the acceptance script as far as it goes here."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

import cli
from engine.bundle import Bundle
from engine.errors import ClipmillError
from engine.providers import require

ROOT = Path(cli.__file__).resolve().parent
SCRIPT = ROOT / "benchmarks" / "gpu_acceptance.sh"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MACHINES = {
    ("linux", "x86_64"): True,
    ("win32", "AMD64"): True,
    ("linux", "aarch64"): False,
    ("darwin", "x86_64"): False,
    ("darwin", "arm64"): False,
}


def parse(words: list[str]) -> None:
    """Let click parse a command line of cli.py; it exits with 2 where that is wrong."""
    command: click.Command = cli.main
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    command.make_context("gpu", words)


# docs/gpu.md --------------------------------------------------------------------------------------------------------


def test_the_commands_of_the_page_parse() -> None:
    lines = re.findall(r"^python cli\.py ([^#\n]+)", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        parse(shlex.split(line))


def test_every_error_of_the_page_is_one_that_the_code_has() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    rows = page.partition("| it says |")[2].partition("\n## ")[0]
    said = [part for cell in re.findall(r"^\| (`.*?) \|", rows, re.MULTILINE) for part in re.findall("`(.*?)`", cell)]
    assert len(said) >= 15
    texts = "\n".join(text for folder in ("engine", "export") for text in texts_of(ROOT / folder))
    assert [part for part in said if part not in texts] == []


def texts_of(folder: Path) -> list[str]:
    """The string literals of a folder's modules, f-strings without what they put in."""
    nodes = [node for path in folder.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


# pyproject.toml -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", ["cuda", "tensorrt"])
def test_the_extras_are_for_linux_and_windows_on_x86_64(extra: str) -> None:
    requirements = [Requirement(line) for line in EXTRAS[extra]]
    for requirement in requirements:
        if requirement.name == "clipmill":
            continue
        assert requirement.specifier, requirement
        assert requirement.marker
        for (system, machine), wanted in MACHINES.items():
            environment = {"sys_platform": system, "platform_machine": machine}
            assert requirement.marker.evaluate(environment) is wanted, (requirement, system, machine)


def test_the_extras_name_what_onnxruntime_loads() -> None:
    names = {Requirement(line).name for line in EXTRAS["cuda"]}
    parts = ("cublas", "cudnn-cu13", "cuda-runtime", "cuda-nvrtc", "cufft", "curand")
    assert names == {f"nvidia-{part}" for part in parts}
    (libraries,) = (Requirement(line) for line in EXTRAS["tensorrt"] if not line.startswith("clipmill"))
    assert libraries.name == "tensorrt-cu13-libs"
    assert libraries.specifier.contains("10.14.1.48.post1")
    assert not libraries.specifier.contains("11.0.0.114")  # another soname


def test_no_other_extra_brings_them() -> None:
    for extra in EXTRAS.keys() - {"cuda", "tensorrt"}:
        for requirement in map(Requirement, EXTRAS[extra]):
            assert not {"cuda", "tensorrt"} & requirement.extras, extra
            assert not requirement.name.startswith(("nvidia", "tensorrt")), extra


# benchmarks/gpu_acceptance.sh ---------------------------------------------------------------------------------------


def acceptance(folder: Path, python: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(python)}
    return subprocess.run(["bash", SCRIPT], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_script_is_sound_bash() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert SCRIPT.stat().st_mode & stat.S_IXUSR


def test_without_a_driver_the_script_stops_at_once_and_the_report_says_why(tmp_path: Path) -> None:
    try:
        require("cuda")
    except ClipmillError as error:
        reason = str(error)
    else:
        pytest.skip("this machine has a GPU: run the script itself")
    done = acceptance(tmp_path, sys.executable)
    report = (tmp_path / "gpu_report.md").read_text()
    assert done.returncode == 1
    for text in (done.stdout, report):
        assert reason in text
        assert text.rstrip().endswith(f"FAILED at: The providers. See {tmp_path / 'gpu_report.md'}")
    assert "Not finished" in report
    assert re.search(r"^usable_cpus +\d+$", report, re.MULTILINE)
    assert re.findall("^## (.*)$", report, re.MULTILINE) == ["The machine", "The providers"]
    assert [file.name for file in tmp_path.iterdir()] == ["gpu_report.md"]


@pytest.mark.parametrize("tensorrt", [True, False])
def test_with_a_gpu_the_script_goes_through_its_steps(tensorrt: bool, tmp_path: Path) -> None:
    """Played by a Python that does nothing but write down its arguments and succeed."""
    stub, calls = tmp_path / "python", tmp_path / "calls"
    # of the checks it is told by the last argument which provider they ask for
    fails = "false" if tensorrt else '[[ $1 == -c && "${!#}" == tensorrt ]] && echo "no TensorRT" && exit 1'
    record = f'echo "$(printf \'%q \' "$@")" >> {calls}'  # in one write, for a pipe runs two at once
    stub.write_text(f"#!/usr/bin/env bash\n{fails}\n{record}\n")
    stub.chmod(0o755)
    done = acceptance(tmp_path, stub)
    assert done.returncode == 0, done.stdout
    report = (tmp_path / "gpu_report.md").read_text()
    assert "All steps passed." in report
    assert "Not finished" not in report
    assert ("TensorRT's steps are left out: no TensorRT" in report) is not tensorrt
    assert f"All of it is in {tmp_path / 'gpu_report.md'}" in done.stdout
    assert done.stdout.count("== ") == done.stdout.count("   expect: ") == (11 if tensorrt else 7)
    lines = [shlex.split(line) for line in calls.read_text().splitlines() if line.startswith("cli.py ")]
    for words in lines:
        parse(words[1:])
    for provider in ("cuda", "tensorrt") if tensorrt else ("cuda",):
        assert sum(provider in words for words in lines) == 3  # export, extract, zero-shot
    assert "benchmarks/gpu_throughput.py" in calls.read_text()


def test_throughput_is_measured_beside_transformers_in_fp16(mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_throughput

    command = [str(mini.path), "--images", "12", "--rounds", "1"]
    result = CliRunner().invoke(gpu_throughput.main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    names = {"transformers fp16", "transformers fp16, forward alone", "clipmill cpu fp32"}
    assert found["speeds"].keys() == names
    assert all(speed["median"] > 0 for speed in found["speeds"].values())
    assert found["stages"]["clipmill cpu fp32"].keys() == {"read", "decode", "run", "write"}
    for name in names:
        assert name in result.stdout
