"""Extraction and prompts on a GPU, every step of which runs here on the CPU (tests/gpus.py): one shape, two lanes, a
padded last batch, and the batch size that the GPU's free memory allows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpus import GIB, Machine, machine
from pictures import NOT_AN_IMAGE, pictures, settings

from engine.bundle import Bundle, Target
from engine.errors import ClipmillError
from engine.manifest import read_run
from engine.shards import embeddings_of
from engine.stream import extract
from engine.text import embed_prompts

__all__ = ["machine"]  # a fixture


@pytest.fixture
def fp16(mini: Bundle) -> Bundle:
    """As far as its name goes."""
    return dataclasses.replace(mini, target=Target("cuda", "fp16"))


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_fixed_shapes_two_lanes_and_padding_leave_no_trace(
    provider: str, mini: Bundle, machine: Machine, tmp_path: Path
) -> None:
    dataset = pictures(64, {5: NOT_AN_IMAGE, 27: b"", 63: NOT_AN_IMAGE})
    bundle = dataclasses.replace(mini, target=Target(provider, "fp16"))
    said: list[str] = []
    choice = {"batch_size": 16, "shard_size": 27, "threads": None}
    gpu = extract(bundle, dataset, tmp_path / "gpu", settings(provider=provider, **choice), started=said.append)
    extract(mini, dataset, tmp_path / "cpu", settings(**choice))
    _, expected = read_run(tmp_path / "cpu")
    _, found = read_run(tmp_path / "gpu")
    # fixed shapes make another graph, by float rounding: 9e-8; to the bit is compared in test_session.py
    np.testing.assert_allclose(embeddings_of(found), embeddings_of(expected), rtol=0, atol=1e-6)
    assert found["row"] == expected["row"]
    assert said == [f"{provider} (asked for), batches of 16, 2 at once, 2 decode workers"]
    assert (gpu["fingerprint"]["provider"], gpu["summary"]["provider"]) == (provider, provider)
    shapes = {tuple(made.input_shapes["pixels"]) for made in machine.sessions if "CPU" not in made.asked_for[0]}
    assert shapes == {(16, 32, 32, 3)}
    assert len([buffer for buffer in machine.buffers if buffer[2] == "cuda"]) in (4, 8)  # of one lane or two


def test_the_batch_size_is_what_memory_allows_and_is_told(fp16: Bundle, machine: Machine, tmp_path: Path) -> None:
    machine.free = [10 * GIB, 9 * GIB]  # 32 images took 1 GiB: 0.8 x 10 GiB hold 128 in each of two lanes
    said: list[str] = []
    manifest = extract(
        fp16, pictures(9), tmp_path / "run", settings(provider="auto", batch_size=None), started=said.append
    )
    assert said[0].startswith("cuda (auto: a CUDA session came up), batches of 128, 2 at once")
    assert (manifest["summary"]["batch_size"], manifest["fingerprint"]["batch_size"]) == (128, 128)
    assert [made.input_shapes["pixels"][0] for made in machine.sessions] == [32, 128]


def test_a_resumed_run_measures_nothing(fp16: Bundle, machine: Machine, tmp_path: Path) -> None:
    choice = settings(provider="cuda", batch_size=None)
    machine.free = [10 * GIB, 9 * GIB]
    extract(fp16, pictures(9), tmp_path / "run", choice)
    machine.free = [1 * GIB, 1]
    manifest = extract(fp16, pictures(9), tmp_path / "run", choice)
    assert manifest["fingerprint"]["batch_size"] == 128
    assert len(machine.free) == 2


@pytest.mark.parametrize(("provider", "batch_size"), [("cuda", 256), ("tensorrt", 256)])
def test_the_largest_batch(provider: str, batch_size: int, mini: Bundle, machine: Machine, tmp_path: Path) -> None:
    bundle = dataclasses.replace(mini, target=Target(provider, "fp16"))
    manifest = extract(bundle, pictures(3), tmp_path / "run", settings(provider=provider, batch_size=None))
    assert manifest["summary"]["batch_size"] == batch_size


def test_the_batch_size_asked_for_is_taken_unmeasured(fp16: Bundle, machine: Machine, tmp_path: Path) -> None:
    machine.free = [GIB]
    manifest = extract(fp16, pictures(3), tmp_path / "run", settings(provider="cuda", batch_size=5, device_id=1))
    assert manifest["summary"]["batch_size"] == 5
    assert machine.free == [GIB]
    assert machine.sessions[0].asked_for[1]["device_id"] == "1"
    assert {buffer[3] for buffer in machine.buffers} == {1}


@pytest.mark.parametrize("change", [{"driver": False}, {"refuses": "out of memory"}, {"missing": {"libcurand.so.10"}}])
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_nothing_is_written_and_nothing_runs_on_the_cpu_when_a_gpu_cannot(
    change: dict[str, Any], provider: str, mini: Bundle, machine: Machine, tmp_path: Path
) -> None:
    vars(machine).update(change)
    bundle = dataclasses.replace(mini, target=Target(provider, "fp16"))
    with pytest.raises(ClipmillError):
        extract(bundle, pictures(3), tmp_path / "run", settings(provider=provider, batch_size=None))
    assert not (tmp_path / "run").exists()
    assert "CPUExecutionProvider" not in [made.asked_for[0] for made in machine.sessions]


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_prompts_run_in_one_shape(provider: str, mini: Bundle, machine: Machine) -> None:
    prompts = [f"{'a ' * (n % 9)}{n}" for n in range(100)]
    bundle = dataclasses.replace(mini, target=Target(provider, "fp16"))
    said: list[str] = []
    found = embed_prompts(bundle, prompts, provider, device_id=1, started=said.append)
    np.testing.assert_allclose(found, embed_prompts(mini, prompts, "cpu"), rtol=0, atol=1e-6)
    assert said == [f"{provider} (asked for)"]
    assert machine.sessions[0].input_shapes == {"input_ids": [64, 32], "eos_position": [64]}
    assert {buffer[3] for buffer in machine.buffers if buffer[2] == "cuda"} == {1}
