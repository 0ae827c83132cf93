"""Dependencies point one way: cli, benchmarks -> export, probes -> engine. Read from the imports, and not run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {  # what each may import of ours
    "engine": {"engine"},
    "export": {"engine", "export"},
    "probes": {"engine", "probes"},
    "benchmarks": {"engine", "export", "probes", "benchmarks"},
    "cli": {"engine", "export", "probes"},
}
OURS = {*LAYERS, "tests"}
LAYOUT = {"cli.py", "engine", "export", "probes", "benchmarks", "tests"}  # where Python files may lie
LOOSE = {  # and the reason why one lies elsewhere; it may import nothing of ours
    "datasets_cache/cifar10_sample/make_sample.py": "a script beside the data that it made, telling whence they are",
}

# Only a machine that exports, or measures itself against the reference, has these installed.
EXPORT_ONLY = {"torch", "transformers", "optimum", "onnx", "onnxscript", "huggingface_hub", "safetensors"}
EXPORTS = ("export/", "benchmarks/")
CLI_MAY_IMPORT = {"click", "engine.errors"}  # besides the standard library, outside its commands


@dataclass(frozen=True)
class Allowed:
    """An exception to the rules: `module` in the files whose path begins with `where`."""

    module: str
    where: str
    inside_functions_only: bool
    reason: str


EXCEPTIONS = (
    Allowed("torchvision", "engine/datasets/", True, "named datasets that it downloads; the others never load it"),
    Allowed("torchvision", "export/mini_clip/", False, "the training script may fetch CIFAR-10 with it"),
)


@dataclass(frozen=True)
class Import:
    module: str  # in full: "engine.errors"; of `from engine import errors`, "engine.errors" too
    line: int
    in_function: bool
    for_types_only: bool  # under `if TYPE_CHECKING:`, so never run

    @property
    def root(self) -> str:
        return self.module.partition(".")[0]


def imports_of(path: str, source: str) -> Iterator[Import]:
    """Every import of a file, also those inside functions and those by name through importlib."""
    yield from _imports(ast.parse(source, path), Path(path).with_suffix("").parts[:-1], False, False)


def _imports(node: ast.AST, package: tuple[str, ...], in_function: bool, for_types_only: bool) -> Iterator[Import]:
    for name in _imported(node, package):
        yield Import(name, getattr(node, "lineno", 0), in_function, for_types_only)
    in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    type_checking = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _imports(child, package, in_function, for_types_only or (type_checking and field == "body"))


def _imported(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else ()
        module = [*above, *([node.module] if node.module else [])]
        return [".".join([*module, alias.name]) for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        return [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return []


def violations(path: str, source: str) -> list[str]:
    """What the file at `path` (relative, POSIX) imports against the rules, a line each."""
    layer = Path(path).parts[0].removesuffix(".py")
    found = []
    for imported in imports_of(path, source):
        if any(_is_allowed(exception, path, imported) for exception in EXCEPTIONS):
            continue
        if reason := _violation(layer, path, imported):
            found.append(f"{path}:{imported.line} imports {imported.module}: {reason}")
    return found


def _is_allowed(exception: Allowed, path: str, imported: Import) -> bool:
    placed = imported.in_function or not exception.inside_functions_only
    return imported.root == exception.module and path.startswith(exception.where) and placed


def _violation(layer: str, path: str, imported: Import) -> str | None:
    if imported.root in OURS and imported.root not in LAYERS[layer]:
        return f"{layer} must not know {imported.root}"
    if imported.root in EXPORT_ONLY and not path.startswith(EXPORTS):
        return "only export and benchmarks may"
    if imported.root == "torchvision":
        return f"see EXCEPTIONS in {Path(__file__).name}"
    if imported.root == "onnxruntime" and layer == "probes":
        return "probes work on arrays"
    if layer == "cli" and not imported.in_function and not imported.for_types_only and not _is_light(imported):
        return "what is heavy is imported inside the command that needs it"
    return None


def _is_light(imported: Import) -> bool:
    names = (imported.module, imported.module.rpartition(".")[0])  # `from engine.errors import X` is engine.errors.X
    return imported.root in sys.stdlib_module_names or any(name in CLI_MAY_IMPORT for name in names)


def python_files() -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix()
        for top in ROOT.iterdir()
        if not top.name.startswith(".")
        for path in ([top] if top.is_file() else top.rglob("*"))
        if path.suffix in (".py", ".pyi")
    )


def layered_files() -> list[str]:
    return [path for path in python_files() if not path.startswith("tests/") and Path(path).parts[0] in LAYOUT]


@pytest.mark.parametrize("path", layered_files())
def test_the_layers_hold(path: str) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_python_lies_only_where_a_layer_is() -> None:
    assert [path for path in python_files() if Path(path).parts[0] not in LAYOUT] == sorted(LOOSE)
    for path in LOOSE:
        imported = {found.root for found in imports_of(path, (ROOT / path).read_text(encoding="utf-8"))}
        assert not imported & (OURS | EXPORT_ONLY), path
    assert {"cli.py", "engine", "export", "probes"} <= {Path(path).parts[0] for path in layered_files()}


@pytest.mark.parametrize("module", sorted(CLI_MAY_IMPORT - {"click"}))
def test_what_the_command_line_imports_at_once_is_light_itself(module: str) -> None:
    parts = module.split(".")
    packages = [Path(*parts[:depth], "__init__.py") for depth in range(1, len(parts))]  # they run first
    for path in [*packages, Path(*parts).with_suffix(".py")]:
        imported = {found.root for found in imports_of(path.as_posix(), (ROOT / path).read_text(encoding="utf-8"))}
        assert imported <= sys.stdlib_module_names, path


@pytest.mark.parametrize(
    ("path", "source", "names"),
    [
        ("engine/x.py", "import probes", "probes"),
        ("engine/x.py", "def f():\n    from export.verify import certify", "export.verify.certify"),
        ("engine/deep/x.py", "class A:\n    def f(self):\n        import cli", "cli"),
        ("engine/x.py", "import benchmarks.extract", "benchmarks.extract"),
        ("engine/x.py", "from .. import probes", "probes"),
        ("engine/x.py", "import numpy, torch", "torch"),
        ("engine/x.py", "import torch.nn as nn", "torch.nn"),
        ("engine/x.py", "f = lambda: __import__('onnx')", "onnx"),
        ("engine/x.py", "import importlib\nimportlib.import_module('transformers')", "transformers"),
        ("engine/x.py", "try:\n    import safetensors\nexcept ImportError:\n    pass", "safetensors"),
        ("engine/x.py", "def f():\n    import torchvision", "torchvision"),
        ("engine/datasets/x.py", "import torchvision", "torchvision"),
        ("engine/datasets/x.py", "def f():\n    import torch", "torch"),
        ("export/x.py", "import probes.logits", "probes.logits"),
        ("export/x.py", "import torchvision", "torchvision"),
        ("export/x.py", "from tests import conftest", "tests.conftest"),
        ("probes/x.py", "from export import towers", "export.towers"),
        ("probes/x.py", "def f():\n    import onnxruntime as ort", "onnxruntime"),
        ("probes/x.py", "from torch import Tensor", "torch.Tensor"),
        ("probes/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", "torch"),
        ("cli.py", "import numpy as np", "numpy"),
        ("cli.py", "from engine import stream", "engine.stream"),
        ("cli.py", "from engine.stream import extract", "engine.stream.extract"),
        ("cli.py", "class A:\n    import pyarrow", "pyarrow"),
        ("cli.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import numpy", "numpy"),
        ("cli.py", "def f():\n    import benchmarks.extract", "benchmarks.extract"),
        ("cli.py", "def f():\n    import torch", "torch"),
        ("benchmarks/x.py", "def f():\n    import cli", "cli"),
    ],
)
def test_each_breach_is_seen(path: str, source: str, names: str) -> None:
    (found,) = violations(path, source)
    assert f" imports {names}: " in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine/x.py", "import onnxruntime\nfrom engine.errors import ClipmillError\nfrom . import bundle"),
        ("engine/datasets/x.py", "def f():\n    from torchvision.datasets import CIFAR100"),
        ("export/x.py", "import torch, onnx\nfrom onnxruntime.transformers import optimizer\nimport engine.bundle"),
        ("export/mini_clip/x.py", "import torchvision\nfrom export.mini_clip import captions"),
        ("probes/x.py", "import sklearn, numpy\nfrom engine.manifest import read_run\nfrom probes.logits import z"),
        ("benchmarks/x.py", "import torch, export.towers, probes.logits, engine.stream, benchmarks.machine_card"),
        ("cli.py", "import json, click\nfrom engine.errors import ClipmillError\nfrom collections.abc import Mapping"),
        ("cli.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from engine.bundle import Bundle"),
        (
            "cli.py",
            "def f():\n    import numpy, probes.linear\n    from export.to_onnx import export_bundle",
        ),
    ],
)
def test_what_the_rules_allow_is_left_alone(path: str, source: str) -> None:
    assert violations(path, source) == []
