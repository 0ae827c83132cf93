"""The results of a study for people: a table in text, and report.md with the table, the trends, notes and plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.files import atomic_file
from probes.study import shown

HEADER = ("row", "measure", "published", "ours", "difference", "chance", "seconds", "data")

_CHANCE = {"accuracy": "chance", "purity": "chance", "mean_entropy": "max_entropy"}  # what says nothing: log K


def table_rows(results: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """A line a measure. The difference is given only where a row repeats what was published, data and prompts alike.

    A published value that is a reference only stands in brackets.
    """
    for row in results["rows"]:
        if row["status"] != "done":
            yield dict.fromkeys(HEADER, "") | {"row": row["id"], "ours": row["needs"]}
            continue
        for measure in row["measures"]:
            ours, published = row["result"][measure], row["published"].get(measure)
            chance = row["result"].get(_CHANCE.get(measure))
            reference = "" if published is None else f"{published:.4f}" if row["comparable"] else f"({published:.4f})"
            yield {
                "row": row["id"],
                "measure": measure,
                "published": reference,
                "ours": shown(ours),
                "difference": ""
                if published is None or ours is None or not row["comparable"]
                else f"{ours - published:+.4f}",
                "chance": "" if chance is None else f"{chance:.4f}",
                "seconds": f"{row['seconds']:.1f}" if measure == row["measures"][0] else "",
                "data": row["data"] + (", own prompts" if row["own_prompts"] else ""),
            }


def trend_lines(results: Mapping[str, Any]) -> list[str]:
    """Whether each finding of the paper holds here: a line each."""
    words = {True: "holds", False: "does not hold", None: "cannot be told"}
    lines = []
    for trend in results["trends"]:
        pairs = zip(trend["rows"], trend["values"], strict=True) if trend["values"] else []
        values = ", ".join(f"{row} {value:.4f}" for row, value in pairs)
        lines.append(
            f"{words[trend['holds']]}: {trend['claim']}" + (f" ({trend['measure']}: {values})" if values else "")
        )
    return lines


def write_report(results: Mapping[str, Any], plots: Sequence[Path], output: Path) -> Path:
    """report.md in the output folder, beside the plots that it shows."""
    bundle = results["bundle"]
    lines = [
        f"# {results['title']}",
        f"Profile {results['profile']}, model {bundle['model']} ({bundle['precision']}, bundle `{bundle['name']}`, "
        f"fingerprint `{bundle['fingerprint'][:12]}`); "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ". Accuracies and purities are fractions, entropies nats; a published value in brackets is a "
        "reference only: the data or the prompts are not those it was found on.",
        _table(list(table_rows(results))),
        "## What the paper finds",
        "\n".join(f"- {line}" for line in trend_lines(results)),
        "## Notes",
        "\n".join(f"- **{row['id']}** ({row['where']}): {_note(row)}" for row in results["rows"]),
        *_classes(results),
        "## Plots",
        *(f"![{plot.stem}]({plot.relative_to(output).as_posix()})" for plot in plots if plot.suffix == ".png"),
    ]
    path = output / "report.md"
    with atomic_file(path) as temporary:
        temporary.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def _note(row: Mapping[str, Any]) -> str:
    if row["status"] != "done":
        return f"{row['note']} {row['needs'].capitalize()}: {row['reason']}."
    chosen = row["result"].get("chosen", {})
    told = "".join(f" Chosen on the validation part: {name} = {value:g}." for name, value in chosen.items())
    return f"{row['note']}{told}"


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    ruler = "|".join(["---"] * len(HEADER))
    body = [" | ".join(row[name] for name in HEADER) for row in rows]
    return "\n".join(f"| {line} |" for line in (" | ".join(HEADER), ruler, *body))


def _classes(results: Mapping[str, Any]) -> Iterator[str]:
    """The classification report of the baselines and of zero-shot, the best and the worst classes by F1 named."""
    rows = [row for row in results["rows"] if row["status"] == "done" and "per_class" in row["result"]]
    told = [row for row in rows if row["section"] in ("baseline", "zero-shot")]
    if not told:
        return
    yield "## Classes, by F1"
    for row in told:
        best, worst = (", ".join(map(str, row["result"][end])) for end in ("best", "worst"))
        scores = [
            f"| {c.get('name', c['label'])} | {c['precision']:.3f} | {c['recall']:.3f} | {c['f1']:.3f} | {c['rows']} |"
            for c in row["result"]["per_class"]
        ]
        yield f"**{row['id']}** on {row['data']}: best {best}; worst {worst}."
        yield "\n".join(["| class | precision | recall | F1 | rows |", "|---|---|---|---|---|", *scores])
