"""The numeric kernels against NumPy, SciPy, scikit-learn, torch and a loop over dicts, and against the machine.

Entropies of softmax(logits / tau) at T temperatures take N x K x T exponentials, and the logits have to be read once.
Two limits are measured in the same turns: the memory's bandwidth (STREAM triad), and how many exponentials a second the
kernel's own `_exp` gives where nothing else is done, on numbers that stay in the first-level cache. So the kernel needs
at least max(bytes of the logits / bandwidth, exponentials / their limit), and "of limit" is this over what it took.
A rival with a * took 2 of the 25 temperatures, which count 12.5 times: it goes through them one by one. All start from
float32 in memory and may use every core. Last, entropies of embeddings that come in blocks: how far the memory's
high-water mark rose, each number of rows in a process of its own.

    python benchmarks/kernels.py --rounds 2
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numba
import numpy as np
import torch
from measure import Contestant, ratio, report, table, take_turns, timed
from numpy.typing import NDArray
from scipy.special import softmax as scipy_softmax
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import confusion_matrix
from sklearn.metrics.cluster import contingency_matrix

from engine.counting import contingency, purity
from engine.kernels import _exp, cosine_logits, normalise, softmax, softmax_entropy, top_k
from engine.machine import library_versions, usable_cpus

ROOT = Path(__file__).resolve().parents[1]


class Case(NamedTuple):
    """Entropies of N x K logits at T temperatures, of which the rivals take `measured`."""

    rows: int
    columns: int
    taus: int
    measured: int


CASES = (
    Case(60_000, 32, 25, 25), Case(1_000_000, 32, 25, 2), Case(60_000, 415, 25, 2),
    Case(60_000, 32, 1, 1), Case(1_000_000, 32, 1, 1), Case(60_000, 1_000, 1, 1),
)  # fmt: skip
TAUS = np.geomspace(0.01, 10, 25)
IMAGES, DIM, PROMPTS, BEST, TAU = 60_000, 512, 415, 5, 0.07
LABELS, CLASSES = 1_000_000, 100
BLOCKWISE_ROWS = (50_000, 500_000)

TRIAD_NUMBERS = 2**24  # float64 in each of three arrays: 128 MB, several times the largest cache
CACHED_NUMBERS, CACHED_PASSES = 2048, 20_000  # float32 of each thread: 8 KB read and 8 KB written, over and over
SAME = 1e-3  # the most by which two results in float32 of the same thing differ

OURS, TRIAD, EXP = "clipmill", "STREAM triad", "exponentials"

Floats = NDArray[np.float32]
Seconds = Mapping[Any, list[float]]

# In a process that holds nothing but the kernels; what it rises by includes their compiled code.
BLOCKWISE = """
import json, sys, time
import numpy as np
from engine.kernels import prompt_entropies
from engine.machine import peak_rss

