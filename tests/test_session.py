"""Which provider runs a tower, with exactly which options, and in which buffers. The GPU is played by tests/gpus.py."""

from __future__ import annotations

import dataclasses
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from gpus import GIB, REAL_SESSION, Machine, machine
from numpy.typing import NDArray

from engine import session
from engine.bundle import Bundle, Target
from engine.errors import ClipmillError
from engine.preprocess import image_feeds
from engine.providers import TENSORRT_LIBRARIES
from engine.session import CUDA_OPTIONS, Tower

SHAPE = {"batch": 3, "height": 8, "width": 10}
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
__all__ = ["machine"]  # a fixture


def made_for(bundle: Bundle, provider: str, precision: str) -> Bundle:
    return dataclasses.replace(bundle, target=Target(provider, precision))


def pixels(batch: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (batch, 8, 10, 3), dtype=np.uint8)


def refusal(bundle: Bundle, provider: str) -> str:
    with pytest.raises(ClipmillError) as raised:
        Tower(bundle, "image", provider, shape=SHAPE)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "precision"), [("cuda", "fp16"), ("cuda", "fp32"), ("cpu", "fp32")])
def test_the_options_of_a_cuda_session(target: str, precision: str, mini: Bundle, machine: Machine) -> None:
    tower = Tower(made_for(mini, target, precision), "image", "cuda", device_id=1, threads=3, shape=SHAPE)
    (made,) = machine.sessions
    assert machine.loaded[:2] == ["libcuda.so.1", "preload"]
    assert (tower.provider, tower.lanes, tower.dim, tower.shape) == ("cuda", 2, 128, SHAPE)
    assert tower.why.startswith("asked for")
    assert ("an fp16 bundle (export --provider cuda) is faster" in tower.why) == (target == "cpu")
    assert made.path == mini.path / "image.onnx"
    assert made.keywords == {
        "providers": [  # and no CPUExecutionProvider behind it
            (
                CUDA,
                {
                    "device_id": "1",
                    "arena_extend_strategy": "kSameAsRequested",
                    "cudnn_conv_algo_search": "HEURISTIC",
                    "do_copy_in_default_stream": "1",
                    "use_tf32": "0",
                },
            )
        ],
        "enable_fallback": 0,
    }
    assert made.config("session.disable_cpu_ep_fallback") == "1"
    assert (made.options.intra_op_num_threads, made.options.inter_op_num_threads) == (1, 1)
    # ONNX Runtime takes a misspelt key in silence; this one it knows, for it will not have the CPU beside it
    with pytest.raises(Exception, match="disabled fallback to the CPU EP"):
        REAL_SESSION(made.path, made.options, providers=["CPUExecutionProvider"], enable_fallback=0)
    assert made.input_shapes == {"pixels": [3, 8, 10, 3], "rows": [32, 8], "columns": [32, 10]}


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("name", ["image", "text"])
def test_the_options_of_a_tensorrt_session(name: Any, precision: str, mini: Bundle, machine: Machine) -> None:
    shape = SHAPE if name == "image" else {"batch": 64, "length": 32}
    bundle = made_for(mini, "tensorrt", precision)
    tower = Tower(bundle, name, "tensorrt", device_id=1, shape=shape)
    (made,) = machine.sessions
    assert (tower.provider, tower.why, tower.lanes, tower.shape) == ("tensorrt", "asked for", 2, shape)
    ((provider, options),) = made.keywords["providers"]
    assert provider == TENSORRT
    assert made.keywords["enable_fallback"] == 0
    assert made.config("session.disable_cpu_ep_fallback") == "1"
    profile = "pixels:3x8x10x3,rows:32x8,columns:32x10" if name == "image" else "input_ids:64x32,eos_position:64"
    cache = Path(options["trt_engine_cache_path"])
    assert cache.is_dir()
    assert cache.parts[-4:] == ("clipmill", "tensorrt", bundle.fingerprint[:16], "NVIDIA-Test-1-10.14.1")
    assert options == {
        "device_id": "1",
        "trt_fp16_enable": "True" if precision == "fp16" else "False",
        "trt_layer_norm_fp32_fallback": "True",
        "trt_builder_optimization_level": "3",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_engine_cache_prefix": "image-batch3-height8-width10" if name == "image" else "text-batch64-length32",
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
        "trt_profile_min_shapes": profile,
        "trt_profile_opt_shapes": profile,
        "trt_profile_max_shapes": profile,
    }
    shapes = ",".join(f"{name}:{'x'.join(map(str, sizes))}" for name, sizes in made.input_shapes.items())
    assert shapes == profile  # what the graph itself says


