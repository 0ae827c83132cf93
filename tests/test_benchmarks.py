"""Each benchmark runs through, on the embedded model with tiny counts, and tells what it promises. Nothing is timed."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner

import cli
from engine.bundle import Bundle

ROOT = Path(cli.__file__).resolve().parent
SHARED = {"bundles", "machine_card", "measure", "rivals"}  # parts of several benchmarks
GPU = {"gpu_throughput"}  # run by gpu_acceptance.sh; see test_gpu_docs.py
LOOPS = {"transformers, slow processor", "transformers, fast processor", "ONNX Runtime with PIL"}
MILLS = {"clipmill fp32", "clipmill int8"}

Benchmark = Callable[..., dict[str, Any]]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A file of benchmarks/, imported as where Python runs it as a script."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def benchmark(module: Callable[[str], ModuleType], bundles: Path, mini: Bundle) -> Benchmark:
    """Run one in this process, where torch is loaded already; what its last line holds."""

    def run(name: str, *options: str) -> dict[str, Any]:
        shared = () if name in module("all").WITHOUT_BUNDLES else ("--bundles", str(bundles))
        result = CliRunner().invoke(module(name).main, [*options, *shared], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        card, body = result.stdout.split("\n\n", 1)
        body, last_line = body.rstrip("\n").rsplit("\n\n", 1)
        assert re.search(r"^usable_cpus +\d+$", card, re.MULTILINE)
        assert len(body.splitlines()) > 2
        found: dict[str, Any] = json.loads(last_line)
        assert found["benchmark"] == name
        assert {"processor", "usable_cpus", "python", "numpy"} <= set(found["machine"])
        return found

    return run


def test_extract_names_every_contestant_and_compares_their_embeddings(benchmark: Benchmark) -> None:
    found = benchmark("extract", "--model", "mini", "--images", "12", "--rounds", "1")
    contestants = found["contestants"]
    assert LOOPS | MILLS | {"bare fp32", "bare int8"} <= set(contestants)
    assert found["absent"]["open_clip"] in ("not installed", "has no mini")
    assert ("OpenVINO with PIL" in contestants) != ("openvino" in found["absent"])
    for name, values in contestants.items():
        assert set(values["images_per_second"]) == {"median", "slowest", "fastest"}
        assert values["ratio_to_slow"] > 0
        assert values["ratio_to_fast"] > 0
        assert ("min_centred_cosine" in values) != name.startswith("bare")
        assert values.get("min_cosine", 1) > (0.99 if name == "clipmill int8" else 0.9999)
    assert set(found["over_bare"]) == {"fp32", "int8"}


def test_session_measures_every_combination(benchmark: Benchmark) -> None:
    found = benchmark("session", "--model", "mini", "--rounds", "1")
    assert set(found["bound_over_plain"]) == {"image fp32", "image int8", "text fp32"}
    cells = found["cells"]
    assert {cell["batch_size"] for cell in cells} == {1, 4, 8, 16, 32}
    combinations = {(cell["tower"], cell["precision"], cell["batch_size"], cell["lanes"]) for cell in cells}
    lanes = {cell["lanes"] for cell in cells}
    assert len(combinations) == len(cells) == 3 * 5 * len(lanes)


def test_text_embeds_the_same_prompts_with_every_contestant(
    benchmark: Benchmark, module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module("text"), "PROMPTS", 70)  # more than a batch of transformers
    found = benchmark("text", "--model", "mini", "--rounds", "1")
    assert found["tokens"]["longest"] <= found["tokens"]["context"] == 32
    loops = {"transformers, padded to the context", "transformers, padding=True"}
    assert set(found["contestants"]) == {"clipmill"} | loops
    for values in found["contestants"].values():
        assert {"prompts_per_second", "ratio_to_context", "ratio_to_longest"} <= set(values)
        assert values["min_cosine"] > 0.9999


def test_the_prompts_are_as_many_as_promised_and_end_where_a_larger_vocabulary_ends(
    module: Callable[[str], ModuleType],
) -> None:
    from transformers import CLIPConfig

    config = CLIPConfig().text_config
    ids, eos_position = module("text")._tokens(config)
    assert len({tuple(row) for row in ids.tolist()}) == len(ids) == 415
    assert (ids[:, 0] == config.bos_token_id).all()
    assert ((ids == config.eos_token_id).argmax(axis=1) == eos_position).all()
    assert len(set(eos_position.tolist())) > 5


def test_decode_compares_a_folder_with_the_slower_of_its_parts(benchmark: Benchmark) -> None:
    found = benchmark("decode", "--model", "mini", "--images", "4", "--folder-images", "9", "--rounds", "1")
    assert {row["jpeg"] for row in found["decode"]} == {"32x32", "224x224", "500x375, resized to 224x224"}
    assert {row["workers"] for row in found["decode"]} == {1, found["machine"]["usable_cpus"]}
    for claim in found["folder"].values():
        assert set(claim) == {"decode alone", "session alone", "extract", "ratio"}


def test_memory_measures_each_extraction_in_a_process_of_its_own(
    benchmark: Benchmark, module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module("memory"), "TAR_IMAGES", 3)
    found = benchmark("memory", "--images", "20", "--images", "1100", "--tars", "1", "--tars", "2")["extractions"]
    assert [extraction["images"] for extraction in found["repeated sample"]] == [20, 1100]
    assert [extraction["images"] for extraction in found["tars of 1 MB images"]] == [3, 6]
    for extractions in found.values():
        assert extractions[0]["ratio_to_smallest"] == 1
        assert all(extraction["peak_rss_bytes"] > 50e6 for extraction in extractions)


def test_start_compares_fresh_processes(benchmark: Benchmark) -> None:
    found = benchmark("start", "--model", "mini", "--rounds", "1")
    assert set(found["contestants"]) == MILLS | {"transformers", "python cli.py --help"}
    for values in found["contestants"].values():
        assert set(values) == {"seconds", "ratio_to_transformers"}


def test_kernels_compares_what_computes_the_same_and_names_the_limit(
    benchmark: Benchmark, module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = module("kernels")
    small = {"TRIAD_NUMBERS": 1000, "CACHED_PASSES": 2, "IMAGES": 70, "LABELS": 5000, "BLOCKWISE_ROWS": (10, 5000)}
    for name, value in small.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels, "CASES", (kernels.Case(70, 8, 25, 2), kernels.Case(70, 8, 1, 1)))
    found = benchmark("kernels", "--rounds", "1")
    assert set(found["limits"]) == {"gigabytes_per_second", "gigaexponentials_per_second"}
    for case in found["entropies"]:
        assert set(case["ratios"]) == {"SciPy", "NumPy", "torch"}
        assert case["limit"] in ("STREAM triad", "exponentials")
        assert case["share_of_limit"] > 0
    assert len(found["others"]) == 6
    assert all(values["ratios"] for values in found["others"].values())
    assert [values["rows"] for values in found["blockwise"]] == [10, 5000]


def test_kernels_refuses_a_contestant_that_computes_something_else(module: Callable[[str], ModuleType]) -> None:
    with pytest.raises(click.ClickException, match="rival computes something else"):
        module("kernels")._check_same({"clipmill": [1.0, 2.0], "rival": [1.0, 2.1]})


def test_turns_are_interleaved_and_the_first_does_not_count(module: Callable[[str], ModuleType]) -> None:
    measure = module("measure")
    called: list[str] = []

    def contestant(name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            called.append(name)
            return seconds * len(called)

        return run

    seconds = measure.take_turns({"a": contestant("a", 1), "b": contestant("b", 10)}, 2)
    assert called == ["a", "b"] * 3
    assert seconds == {"a": [3, 5], "b": [40, 60]}
    assert measure.ratio([6, 8, 30], [3, 2, 10]) == 3  # the median of 2, 4 and 3, and not the ratio of medians
    assert measure.speeds(100, [4, 2, 5]) == {"median": 25, "slowest": 20, "fastest": 50}


def test_all_runs_every_benchmark_on_shared_bundles_and_writes_one_page(
    module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            f'"""What {name} measures.\n\nAnd how.\n\n    python benchmarks/{name}.py\n"""\n'
            "import sys\n"
            f"assert sys.argv[1:2] == {['--bundles'] if name == 'one' else []}\n"
            f"print('processor  P\\nmemory     1\\n\\nspeed of {name}\\n\\nsaid of it\\n\\n{{}}')\n"
        )
    monkeypatch.setattr(module("all"), "FOLDER", tmp_path)
    monkeypatch.setattr(module("all"), "NAMES", ("one", "two"))
    monkeypatch.setattr(module("all"), "WITHOUT_BUNDLES", {"two"})
    result = CliRunner().invoke(module("all").main, ["--output", str(tmp_path / "RESULTS.md")], catch_exceptions=False)
    assert result.exit_code == 0
    page = (tmp_path / "RESULTS.md").read_text()
    assert page.count("processor  P") == 1
    assert "{}" not in page
    assert "## one\n\nWhat one measures.\n\nAnd how.\n\n```\nspeed of one\n\nsaid of it\n```\n\n" in page
    assert "`python cli.py bench two`, 0 s" in page


def test_bench_knows_every_benchmark(module: Callable[[str], ModuleType]) -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts - SHARED - GPU == set(cli.BENCHMARKS)
    assert (*module("all").NAMES, "all") == cli.BENCHMARKS


def test_bench_passes_on_options_and_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), "bench", "session"]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert helped.returncode == 0
    assert "--rounds" in helped.stdout
    mistaken = subprocess.run([*command, "--round", "x"], capture_output=True, text=True, cwd=tmp_path)
    assert mistaken.returncode == 2
    assert CliRunner().invoke(cli.main, ["bench", "sessions"]).exit_code == 2


def test_bench_without_the_export_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = CliRunner().invoke(cli.main, ["bench", "session"])
    assert result.exit_code == 1
    assert result.stderr == "Error: bench needs torch, which is not installed: pip install -e '.[export]'\n"
