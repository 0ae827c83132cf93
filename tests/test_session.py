"""Which provider runs a tower: the one that was asked for, or none. CUDA itself is played by a stub."""

from __future__ import annotations

import ctypes
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort
import pytest

from engine import session
from engine.bundle import Bundle
from engine.errors import ClipmillError
from engine.preprocess import image_feeds
from engine.session import Tower

REAL_SESSION = ort.InferenceSession
FIXED = {"batch": 3, "height": 8, "width": 10}


class StubSession:
    """Takes what InferenceSession takes; every one made is in `made`."""

    made: ClassVar[list[StubSession]] = []
    providers: ClassVar[list[str]] = ["CUDAExecutionProvider"]
    embeddings: ClassVar[Any] = np.zeros((0, 128), dtype=np.float32)

    def __init__(self, path: Any, options: ort.SessionOptions, **keywords: Any) -> None:
        self.path, self.options, self.keywords = path, options, keywords
        StubSession.made.append(self)

    def get_providers(self) -> list[str]:
        return self.providers

    def run(self, names: Any, feeds: Any) -> list[Any]:
        return [self.embeddings]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[StubSession]:
    monkeypatch.setattr(StubSession, "made", [])
    monkeypatch.setattr(session.ort, "InferenceSession", StubSession)
    return StubSession


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with onnxruntime-gpu and a driver that loads; what was done to get there, in order."""
    done: list[str] = []
    monkeypatch.setattr(session.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(session.ort, "preload_dlls", lambda: done.append("preload"), raising=False)
    monkeypatch.setattr(session.ctypes, "CDLL", lambda name: done.append(name))
    monkeypatch.setattr(session.sys, "platform", "linux")
    return done


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(session.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(session.ctypes, "CDLL", missing)


def pixels(batch: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (batch, 8, 10, 3), dtype=np.uint8)


# Asked for, and not there -------------------------------------------------------------------------------------------


def driver_loads() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(driver_loads(), reason="this machine has an NVIDIA driver")
@pytest.mark.parametrize("tower", ["image", "text"])
def test_cuda_without_a_driver_is_one_line_and_nothing_runs(
    tower: Any, mini: Bundle, stub: type[StubSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(ClipmillError) as raised:
        Tower(mini, tower, "cuda")
    message = str(raised.value)
    assert message.startswith("no NVIDIA driver on this machine (")
    assert message.endswith("does not load); install it, or choose --provider cpu")
    assert "\n" not in message
    assert stub.made == []


def test_an_onnxruntime_without_cuda_is_one_line(
    mini: Bundle, stub: type[StubSession], driver: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ClipmillError) as raised:
        Tower(mini, "image", "cuda")
    assert str(raised.value) == (
        "the installed onnxruntime has no CUDA provider; install onnxruntime-gpu (and uninstall onnxruntime), or "
        "choose --provider cpu"
    )
    assert (stub.made, driver) == ([], [])


def test_a_session_that_fell_back_is_refused(
    mini: Bundle, stub: type[StubSession], driver: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stub, "providers", ["CPUExecutionProvider"])
    with pytest.raises(ClipmillError) as raised:
        Tower(mini, "image", "cuda", fixed=FIXED)
    message = str(raised.value)
    assert message.startswith("provider cuda did not come up, ONNX Runtime fell back to CPUExecutionProvider; ")
    assert message.endswith("install them or choose --provider cpu")
    assert "\n" not in message
    assert len(stub.made) == 1


def test_what_the_runtime_says_becomes_one_line(
    mini: Bundle, driver: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("Shape nodes were assigned to the CPU\nand 200 lines of C++\n")

    monkeypatch.setattr(session.ort, "InferenceSession", refuse)
    with pytest.raises(ClipmillError) as raised:
        Tower(mini, "text", "cuda")
    assert str(raised.value) == (
        f"ONNX Runtime cannot run {mini.path / 'text.onnx'} on cuda: Shape nodes were assigned to the CPU; "
        "see --provider"
    )


def test_a_file_that_is_no_graph_is_one_line_and_quiet(
    mini: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image.onnx").write_bytes(b"no graph")
    with pytest.raises(ClipmillError, match=r"ONNX Runtime cannot run .*image\.onnx on cpu: ") as raised:
        Tower(dataclasses.replace(mini, path=tmp_path), "image", "cpu")
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().out == ""  # stdout is for data


def int8(bundle: Bundle) -> Bundle:
    return dataclasses.replace(bundle, target=dataclasses.replace(bundle.target, precision="int8"))


def test_an_int8_bundle_on_cuda_is_one_line_and_nothing_runs(
    mini: Bundle, stub: type[StubSession], driver: list[str]
) -> None:
    with pytest.raises(ClipmillError) as raised:
        Tower(int8(mini), "image", "cuda", fixed=FIXED)
    assert str(raised.value) == (
        "an int8 bundle runs on the CPU only; export an fp16 one (export --provider cuda), or choose --provider cpu"
    )
    assert (stub.made, driver) == ([], [])


# What is taken ------------------------------------------------------------------------------------------------------


def test_auto_without_cuda_takes_the_cpu_and_says_why(mini: Bundle, no_driver: None) -> None:
    tower = Tower(mini, "image", "auto", threads=1, fixed=FIXED)
    assert tower.provider == "cpu"
    assert tower.why.startswith("auto: no NVIDIA driver on this machine")
    assert tower.session.get_providers() == ["CPUExecutionProvider"]
    images = pixels(5)  # not the fixed batch: a CPU session stays dynamic
    asked_for = Tower(mini, "image", "cpu", threads=1)
    assert asked_for.why == "asked for"
    np.testing.assert_array_equal(
        tower.run(image_feeds(images, mini.preprocessing)), asked_for.run(image_feeds(images, mini.preprocessing))
    )


def test_auto_takes_cuda_when_it_comes_up(mini: Bundle, stub: type[StubSession], driver: list[str]) -> None:
    tower = Tower(mini, "image", fixed=FIXED)
    assert (tower.provider, tower.why) == ("cuda", "auto: a CUDA session came up")
    assert len(stub.made) == 1


def test_auto_takes_the_cpu_when_the_session_falls_back(
    mini: Bundle, stub: type[StubSession], driver: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stub, "providers", ["CPUExecutionProvider"])
    tower = Tower(mini, "image", fixed=FIXED)
    assert tower.provider == "cpu"
    assert tower.why.startswith("auto: provider cuda did not come up")
    assert [made.keywords["providers"][0] for made in stub.made][1] == "CPUExecutionProvider"


def test_auto_takes_the_cpu_for_an_int8_bundle_and_leaves_cuda_alone(
    mini: Bundle, stub: type[StubSession], driver: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stub, "providers", ["CPUExecutionProvider"])
    tower = Tower(int8(mini), "image", threads=2, fixed=FIXED)
    assert (tower.provider, tower.why, tower.lanes) == ("cpu", "auto: an int8 bundle runs on the CPU only", 2)
    assert [made.keywords["providers"] for made in stub.made] == [["CPUExecutionProvider"]]
    assert driver == []


def test_the_options_of_a_cuda_session(mini: Bundle, stub: type[StubSession], driver: list[str]) -> None:
    tower = Tower(mini, "image", "cuda", threads=3, fixed=FIXED)
    (made,) = stub.made
    assert driver == ["libcuda.so.1", "preload"]
    assert (tower.provider, tower.why, tower.lanes, tower.dim) == ("cuda", "asked for", 1, 128)
    assert made.path == mini.path / "image.onnx"
    assert made.keywords == {
        "providers": [  # and no CPUExecutionProvider behind it
            (
                "CUDAExecutionProvider",
                {
                    "arena_extend_strategy": "kSameAsRequested",
                    "cudnn_conv_algo_search": "HEURISTIC",
                    "do_copy_in_default_stream": "1",
                    "use_tf32": "0",
                },
            )
        ],
        "enable_fallback": 0,
    }
    assert made.options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    # ONNX Runtime takes a misspelt key in silence; this one it knows, for it will not have the CPU beside it
    with pytest.raises(Exception, match="disabled fallback to the CPU EP"):
        REAL_SESSION(made.path, made.options, providers=["CPUExecutionProvider"], enable_fallback=0)
    assert input_shapes(made) == {"pixels": [3, 8, 10, 3], "rows": [32, 8], "columns": [32, 10]}


def input_shapes(made: StubSession) -> dict[str, list[int | str]]:
    """The shapes that the graph has in a real session on the CPU with the same options, all but one."""
    made.options.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
    real = REAL_SESSION(made.path, made.options, providers=["CPUExecutionProvider"])
    return {value.name: value.shape for value in real.get_inputs()}


def test_the_text_tower_on_cuda_has_one_shape(mini: Bundle, stub: type[StubSession], driver: list[str]) -> None:
    Tower(mini, "text", "cuda", fixed={"batch": 64, "length": 32})
    (made,) = stub.made
    assert input_shapes(made) == {"input_ids": [64, 32], "eos_position": [64]}


def test_the_options_of_a_cpu_session(
    mini: Bundle, stub: type[StubSession], driver: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stub, "providers", ["CPUExecutionProvider"])
    monkeypatch.setattr(session, "usable_cpus", lambda: 5)
    tower = Tower(mini, "image", "cpu", fixed=FIXED)
    (made,) = stub.made
    assert made.keywords == {"providers": ["CPUExecutionProvider"], "enable_fallback": 0}
    assert (made.options.intra_op_num_threads, made.options.inter_op_num_threads, tower.lanes) == (1, 1, 5)
    assert Tower(mini, "image", "cpu", threads=3).lanes == 3
    assert driver == []  # nothing of CUDA was touched
    assert input_shapes(made)["pixels"] == ["batch", "height", "width", 3]


# Running ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_not_finite_are_refused(
    bad: float, mini: Bundle, stub: type[StubSession], driver: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = np.ones((3, 128), dtype=np.float16)
    monkeypatch.setattr(stub, "embeddings", embeddings)
    tower = Tower(mini, "image", "cuda", fixed=FIXED)
    result = tower.run({})
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.ones((3, 128)))
    embeddings[2, 127] = bad
    with pytest.raises(ClipmillError) as raised:
        tower.run({})
    assert str(raised.value) == (
        "the cuda provider returned embeddings that are not finite: the bundle's precision overflows there; "
        "export the model in fp32"
    )


def test_a_tower_gives_unit_rows_that_do_not_depend_on_their_batch(mini: Bundle) -> None:
    tower = Tower(mini, "image", "cpu", threads=1)
    images = pixels(6)
    together = tower.run(image_feeds(images, mini.preprocessing))
    assert together.shape == (6, 128)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for position in range(6):
        alone = tower.run(image_feeds(images[position : position + 1], mini.preprocessing))
        np.testing.assert_array_equal(alone[0], together[position])
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_many_threads_may_run_one_tower_at_once(mini: Bundle) -> None:
    tower = Tower(mini, "image", "cpu", threads=4)
    batches = [image_feeds(pixels(size), mini.preprocessing) for size in (1, 5, 2, 8, 3) * 8]
    with ThreadPoolExecutor(4) as pool:
        for feeds, embeddings in zip(batches, pool.map(tower.run, batches), strict=True):
            np.testing.assert_array_equal(embeddings, tower.run(feeds))