def test_the_options_of_a_cpu_session(mini: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "usable_cpus", lambda: 5)
    tower = Tower(mini, "image", "cpu", shape=SHAPE)
    (made,) = machine.sessions
    assert made.keywords == {"providers": [("CPUExecutionProvider", {})], "enable_fallback": 0}
    assert made.config("session.disable_cpu_ep_fallback") == ""
    assert (made.options.intra_op_num_threads, made.options.inter_op_num_threads, tower.lanes) == (1, 1, 5)
    assert Tower(mini, "image", "cpu", threads=3).lanes == 3
    assert machine.loaded == []  # nothing of CUDA was touched
    assert (made.input_shapes["pixels"], tower.shape) == (["batch", "height", "width", 3], {})


@pytest.mark.skipif(
    not {CUDA, TENSORRT} <= set(ort.get_available_providers()), reason="the installed package is not onnxruntime-gpu"
)
def test_every_option_is_spelt_as_in_the_binaries(mini: Bundle, machine: Machine) -> None:
    """Their names and values come from ONNX Runtime's documentation; it takes session keys that it does not know."""
    Tower(made_for(mini, "tensorrt", "fp16"), "image", "tensorrt", shape=SHAPE)
    options = machine.sessions[0].asked_for[1]
    libraries = Path(ort.__file__).parent / "capi"
    expected = {
        "libonnxruntime_providers_cuda.so": [*CUDA_OPTIONS, "device_id", "HEURISTIC", "kSameAsRequested"],
        "libonnxruntime_providers_tensorrt.so": [*options, "True", "False"],
        "onnxruntime_pybind11_state*.so": [*options, "session.disable_cpu_ep_fallback", "Failed to allocate memory"],
    }
    for pattern, names in expected.items():
        (library,) = libraries.glob(pattern)
        found = library.read_bytes()
        assert [name for name in names if name.encode() not in found] == [], pattern


@pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="the installed package is not onnxruntime-gpu")
def test_the_libraries_named_are_those_that_the_binaries_need(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.providers import libraries

    for provider in ("cuda", "tensorrt"):
        file = Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{provider}.so"
        try:
            listed = subprocess.run(["readelf", "-d", file], capture_output=True, text=True, check=True).stdout
        except FileNotFoundError:
            pytest.skip("no readelf")
        needed = {line.split("[")[1].rstrip("]") for line in listed.splitlines() if "(NEEDED)" in line}
        of_nvidia = {name for name in needed if name.startswith(("libcu", "libnv"))}
        assert of_nvidia - {"libcuda.so.1"} <= set(libraries(provider))
    assert set(TENSORRT_LIBRARIES) <= of_nvidia


# What is refused ----------------------------------------------------------------------------------------------------


def test_a_session_that_fell_back_is_refused(mini: Bundle, machine: Machine) -> None:
    machine.falls_back = True
    message = refusal(mini, "cuda")
    assert message.startswith("provider cuda did not come up, ONNX Runtime fell back to CPUExecutionProvider; ")
    assert "python cli.py providers" in message
    assert len(machine.sessions) == 1  # no second try


def test_what_the_runtime_says_becomes_one_line(mini: Bundle, machine: Machine) -> None:
    machine.refuses = "Shape nodes were assigned to the CPU\nand 200 lines of C++\n"
    assert refusal(mini, "cuda") == (
        f"ONNX Runtime cannot run {mini.path / 'image.onnx'} on cuda: Shape nodes were assigned to the CPU; "
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


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_an_int8_bundle_on_a_gpu_is_one_line_and_nothing_runs(provider: str, mini: Bundle, machine: Machine) -> None:
    assert refusal(made_for(mini, "cpu", "int8"), provider) == (
        f"an int8 bundle runs on the CPU only; export an fp16 one (export --provider {provider}), or choose "
        "--provider cpu"
    )
    assert (machine.sessions, machine.loaded) == ([], [])


@pytest.mark.parametrize(("target", "precision"), [("cpu", "fp32"), ("cuda", "fp16"), ("cuda", "fp32")])
def test_tensorrt_takes_only_bundles_of_its_own(target: str, precision: str, mini: Bundle, machine: Machine) -> None:
    message = refusal(made_for(mini, target, precision), "tensorrt")
    assert message.startswith(f"this bundle is made for {target}, with operators that TensorRT has not; ")
    assert "export --provider tensorrt" in message
    assert machine.sessions == []


def test_a_cache_that_cannot_be_written_is_one_line(
    mini: Bundle, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message = refusal(made_for(mini, "tensorrt", "fp16"), "tensorrt")
    assert message.startswith(f"cannot keep TensorRT engines in {tmp_path / 'file'}")
    assert "XDG_CACHE_HOME" in message


OUT_OF_MEMORY = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running MatMul node.\n"
    "bfc_arena.cc:376 AllocateRawInternal Failed to allocate memory for requested buffer of size 939524096"
)


@pytest.mark.parametrize(
    "reason", [OUT_OF_MEMORY, "CUDA failure 2: out of memory ; GPU=0", "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"]
)
def test_no_memory_for_a_session_suggests_half_the_batch(reason: str, mini: Bundle, machine: Machine) -> None:
    machine.refuses = reason
    with pytest.raises(ClipmillError) as raised:
        Tower(mini, "image", "cuda", shape=SHAPE | {"batch": 256})
    assert str(raised.value) == (
        "out of GPU memory with batches of 256; try --batch-size 128, or choose another --device-id or --provider cpu"
    )


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "cpu"])
def test_no_memory_for_a_run_says_so(
    provider: str, mini: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = Tower(made_for(mini, provider, "fp32"), "image", provider, shape=SHAPE)

    def refuse(*_: Any) -> None:
        raise RuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr(session._Lane, "run", refuse)
    with pytest.raises(ClipmillError, match="^out of memory on the CPU; lower" if provider == "cpu" else "size 1, or"):
        tower.run({})


def test_prompts_that_do_not_fit_get_no_batch_size_to_try(mini: Bundle, machine: Machine) -> None:
    machine.refuses = OUT_OF_MEMORY
    with pytest.raises(ClipmillError, match="batches of 64; free some of it, or choose another --device-id"):
        Tower(mini, "text", "cuda", shape={"batch": 64, "length": 32})


# auto ---------------------------------------------------------------------------------------------------------------


def test_auto_takes_cuda_when_it_comes_up(mini: Bundle, machine: Machine) -> None:
    tower = Tower(made_for(mini, "cuda", "fp16"), "image", shape=SHAPE)
    assert (tower.provider, tower.why, tower.shape) == ("cuda", "auto: a CUDA session came up", SHAPE)
    assert len(machine.sessions) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"driver": False}, "auto: no NVIDIA driver on this machine (libcuda.so.1 does not load)"),
        ({"missing": {"libcudnn.so.9"}}, "auto: there is an NVIDIA driver, but libcudnn.so.9 cannot be loaded"),
        ({"refuses": OUT_OF_MEMORY}, "auto: out of GPU memory with batches of 3"),
    ],
)
def test_auto_takes_the_cpu_and_says_why(change: dict[str, Any], why: str, mini: Bundle, machine: Machine) -> None:
    vars(machine).update(change)
    tower = Tower(mini, "image", threads=1, shape=SHAPE)
    assert (tower.provider, tower.why, tower.lanes, tower.shape) == ("cpu", why, 1, {})
    assert machine.sessions[-1].asked_for == ("CPUExecutionProvider", {})
    images = pixels(5)  # not the fixed batch: a CPU session stays dynamic
    assert tower.run(image_feeds(images, mini.preprocessing)).shape == (5, 128)


def test_auto_takes_the_cpu_for_an_int8_bundle_and_leaves_cuda_alone(mini: Bundle, machine: Machine) -> None:
    tower = Tower(made_for(mini, "cpu", "int8"), "image", threads=2, shape=SHAPE)
    assert (tower.provider, tower.why, tower.lanes) == ("cpu", "auto: an int8 bundle runs on the CPU only", 2)
    assert [made.asked_for[0] for made in machine.sessions] == ["CPUExecutionProvider"]
    assert machine.loaded == []