start, random = peak_rss(), np.random.default_rng(0)
rows, text, taus = int(sys.argv[1]), random.standard_normal((32, 512), np.float32), np.geomspace(0.01, 10, 25)
began = time.perf_counter()
blocks = (random.standard_normal((min(4096, rows - row), 512), np.float32) for row in range(0, rows, 4096))
done = sum(len(entropies) for entropies in prompt_entropies(blocks, text, taus))
print(json.dumps({"rows": done, "bytes_above_start": peak_rss() - start, "seconds": time.perf_counter() - began}))
"""


@click.command()
@click.option("--rounds", default=2, show_default=True, help="Turns of each contestant.")
def main(rounds: int) -> None:
    """Seconds of each kernel and of others that compute the same."""
    torch.set_num_threads(usable_cpus())
    contestants: dict[Any, Contestant] = {TRIAD: _triad_contestant(), EXP: _exp_contestant()}
    for case in CASES:
        contestants |= {(case, name): contestant for name, contestant in _entropy_contestants(case).items()}
    others = _other_works()
    for work, runs in others.items():
        contestants |= {(work, name): timed(run) for name, run in runs.items()}
    seconds = take_turns(contestants, rounds)
    limits = {
        "gigabytes_per_second": 3 * 8 * TRIAD_NUMBERS / statistics.median(seconds[TRIAD]) / 1e9,
        "gigaexponentials_per_second": _cached_exps() / statistics.median(seconds[EXP]) / 1e9,
    }
    libraries = library_versions(("numba", "scipy", "scikit-learn"))
    result: dict[str, Any] = {
        "entropies": [{**case._asdict(), **_entropy_result(case, seconds)} for case in CASES],
        "others": {work: _result(work, runs, seconds) for work, runs in others.items()},
        "blockwise": [_blockwise(rows) for rows in BLOCKWISE_ROWS],
    }
    body = [_entropy_table(result["entropies"]), _limits_line(limits), _other_table(result["others"])]
    body += [
        _blockwise_table(result["blockwise"]),
        ", ".join(f"{name} {version}" for name, version in libraries.items()),
    ]
    report("kernels", "\n\n".join(body), {"rounds": rounds, "libraries": libraries, "limits": limits, **result})


# The limits -----------------------------------------------------------------------------------------------------------


def _triad_contestant() -> Contestant:
    a, b, c = (np.full(TRIAD_NUMBERS, value, np.float64) for value in (0, 1, 2))
    return timed(partial(_triad, a, b, c))


def _exp_contestant() -> Contestant:
    numbers = np.random.default_rng(0).uniform(-20, 0, (usable_cpus(), CACHED_NUMBERS)).astype(np.float32)
    return timed(partial(_exp_passes, numbers, np.empty_like(numbers), CACHED_PASSES))


def _cached_exps() -> int:
    return usable_cpus() * CACHED_NUMBERS * CACHED_PASSES


@numba.njit(parallel=True)
def _triad(a: Any, b: Any, c: Any) -> None:
    for i in numba.prange(a.size):
        a[i] = b[i] + 3.0 * c[i]


@numba.njit(parallel=True, fastmath={"contract"})
def _exp_passes(numbers: Any, exps: Any, passes: int) -> None:
    for thread in numba.prange(numbers.shape[0]):
        for _ in range(passes):
            for i in range(numbers.shape[1]):
                exps[thread, i] = _exp(numbers[thread, i])


# Entropies ------------------------------------------------------------------------------------------------------------


def _entropy_contestants(case: Case) -> dict[str, Contestant]:
    """Our kernel at all temperatures at once, the rivals at `case.measured` of them, counted as all."""
    logits = (0.1 * np.random.default_rng(0).standard_normal((case.rows, case.columns))).astype(np.float32)
    taus = TAUS[: case.taus]
    measured = taus[: case.measured]
    rivals = {"SciPy": _scipy_entropies, "NumPy": _numpy_entropies, "torch": _torch_entropies}
    some = logits[:1000]
    _check_same({OURS: softmax_entropy(some, measured)} | {name: run(some, measured) for name, run in rivals.items()})

    def scaled(work: Callable[[], object]) -> Contestant:
        run = timed(work)
        return lambda: run() * case.taus / case.measured

    return {OURS: timed(partial(softmax_entropy, logits, taus))} | {
        name: scaled(partial(run, logits, measured)) for name, run in rivals.items()
    }


def _scipy_entropies(logits: Floats, taus: NDArray[np.float64]) -> NDArray[Any]:
    return np.stack([scipy_entropy(scipy_softmax(logits / np.float32(tau), axis=1), axis=1) for tau in taus], axis=1)


def _numpy_entropies(logits: Floats, taus: NDArray[np.float64]) -> NDArray[Any]:
    """The formula of `softmax_entropy`, as one would write it by hand."""
    differences = logits - logits.max(axis=1, keepdims=True)
    entropies = []
    for tau in taus:
        z = differences / np.float32(tau)
        exps = np.exp(z)
        total = exps.sum(axis=1)
        entropies.append(np.log(total) - (exps * z).sum(axis=1) / total)
    return np.stack(entropies, axis=1)


def _torch_entropies(logits: Floats, taus: NDArray[np.float64]) -> NDArray[Any]:
    with torch.inference_mode():
        tensor, entropies = torch.from_numpy(logits), []
        for tau in taus.tolist():
            log_probabilities = torch.log_softmax(tensor / tau, dim=1)
            entropies.append(-(log_probabilities.exp() * log_probabilities).sum(dim=1))
        stacked: NDArray[Any] = torch.stack(entropies, dim=1).numpy()
    return stacked


def _entropy_result(case: Case, seconds: Seconds) -> dict[str, Any]:
    """Milliseconds, ratios, and the share of the limit, of the logits read once or of the exponentials."""
    read, exps = 4 * case.rows * case.columns, case.rows * case.columns * case.taus
    reading = [taken * read / (3 * 8 * TRIAD_NUMBERS) for taken in seconds[TRIAD]]
    computing = [taken * exps / _cached_exps() for taken in seconds[EXP]]
    least = [max(both) for both in zip(reading, computing, strict=True)]
    return {
        **_result(case, (OURS, "SciPy", "NumPy", "torch"), seconds),
        "limit": TRIAD if statistics.median(reading) > statistics.median(computing) else EXP,
        "share_of_limit": ratio(least, seconds[case, OURS]),
    }


def _entropy_table(results: list[dict[str, Any]]) -> str:
    rivals = ("SciPy", "NumPy", "torch")
    rows = []
    for values in results:
        star = "*" if values["measured"] < values["taus"] else ""
        milliseconds = values["milliseconds"]
        rows.append(
            [f"N={values['rows']:,} K={values['columns']} T={values['taus']}", f"{milliseconds[OURS]:.1f}"]
            + [f"{milliseconds[name]:.0f}{star}" for name in rivals]
            + [f"{values['ratios'][name]:.1f}" for name in rivals]
            + [f"{values['share_of_limit']:.0%}", values["limit"]]
        )
    return table(["entropies, ms", OURS, *rivals, *(f"x {name}" for name in rivals), "of limit", "which"], rows)


def _limits_line(limits: Mapping[str, float]) -> str:
    return (
        f"limits: STREAM triad {limits['gigabytes_per_second']:.1f} GB/s, "
        f"{limits['gigaexponentials_per_second']:.2f} G exponentials/s on {usable_cpus()} CPUs"
    )


# The other kernels ----------------------------------------------------------------------------------------------------


def _other_works() -> dict[str, dict[str, Callable[[], Any]]]:
    """Contestants that compute the same, by what they compute, ours first."""
    random = np.random.default_rng(0)
    images = random.standard_normal((IMAGES, DIM), np.float32)
    text = random.standard_normal((PROMPTS, DIM), np.float32)
    logits = cosine_logits(images, text)
    labels, clusters = random.integers(0, CLASSES, (2, LABELS))
    shape = (CLASSES, CLASSES)
    of_images, of_text, of_logits = map(torch.from_numpy, (images, text, logits))
    unit = torch.nn.functional.normalize
    works: dict[str, dict[str, Callable[[], Any]]] = {
        f"normalise {IMAGES:,} x {DIM}": {
            OURS: lambda: normalise(images),
            "NumPy": lambda: _numpy_unit(images),
            "torch": lambda: unit(of_images),
        },
        f"cosine logits {IMAGES:,} x {DIM} x {PROMPTS}": {
            OURS: lambda: cosine_logits(images, text),
            "NumPy": lambda: _numpy_unit(images) @ _numpy_unit(text).T,
            "torch": lambda: unit(of_images) @ unit(of_text).T,
        },
        f"softmax {IMAGES:,} x {PROMPTS}": {
            OURS: lambda: softmax(logits, TAU),
            "SciPy": lambda: scipy_softmax(logits / np.float32(TAU), axis=1),
            "torch": lambda: torch.softmax(of_logits / TAU, dim=1),
        },
        f"top {BEST} of {IMAGES:,} x {PROMPTS}": {
            OURS: lambda: top_k(logits, BEST),
            "NumPy": lambda: _numpy_top(logits),
            "torch": lambda: torch.topk(of_logits, BEST, dim=1).indices,
        },
        f"purity {LABELS:,} labels, {CLASSES} classes": {
            OURS: lambda: purity(labels, clusters),
            "dicts": lambda: _dict_purity(labels, clusters),
            "dicts, of lists": lambda: _dict_purity(labels.tolist(), clusters.tolist()),
            "scikit-learn": lambda: contingency_matrix(labels, clusters).max(axis=0).sum() / LABELS,
        },
        f"confusion {LABELS:,} labels, {CLASSES} classes": {
            OURS: lambda: contingency(labels, clusters, shape),
            "scikit-learn": lambda: confusion_matrix(labels, clusters),
        },
    }
    for runs in works.values():
        _check_same({name: run() for name, run in runs.items()})
    return works


def _numpy_unit(rows: Floats) -> Floats:
    unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _numpy_top(logits: Floats) -> NDArray[np.int64]:
    columns = np.argpartition(-logits, BEST, axis=1)[:, :BEST]
    order = np.argsort(-np.take_along_axis(logits, columns, axis=1), axis=1)
    return np.take_along_axis(columns, order, axis=1)


def _dict_purity(labels: Collection[int], clusters: Collection[int]) -> float:
    """Counts the labels of each cluster row by row; an array gives NumPy's numbers, which hash slower than a list's."""
    counts: dict[int, dict[int, int]] = {}
    for label, cluster in zip(labels, clusters, strict=True):
        of_cluster = counts.setdefault(cluster, {})
        of_cluster[label] = of_cluster.get(label, 0) + 1
    return sum(max(of_cluster.values()) for of_cluster in counts.values()) / len(labels)


def _other_table(results: Mapping[str, dict[str, Any]]) -> str:
    rows = [
        [
            f"{work}: {name}",
            f"{values['milliseconds'][OURS]:.1f}",
            f"{values['milliseconds'][name]:.1f}",
            f"{found:.2f}",
        ]
        for work, values in results.items()
        for name, found in values["ratios"].items()
    ]
    return table(["ms", OURS, "rival", "x rival"], rows)


# All of them ----------------------------------------------------------------------------------------------------------


def _check_same(found: Mapping[str, Any]) -> None:
    expected = np.asarray(found[OURS])
    for name, values in found.items():
        if not np.allclose(np.asarray(values), expected, rtol=0, atol=SAME):
            raise click.ClickException(f"{name} computes something else: its time cannot be compared")


def _result(work: Any, names: Iterable[str], seconds: Seconds) -> dict[str, Any]:
    """Median milliseconds of each contestant, and how many times faster than each rival we are."""
    return {
        "milliseconds": {name: 1e3 * statistics.median(seconds[work, name]) for name in names},
        "ratios": {name: ratio(seconds[work, name], seconds[work, OURS]) for name in names if name != OURS},
    }


# Blockwise ------------------------------------------------------------------------------------------------------------


def _blockwise(rows: int) -> dict[str, Any]:
    command = [sys.executable, "-c", BLOCKWISE, str(rows)]
    click.echo(f"entropies of {rows} embeddings, block by block", err=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _blockwise_table(results: list[dict[str, Any]]) -> str:
    rows = [
        [f"{found['rows']:,}", f"{found['bytes_above_start'] / 2**20:.1f}", f"{found['seconds']:.1f}"]
        for found in results
    ]
    return table(["embeddings of 512 in blocks, K=32 T=25", "peak MiB above the start", "seconds"], rows)


if __name__ == "__main__":
    main()
