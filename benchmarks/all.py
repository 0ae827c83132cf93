"""Every benchmark on bundles that are exported once; what they print, without the JSON, becomes RESULTS.md.

python benchmarks/all.py
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

NAMES = ("extract", "session", "text", "decode", "memory", "start", "kernels")
WITHOUT_BUNDLES = {"kernels"}  # computes on random numbers
FOLDER = Path(__file__).resolve().parent


@click.command()
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=FOLDER / "RESULTS.md",
    help="Markdown file.  [default: benchmarks/RESULTS.md]",
)
def main(output: Path) -> None:
    """Run every benchmark and write RESULTS.md."""
    printed, seconds = {}, {}
    with tempfile.TemporaryDirectory() as bundles:
        for name in NAMES:
            click.echo(f"== {name}", err=True)
            began = time.perf_counter()
            command = [sys.executable, str(FOLDER / f"{name}.py")]
            if name not in WITHOUT_BUNDLES:
                command += ["--bundles", bundles]
            printed[name] = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            seconds[name] = time.perf_counter() - began
            click.echo(printed[name])
    output.write_text(results(printed, seconds), encoding="utf-8")


def results(printed: dict[str, str], seconds: dict[str, float]) -> str:
    """RESULTS.md of what the benchmarks printed: the machine card once, then a section for each."""
    card, _, _ = next(iter(printed.values())).partition("\n\n")
    parts = ["# Results", "`make bench`, which writes this page, on this machine:", _fenced(card)]
    for name, text in printed.items():
        _, _, body = text.partition("\n\n")
        body, _, _ = body.rpartition("\n\n")  # the last line is JSON
        docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""
        about, _, _ = docstring.rpartition("\n\n")  # the last paragraph is the command
        parts += [f"## {name}", about, _fenced(body), f"`python cli.py bench {name}`, {seconds[name]:.0f} s"]
    return "\n\n".join(parts) + "\n"


def _fenced(text: str) -> str:
    return f"```\n{text}\n```"


if __name__ == "__main__":
    main()
