"""ONNX Runtime sessions: which provider runs a tower, with which options. One class, Tower."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engine.bundle import Bundle, TowerName
from engine.errors import ClipmillError
from engine.machine import usable_cpus

PROVIDERS = ("auto", "cpu", "cuda")
EXECUTION_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CUDA_OPTIONS = {
    "arena_extend_strategy": "kSameAsRequested",  # the default doubles, and a batch of one fixed shape never needs it
    "cudnn_conv_algo_search": "HEURISTIC",  # the towers hold no convolution worth an exhaustive search
    "do_copy_in_default_stream": "1",
    "use_tf32": "0",  # the resize products need all of float32's mantissa
}
LOG_ERRORS_ONLY = 3


class Tower:
    """One tower of a bundle, running on the provider asked for: feeds in, L2-normalised embeddings out.

    `fixed` gives the free dimensions ("batch", "height", "width"; "batch", "length") their sizes on CUDA, where a graph
    of unknown shapes would put its shape arithmetic on the CPU. CPU sessions stay dynamic.

    `lanes` is how many batches to run at once, by as many threads that call `run`. On the CPU it is `threads`, else the
    usable CPUs, and each lane is one thread: no operator waits for the slowest of several (two lanes of one thread
    against one of two threads, ViT-B/32 fp32 on 2 cores: 1.2x). CUDA has one lane.

    Raises ClipmillError when the provider cannot run. `auto` takes CUDA if it comes up, else the CPU; `why` says so.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: TowerName,
        provider: str = "auto",
        *,
        threads: int | None = None,
        fixed: Mapping[str, int] | None = None,
    ) -> None:
        self.dim = bundle.architecture.embedding_dim
        self.why = "asked for"
        if provider == "auto":
            try:
                self.session = self._open(bundle, name, "cuda", fixed or {})
                self.provider, self.why = "cuda", "auto: a CUDA session came up"
            except ClipmillError as error:
                self.session = self._open(bundle, name, "cpu", {})
                self.provider, self.why = "cpu", f"auto: {str(error).partition('; ')[0]}"  # the cause, without its mend
        else:
            self.session = self._open(bundle, name, provider, fixed or {} if provider == "cuda" else {})
            self.provider = provider
        self.lanes = 1 if self.provider == "cuda" else threads or usable_cpus()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """(B, dim) float32 unit rows for feeds named as the graph's inputs; ClipmillError if one is not finite.

        May be called from several threads at once.
        """
        (embeddings,) = self.session.run(None, dict(feeds))
        if not np.isfinite(embeddings).all():
            raise ClipmillError(
                f"the {self.provider} provider returned embeddings that are not finite: the bundle's precision "
                "overflows there; export the model in fp32"
            )
        return np.asarray(embeddings, dtype=np.float32)

    def _open(self, bundle: Bundle, name: TowerName, provider: str, fixed: Mapping[str, int]) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # the lanes are the threads
        options.log_severity_level = LOG_ERRORS_ONLY
        for dimension, size in fixed.items():
            options.add_free_dimension_override_by_name(dimension, size)
        chosen: list[Any] = [EXECUTION_PROVIDERS[provider]]
        if provider == "cuda":
            if bundle.target.precision == "int8":
                raise ClipmillError(
                    "an int8 bundle runs on the CPU only; export an fp16 one (export --provider cuda), or choose "
                    "--provider cpu"
                )
            require_cuda()
            chosen = [(EXECUTION_PROVIDERS[provider], CUDA_OPTIONS)]
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            # by default a provider that fails, even in mid-run, gives way to the CPU and says so on stdout
            session = ort.InferenceSession(bundle.onnx_path(name), options, providers=chosen, enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions have no common class but this
            reason = str(error).strip().splitlines()[0]
            raise ClipmillError(
                f"ONNX Runtime cannot run {bundle.onnx_path(name)} on {provider}: {reason}; see --provider"
            ) from error
        running = session.get_providers()[0]
        if running != EXECUTION_PROVIDERS[provider]:  # a CUDA provider that fails to load leaves only a log line
            raise ClipmillError(
                f"provider {provider} did not come up, ONNX Runtime fell back to {running}; CUDA 13 or cuDNN 9 is "
                "missing or does not fit the driver; install them or choose --provider cpu"
            )
        return session


def require_cuda() -> None:
    """Raise ClipmillError naming what is missing; the list of available providers alone proves nothing."""
    if EXECUTION_PROVIDERS["cuda"] not in ort.get_available_providers():
        raise ClipmillError(
            "the installed onnxruntime has no CUDA provider; install onnxruntime-gpu (and uninstall onnxruntime), or "
            "choose --provider cpu"
        )
    driver = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(driver)
    except OSError as error:
        raise ClipmillError(
            f"no NVIDIA driver on this machine ({driver} does not load); install it, or choose --provider cpu"
        ) from error
    ort.preload_dlls()
