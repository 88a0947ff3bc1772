"""Figures of a soup, drawn from its report alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from soups.evaluation import ood_mean
from soups.reporting.columns import columns_of, metric_on_test
from soups.reporting.report import Row
from soups.reporting.soup_report import SoupReport, soup_name
from soups.stores.files import replacing

# Okabe–Ito colours: told apart by most colour-blind readers, and in print by their markers.
_LOOK: dict[str, tuple[str, str, int]] = {
    "linear probe": ("#7f7f7f", "s", 70),
    "shared start": ("#7f7f7f", "o", 70),
    "best single": ("#0072b2", "D", 80),
    "uniform soup": ("#009e73", "^", 110),
    "greedy soup": ("#d55e00", "*", 240),
    "logit ensemble": ("#cc79a7", "P", 110),
}


def draw_all(report: SoupReport, folder: Path) -> dict[str, Path]:
    """Draw every figure the report has data for; return their files by name."""
    drawn: dict[str, Path] = {}
    makers: dict[str, Callable[[SoupReport, Any], bool]] = {
        "scatter": _scatter,
        "greedy_path": _greedy_path,
        "path": _path,
    }
    for name, maker in makers.items():
        # The object interface: a figure of our own, whatever backend or state the user's pyplot is in.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        if maker(report, figure):
            path = folder / f"{name}.png"
            with replacing(path) as temporary:
                figure.savefig(temporary, dpi=150, format="png")
            drawn[name] = path
    return drawn


def _scatter(report: SoupReport, figure: Any) -> bool:
    """Held-out against mean OOD accuracy of ingredients and soups (arXiv:2203.05482, figure 1).

    Without OOD splits the test split takes their place; models without a test metric are left out.
    """
    has_ood = report.classifies and len(report.splits) > 2
    if not report.classifies and metric_on_test(report) is None:
        return False
    columns = columns_of(report)
    across, up = columns[0], columns[-1] if has_ood else columns[1]
    shown = [row for row in report.rows if across.value(row) is not None and up.value(row) is not None]
    if not shown:
        return False
    axes = figure.add_subplot()

    def place(row: Row) -> tuple[float, float]:
        return across.value(row) or 0.0, up.value(row) or 0.0

    ingredients = [row for row in shown if row.kind == "ingredient"]
    for chosen, label in ((True, "ingredient in the soup"), (False, "ingredient left out")):
        points = [place(row) for row in ingredients if report.kept(row.name) == chosen]
        if points:
            face = "#56b4e9" if chosen else "none"
            axes.scatter(*zip(*points, strict=True), s=46, facecolors=face, edgecolors="#0072b2", label=label, zorder=2)
    looks = {**_LOOK, **({} if report.soup in _LOOK else {report.soup: ("#e69f00", "v", 130)})}
    for name, (colour, marker, size) in looks.items():
        row = next((row for row in shown if row.name == name), None)
        if row is None:
            continue
        hollow = name == "best single"
        style = {"facecolors": "none", "edgecolors": colour, "linewidths": 1.8} if hollow else {"color": colour}
        axes.scatter(*place(row), marker=marker, s=size, label=name, zorder=3, **style)
    start = next((row for row in shown if row.kind == "start"), None)
    if start is not None and ingredients:
        # The start is often so far below that it would squeeze everything else into a corner.
        lowest = min(place(row)[0] for row in ingredients)
        highest = max(place(row)[0] for row in shown)
        if lowest - place(start)[0] > 2 * (highest - lowest):
            points = [place(row) for row in shown if row.kind != "start"]
            _fit(axes, points)
            x, y = place(start)
            axes.text(
                0.02, 0.02, f"{start.name} outside, at ({x:.1f}, {y:.1f})", transform=axes.transAxes, fontsize=8,
                color="#555555",
            )  # fmt: skip
    labels = ("held-out accuracy, %", "mean accuracy over OOD splits, %" if has_ood else "test accuracy, %")
    axes.set_xlabel(labels[0] if report.classifies else across.heading)
    axes.set_ylabel(labels[1] if report.classifies else up.heading)
    axes.set_title(f"{len(report.ingredients)} ingredients and their soups")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True


def _fit(axes: Any, points: list[tuple[float, float]]) -> None:
    for values, limit in zip(zip(*points, strict=True), (axes.set_xlim, axes.set_ylim), strict=True):
        margin = 0.1 * (max(values) - min(values)) + 0.05
        limit(min(values) - margin, max(values) + margin)


def _greedy_path(report: SoupReport, figure: Any) -> bool:
    """Held-out score of the soup as candidates are tried, best first."""
    if not report.steps:
        return False
    axes = figure.add_subplot()
    scale = 100 if report.classifies and report.metric == "accuracy" else 1
    numbers = list(range(1, len(report.steps) + 1))
    best: list[float] = []
    for step in report.steps:
        best.append(step.soup_score if step.kept else best[-1])
    axes.plot(numbers, [scale * value for value in best], drawstyle="steps-post", color="#d55e00", label="soup")
    axes.plot(
        numbers, [scale * step.own_score for step in report.steps], "o", mfc="none", color="#0072b2", ms=6,
        label="candidate alone",
    )  # fmt: skip
    for kept, marker, label in ((True, "^", "soup with it: kept"), (False, "x", "soup with it: rejected")):
        chosen = [
            (n, scale * step.soup_score) for n, step in zip(numbers, report.steps, strict=True) if step.kept == kept
        ]
        if chosen:
            axes.plot(*zip(*chosen, strict=True), marker, color="#d55e00" if kept else "#555555", ms=8, label=label)
    axes.set_xticks(
        numbers,
        [f"−{step.name}" if step.action == "remove" else step.name for step in report.steps],
        rotation=45,
        ha="right",
        fontsize=8,
    )
    axes.set_xlabel("steps of the search in their order")
    label = f"held-out {report.metric}" if report.classifies else report.metric
    axes.set_ylabel(label + (", %" if report.metric == "accuracy" else ""))
    axes.set_title(
        f"{soup_name(report.search, first=True)}: {sum(s.kept for s in report.steps)} of {len(report.steps)} kept"
    )
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True


def _path(report: SoupReport, figure: Any) -> bool:
    """Accuracy along a searched path, in and out of distribution (arXiv:2109.01903, figure 1, in one more dimension)."""
    if len(report.path) < 2:
        return False
    axes = figure.add_subplot()
    x = [point.position for point in report.path]
    curves = {
        "held-out": [point.accuracy["heldout"] for point in report.path],
        "test": [point.accuracy["test"] for point in report.path],
    }
    if len(report.splits) > 2:
        curves["mean over OOD splits"] = [ood_mean(point.accuracy) for point in report.path]
    for (name, values), colour, marker in zip(curves.items(), ("#0072b2", "#009e73", "#d55e00"), "o^s", strict=False):
        axes.plot(x, [100 * value for value in values], marker + "-", color=colour, label=name, ms=5)
    chosen = report.details.get("alpha", report.details.get("share"))
    if chosen is not None:
        axes.axvline(chosen, color="#555555", lw=1, ls="--", label="chosen")
    axes.set_xlabel(report.path_label)
    axes.set_ylabel("accuracy, %")
    axes.set_title(soup_name(report.recipe, first=True))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True
