"""The figures of a study, each as PNG and SVG, drawn from its results alone.

Drawn on a canvas of their own, without pyplot: no window, no state shared with a caller's figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from engine.files import atomic_file

OURS, PUBLISHED, SECOND = "tab:blue", "tab:gray", "tab:orange"
Rows = Sequence[Mapping[str, Any]]


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write every figure that the finished rows allow to `folder`; the files."""
    done = [row for row in results["rows"] if row["status"] == "done"]
    files = []
    for section in dict.fromkeys(row["section"] for row in done):
        figures = _SECTIONS.get(section) or _fused(section)
        for name, figure in figures([row for row in done if row["section"] == section]):
            files += _save(figure, folder, name)
    return files


def _accuracies(name: str) -> Callable[[Rows], Iterator[tuple[str, Figure]]]:
    """A bar a row, its published value and chance beside it."""

    def figures(rows: Rows) -> Iterator[tuple[str, Figure]]:
        rows = [row for row in rows if "accuracy" in row["result"]]
        if rows:
            figure, axes = _figure(f"{name}: accuracy")
            _bars(axes, rows, "accuracy")
            yield name, figure

    return figures


def _decisions(name: str) -> Callable[[Rows], Iterator[tuple[str, Figure]]]:
    """The accuracies, and the confusion matrix of each row."""

    def figures(rows: Rows) -> Iterator[tuple[str, Figure]]:
        yield from _accuracies(name)(rows)
        for row in rows:
            yield f"confusion-{row['id']}", _confusion(row)

    return figures


def _temperature(rows: Rows) -> Iterator[tuple[str, Figure]]:
    points = [row for row in rows if "tau" in row["parameters"]]
    if points:
        figure, axes = _figure("Temperature: an SVM on z / tau", "tau")
        axes.set_xscale("log")
        taus = [row["result"]["tau"] for row in points]
        axes.set_xticks(taus, [f"{tau:g}" for tau in taus])
        axes.set_xticks([], minor=True)
        axes.plot(taus, [row["result"]["accuracy"] for row in points], "o-", color=OURS, label="accuracy")
        axes.plot(taus, [row["result"]["confidence"] for row in points], "s--", color="tab:green", label="confidence")
        _published(axes, points, "accuracy", taus)
        axes.set_ylabel("accuracy, top-1 confidence")
        _entropy_axis(axes, taus, points)
        yield "temperature", figure
    for row in (row for row in rows if row["probe"] == "entropy-sweep"):
        figure, axes = _figure("Entropy of softmax(z / tau)", "tau")
        axes.set_xscale("log")
        sweep = row["result"]["sweep"]
        axes.plot([p["tau"] for p in sweep], [p["mean_entropy"] for p in sweep], ".-", color=SECOND, label="entropy")
        axes.axhline(row["result"]["max_entropy"], color=PUBLISHED, linestyle=":", label="log K")
        axes.set_ylabel("mean entropy (nats)")
        axes.legend()
        yield "entropy-sweep", figure
    for row in (row for row in rows if row["probe"] == "regularisation"):
        figure, axes = _figure("tau is C: the SVM on z / tau and on z with C / tau^2", "C = 1 / tau^2")
        axes.set_xscale("log")
        found = row["result"]["points"]
        C = [point["C"] for point in found]
        axes.plot(C, [point["accuracy"] for point in found], "o-", color=OURS, label="C = 1 on z / tau")
        axes.plot(C, [point["accuracy_with_C"] for point in found], "x--", color=SECOND, label="C = 1 / tau^2 on z")
        axes.set_ylabel("accuracy")
        axes.legend()
        yield "temperature-as-C", figure


def _vocabulary(rows: Rows) -> Iterator[tuple[str, Figure]]:
    if not rows:
        return
    figure, axes = _figure("Vocabulary: accuracy and entropy by the number of prompts", "prompts")
    counts = [row["result"]["prompts"] for row in rows]
    axes.plot(counts, [row["result"]["accuracy"] for row in rows], "o-", color=OURS, label="accuracy")
    _published(axes, rows, "accuracy", counts)
    axes.set_ylabel("accuracy")
    _entropy_axis(axes, counts, rows)
    yield "vocabulary", figure


def _clustering(rows: Rows) -> Iterator[tuple[str, Figure]]:
    if rows:
        figure, axes = _figure("Clustering: purity")
        _bars(axes, rows, "purity")
        yield "clustering", figure


def _proposed(rows: Rows) -> Iterator[tuple[str, Figure]]:
    yield from _accuracies("proposed")([row for row in rows if row["probe"] == "class-agnostic"])
    for row in (row for row in rows if row["probe"] == "calibration"):
        figure, axes = _figure("Reliability of zero-shot confidence", "confidence")
        axes.plot([0, 1], [0, 1], color=PUBLISHED, linestyle=":", label="calibrated")
        for when, marker in (("before", "o-"), ("after", "s--")):
            found = row["result"][when]
            bins = found["reliability"]
            label = f"tau {found['tau']:.3g}: ECE {found['ece']:.3f}, NLL {found['nll']:.3f}"
            axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], marker, label=label)
        axes.set_ylabel("accuracy")
        axes.legend()
        yield "reliability", figure
    for row in (row for row in rows if row["probe"] == "redundancy"):
        figure, axes = _figure("Redundancy: the first k prompts", "prompts")
        axes.set_xscale("log")
        curve = row["result"]["curve"]
        counts = [point["prompts"] for point in curve]
        axes.plot(counts, [point["accuracy"] for point in curve], "o-", color=OURS, label="greedy")
        axes.plot(counts, [point["random_accuracy"] for point in curve], "s--", color=SECOND, label="at random")
        axes.axvline(row["result"]["effective_rank"], color=PUBLISHED, linestyle=":", label="effective rank")
        axes.set_ylabel("accuracy")
        axes.legend()
        yield "redundancy", figure


