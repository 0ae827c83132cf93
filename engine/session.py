"""ONNX Runtime sessions: which provider runs a tower, with which options, in which buffers. One class, Tower."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engine.bundle import Bundle, TowerName
from engine.errors import ClipmillError
from engine.machine import usable_cpus
from engine.providers import EXECUTION_PROVIDERS, Driver, require
from engine.tensorrt import tensorrt_options

PROVIDERS = ("auto", *EXECUTION_PROVIDERS)
CUDA_OPTIONS = {
    "arena_extend_strategy": "kSameAsRequested",  # the default doubles, and a batch of one fixed shape never needs it
    "cudnn_conv_algo_search": "HEURISTIC",  # the towers hold no convolution worth an exhaustive search
    "do_copy_in_default_stream": "1",
    "use_tf32": "0",  # the resize products need all of float32's mantissa
}
GPU_LANES = 2  # one batch is copied while the other is computed
MEMORY_SHARE = 0.8  # of what is free on a GPU, that batches may take
LOG_ERRORS_ONLY = 3


class Tower:
    """One tower of a bundle, running on the provider asked for: feeds in, L2-normalised embeddings out.

    `shape` gives the free dimensions ("batch", "height", "width"; "batch", "length") their sizes on a GPU, where a
    graph of unknown shapes would put its shape arithmetic on the CPU. CPU sessions stay dynamic, with an empty `shape`.

    `lanes` is how many batches to run at once, by as many threads that call `run`. On the CPU it is `threads`, else the
    usable CPUs, and each lane is one thread: no operator waits for the slowest of several (two lanes of one thread
    against one of two threads, ViT-B/32 fp32 on 2 cores: 1.2x). A GPU has two.

    Raises ClipmillError when the provider cannot run. `auto` takes CUDA if it comes up, else the CPU; `why` says so.
    CUDA and TensorRT were never run on a GPU: their options are ONNX Runtime's documentation and binaries.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: TowerName,
        provider: str = "auto",
        *,
        device_id: int = 0,
        threads: int | None = None,
        shape: Mapping[str, int] | None = None,
    ) -> None:
        def open_on(chosen: str) -> None:
            self.provider, self.shape = chosen, {} if chosen == "cpu" else dict(shape or {})
            self.session = _open(bundle, name, chosen, device_id, self.shape)

        self.dim, self.device_id, self.why = bundle.architecture.embedding_dim, device_id, "asked for"
        if provider == "auto":
            try:
                open_on("cuda")
                self.why = "auto: a CUDA session came up"
            except ClipmillError as error:
                open_on("cpu")
                self.why = f"auto: {str(error).partition('; ')[0]}"  # the cause, without its mend
        else:
            open_on(provider)
        if self.provider == "cuda" and bundle.target.provider != "cuda":
            self.why += (
                f"; an fp16 bundle (export --provider cuda) is faster than this one for {bundle.target.provider}"
            )
        self.lanes = threads or usable_cpus() if self.provider == "cpu" else GPU_LANES
        self._idle: deque[_Lane] = deque()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """(B, dim) float32 unit rows for feeds named as the graph's inputs; ClipmillError if one is not finite.

        May be called from several threads at once.
        """
        try:
            lane = self._idle.pop()
        except IndexError:
            lane = _Lane(self)
        try:
            embeddings = lane.run(feeds)
        except Exception as error:  # ONNX Runtime's exceptions have no common class but this
            if _is_out_of_memory(error):
                raise _out_of_memory(self.provider, self.shape) from error
            raise
        self._idle.append(lane)
        if not np.isfinite(embeddings).all():
            raise ClipmillError(
                f"the {self.provider} provider returned embeddings that are not finite: the bundle's precision "
                "overflows there; export the model in fp32"
            )
        return embeddings

    def batch_that_fits(self, feeds: Mapping[str, NDArray[Any]], at_most: int) -> int:
        """Rows a batch, a power of two, for which the GPU's free memory is enough in every lane.

        Measured by one run of `feeds`, the first of a session: what it allocates for the rows it has.
        """
        driver = Driver()
        before = driver.free_memory(self.device_id)
        self.run(feeds)
        taken = max(before - driver.free_memory(self.device_id), 1)
        fits = int(MEMORY_SHARE * before / (self.lanes * taken / self.shape["batch"]))
        return min(1 << max(fits.bit_length() - 1, 0), at_most)