# Running ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_not_finite_are_refused(
    bad: float, mini: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = np.ones((3, 128), dtype=np.float32)
    monkeypatch.setattr(session._Lane, "run", lambda *_: embeddings)
    tower = Tower(made_for(mini, "cuda", "fp16"), "image", "cuda", shape=SHAPE)
    np.testing.assert_array_equal(tower.run({}), embeddings)
    embeddings[2, 127] = bad
    with pytest.raises(ClipmillError) as raised:
        tower.run({})
    assert str(raised.value) == (
        "the cuda provider returned embeddings that are not finite: the bundle's precision overflows there; "
        "export the model in fp32"
    )


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_bound_buffers_give_what_a_plain_run_gives_to_the_bit(provider: str, mini: Bundle, machine: Machine) -> None:
    tower = Tower(mini, "image", provider, threads=2, shape=SHAPE)
    batches = [image_feeds(pixels(3, seed), mini.preprocessing) for seed in range(24)]
    with ThreadPoolExecutor(tower.lanes) as pool:
        found = list(pool.map(tower.run, batches))
    for feeds, embeddings in zip(batches, found, strict=True):
        (plain,) = tower.session.run(None, feeds)
        np.testing.assert_array_equal(embeddings, plain)
    assert len({embeddings.ctypes.data for embeddings in found}) == 24  # none is a buffer that the next run fills


def test_the_buffers_of_a_gpu_are_made_once_a_lane_and_on_its_device(
    mini: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = Tower(mini, "image", "cuda", device_id=1, shape=SHAPE)
    copied: list[str] = []
    update = ort.OrtValue.update_inplace

    def watch(buffer: ort.OrtValue, array: Any) -> None:
        copied.append(str(array.dtype))
        update(buffer, array)

    monkeypatch.setattr(ort.OrtValue, "update_inplace", watch)
    batch = pixels()  # one array, filled again for each batch, as the stream does
    for seed in range(10):
        batch[:] = pixels(3, seed)
        feeds = image_feeds(batch, mini.preprocessing)
        np.testing.assert_array_equal(tower.run(feeds), tower.session.run(None, feeds)[0])
    assert machine.buffers == [
        ((3, 8, 10, 3), np.uint8, "cuda", 1),
        ((32, 8), np.float32, "cuda", 1),
        ((32, 10), np.float32, "cuda", 1),
        ((3, 128), np.float32, "cuda", 1),
    ]
    assert sorted(copied) == ["float32"] * 2 + ["uint8"] * 10  # the matrices go up once


def test_on_the_cpu_a_batch_may_have_any_size_and_length(mini: Bundle) -> None:
    tower = Tower(mini, "text", "cpu", threads=1)
    random = np.random.default_rng(0)
    for rows, length in ((3, 5), (3, 5), (1, 5), (4, 9), (3, 5)):
        feeds = {
            "input_ids": random.integers(0, 900, (rows, length)),
            "eos_position": random.integers(0, length, rows),
        }
        np.testing.assert_array_equal(tower.run(feeds), tower.session.run(None, feeds)[0])


def test_a_dtype_that_the_graph_does_not_take_is_no_silent_reinterpretation(mini: Bundle) -> None:
    tower = Tower(mini, "text", "cpu", threads=1)
    tower.run({"input_ids": np.zeros((2, 4), np.int64), "eos_position": np.ones(2, np.int64)})
    with pytest.raises(Exception, match="Unexpected input data type"):
        tower.run({"input_ids": np.zeros((2, 4), np.int32), "eos_position": np.ones(2, np.int64)})


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


# Batch size ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "fits"),
    [
        (10 * GIB, 10 * GIB, 256),  # nothing to be seen
        (70 * GIB, 69 * GIB, 64),  # 0.8 x 70 GiB for two lanes of 1/3 GiB an image: 84
        (4 * GIB, 1 * GIB, 1),
        (3 * GIB, 0, 1),  # 1.2 images
        (1 * GIB, -1, 1),  # not even one: the session will say so
    ],
)
def test_the_batch_that_fits_is_a_power_of_two(
    before: int, after: int, fits: int, mini: Bundle, machine: Machine
) -> None:
    tower = Tower(mini, "image", "cuda", shape=SHAPE)
    machine.free = [before, max(after, 0)]
    assert tower.batch_that_fits(image_feeds(pixels(), mini.preprocessing), 256) == fits
    assert machine.free == []