def _fused(name: str) -> Callable[[Rows], Iterator[tuple[str, Figure]]]:
    """The accuracies of a dataset's strategies, and a t-SNE of each one's embeddings."""

    def figures(rows: Rows) -> Iterator[tuple[str, Figure]]:
        yield from _accuracies(f"fused-{name}")(rows)
        for row in rows:
            yield f"tsne-{row['id']}", _tsne(row)

    return figures


def _tsne(row: Mapping[str, Any]) -> Figure:
    """Train and test embeddings, coloured by their labels and by the labels of their clusters."""
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{row['id']} on {row['data']}: t-SNE")
    axes = figure.subplots(2, 2)
    for across, split in zip(axes, ("train", "test"), strict=True):
        view = row["result"]["view"][split]
        for one, colours, title in zip(across, ("label", "assigned"), ("true label", "label of cluster"), strict=True):
            dots = one.scatter(view["x"], view["y"], c=view[colours], s=4, cmap="tab10", vmin=0, vmax=9)
            one.set(title=f"{split}, by {title}", xticks=[], yticks=[])
    result = row["result"]
    names = result["prompts"] if result["strategy"] == "grouped" else result["classes_by_name"]
    colour = [Line2D([], [], marker="o", linestyle="", color=dots.to_rgba(label)) for label in range(len(names))]
    figure.legend(colour, names, loc="outside lower center", ncols=5, fontsize=8)
    return figure


_SECTIONS: Mapping[str, Callable[[Rows], Iterator[tuple[str, Figure]]]] = {
    "baseline": _decisions("baseline"),
    "zero-shot": _decisions("zero-shot"),
    "class-agnostic": _accuracies("class-agnostic"),
    "temperature": _temperature,
    "vocabulary": _vocabulary,
    "resolution": _accuracies("resolution"),
    "clustering": _clustering,
    "proposed": _proposed,
}


def _figure(title: str, x: str = "") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=title, xlabel=x)
    axes.grid(alpha=0.3)
    return figure, axes


def _bars(axes: Axes, rows: Rows, measure: str) -> None:
    places = np.arange(len(rows))
    axes.barh(places, [row["result"][measure] for row in rows], color=OURS, label="ours")
    chances = [row["result"].get("chance", np.nan) for row in rows]
    axes.plot(chances, places, "|", color="black", markersize=14, label="chance")
    _published(axes, rows, measure, places, along_y=True)
    axes.set_yticks(places, [f"{row['id']}\n{row['data']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    if "nearest_centroid_accuracy" in rows[0]["result"]:
        for other, marker in (("nearest_centroid_accuracy", "x"), ("zero_shot_accuracy", "+")):
            label = other.removesuffix("_accuracy").replace("_", " ")
            axes.plot([row["result"][other] for row in rows], places, marker, color=SECOND, label=label)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _published(axes: Axes, rows: Rows, measure: str, places: Sequence[float] | Any, along_y: bool = False) -> None:
    known = [(place, row["published"][measure]) for place, row in zip(places, rows, strict=True) if row["published"]]
    if known:
        at, values = zip(*known, strict=True)
        label = "published" if any(row["comparable"] for row in rows) else "published (reference)"
        axes.plot(*((values, at) if along_y else (at, values)), "D", color=PUBLISHED, label=label)


def _entropy_axis(axes: Axes, places: Sequence[float], rows: Rows) -> None:
    second = axes.twinx()
    second.plot(places, [row["result"]["mean_entropy"] for row in rows], "^-", color=SECOND, label="entropy")
    second.set_ylabel("mean entropy (nats)", color=SECOND)
    handles, labels = (a + b for a, b in zip(*(x.get_legend_handles_labels() for x in (axes, second)), strict=True))
    axes.legend(handles, labels, fontsize=7)


def _confusion(row: Mapping[str, Any]) -> Figure:
    figure, axes = _figure(f"{row['id']} on {row['data']}", "predicted")
    counts = np.array(row["result"]["confusion"])
    image = axes.imshow(counts / counts.sum(axis=1, keepdims=True).clip(min=1), cmap="Blues", vmin=0, vmax=1)
    axes.grid(visible=False)
    names = [str(label.get("name", label["label"])) for label in row["result"]["per_class"]]
    size = 8 if len(names) <= 20 else 2
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_ylabel("true")
    figure.colorbar(image, label="share of the true class")
    return figure


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    files = [folder / f"{name}.png", folder / f"{name}.svg"]
    # Without a date, and with the ids of SVG elements made from a fixed salt: the same results draw the same bytes.
    with mpl.rc_context({"svg.hashsalt": "clipmill"}):
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else {}
            with atomic_file(file) as temporary:
                figure.savefig(temporary, format=file.suffix[1:], dpi=150, metadata=metadata)
    return files