class _Lane:
    """Buffers on the device of a tower, bound to its session: made at the first run, and again for another shape.

    To be run by one thread at a time.
    """

    def __init__(self, tower: Tower) -> None:
        self._session = tower.session
        self._device = ("cpu", 0) if tower.provider == "cpu" else ("cuda", tower.device_id)
        self._binding = tower.session.io_binding()
        self._inputs: dict[str, tuple[ort.OrtValue, NDArray[Any]]] = {}  # buffer, and what was last put into it
        self._output: ort.OrtValue | None = None

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        for name, array in feeds.items():
            self._put(name, array)
        rows = len(feeds[self._session.get_inputs()[0].name])
        if self._output is None or self._output.shape()[0] != rows:
            (embedding,) = self._session.get_outputs()
            self._output = self._buffer((rows, embedding.shape[1]), np.float32)
            self._binding.bind_ortvalue_output(embedding.name, self._output)
        self._session.run_with_iobinding(self._binding)
        return np.array(self._output.numpy())  # on the CPU numpy() is the buffer itself

    def _put(self, name: str, array: NDArray[Any]) -> None:
        buffer, last = self._inputs.get(name, (None, None))
        if buffer is None or last is None or (last.shape, last.dtype) != (array.shape, array.dtype):
            buffer = self._buffer(array.shape, array.dtype.type)
            self._binding.bind_ortvalue_input(name, buffer)
        elif array is last and not array.flags.writeable:
            return  # the resize matrices: they are up already
        buffer.update_inplace(array)  # a synchronous copy
        self._inputs[name] = buffer, array

    def _buffer(self, shape: tuple[int, ...], dtype: Any) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, *self._device)


def _open(
    bundle: Bundle, name: TowerName, provider: str, device_id: int, shape: Mapping[str, int]
) -> ort.InferenceSession:
    if provider != "cpu" and bundle.target.precision == "int8":
        raise ClipmillError(
            f"an int8 bundle runs on the CPU only; export an fp16 one (export --provider {provider}), or choose "
            "--provider cpu"
        )
    if provider == "tensorrt" and bundle.target.provider != "tensorrt":
        raise ClipmillError(
            f"this bundle is made for {bundle.target.provider}, with operators that TensorRT has not; export one for "
            "it (export --provider tensorrt) and name it with --model, or choose --provider cuda"
        )
    require(provider, device_id)
    options: dict[str, str] = {}
    if provider == "cuda":
        options = {"device_id": str(device_id), **CUDA_OPTIONS}
    elif provider == "tensorrt":
        options = tensorrt_options(bundle, name, device_id, shape)
    return open_session(bundle.onnx_path(name), provider, options, shape)


def open_session(
    path: Path, provider: str, provider_options: Mapping[str, str], shape: Mapping[str, int]
) -> ort.InferenceSession:
    """A session that runs on `provider`, every node of it; ClipmillError if it does not."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # the lanes are the threads
    options.log_severity_level = LOG_ERRORS_ONLY
    for dimension, size in shape.items():
        options.add_free_dimension_override_by_name(dimension, size)
    if provider != "cpu":  # which must not be listed beside this
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    chosen = [(EXECUTION_PROVIDERS[provider], dict(provider_options))]
    try:
        # by default a provider that fails, even in mid-run, gives way to another, bare, and says so on stdout
        session = ort.InferenceSession(path, options, providers=chosen, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions have no common class but this
        if _is_out_of_memory(error):
            raise _out_of_memory(provider, shape) from error
        reason = str(error).strip().splitlines()[0]
        raise ClipmillError(f"ONNX Runtime cannot run {path} on {provider}: {reason}; see --provider") from error
    running = session.get_providers()[0]
    if running != EXECUTION_PROVIDERS[provider]:  # a provider that fails to load leaves only a log line
        raise ClipmillError(
            f"provider {provider} did not come up, ONNX Runtime fell back to {running}; `python cli.py providers` "
            "tells what is there, or choose --provider cpu"
        )
    return session


def _is_out_of_memory(error: Exception) -> bool:
    # ONNX Runtime's arena, CUDA's runtime and cuBLAS; none of them has a class of its own
    signs = ("Failed to allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(sign in str(error) for sign in signs)


def _out_of_memory(provider: str, shape: Mapping[str, int]) -> ClipmillError:
    batch = shape.get("batch", 1)
    if provider == "cpu":
        return ClipmillError("out of memory on the CPU; lower --batch-size or --threads")
    mend = f"try --batch-size {batch // 2}" if "height" in shape and batch > 1 else "free some of it"
    return ClipmillError(
        f"out of GPU memory with batches of {batch}; {mend}, or choose another --device-id or --provider cpu"
    )
