"""The W&B dashboard as code: the same panels for everyone in a team, saved by one command.

Panels name only what `soups.tracking`, `soups.fitting.tracking` and `soups.soup_making.tracking` log; a test reads runs back and compares.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from soups.errors import ConfigError, install

# What a sweep of the default search space varies, as columns of the parallel coordinates; "log": a logarithmic axis.
_SETTINGS = (
    ("optimizer.lr", "learning rate", True),
    ("optimizer.weight_decay", "weight decay", True),
    ("task.label_smoothing", "label smoothing", False),
    ("augment.magnitude", "augmentation", False),
    ("trainer.max_epochs", "epochs", False),
)


def sections() -> dict[str, list[Any]]:
    """Return the panels by section.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    reports = _library("reports.v2")
    summary, config = reports.SummaryMetric, reports.Config
    column = reports.ParallelCoordinatesPlotColumn
    coordinates = [column(metric=config(key), display_name=name, log=log) for key, name, log in _SETTINGS]
    coordinates.append(column(metric=summary("heldout/accuracy"), display_name="held-out accuracy"))
    return {
        "Soups": [
            reports.BarPlot(title="Test accuracy", metrics=["test/accuracy"]),
            reports.BarPlot(title="Mean OOD accuracy", metrics=["ood/accuracy"]),
            reports.BarPlot(title="Gain over the best single model", metrics=["gain/test", "gain/ood"]),
            reports.ScatterPlot(
                title="In distribution against OOD", x=summary("test/accuracy"), y=summary("ood/accuracy")
            ),
            reports.LinePlot(
                title="Search: held-out score of the soup", x="search/step", y=["search/soup_score", "search/to_reach"]
            ),
            reports.MediaBrowser(title="Figures", media_keys=["figures/scatter", "figures/greedy_path"]),
            reports.WeavePanelSummaryTable(table_name="tables/results"),
            reports.MediaBrowser(title="Report", media_keys=["report"]),
        ],
        "Ingredients": [
            reports.LinePlot(title="Held-out accuracy", x="epoch", y=["heldout/accuracy"]),
            reports.LinePlot(title="Held-out loss", x="epoch", y=["heldout/loss"]),
            reports.LinePlot(title="Training loss", x="epoch", y=["train/loss"]),
            reports.ParallelCoordinatesPlot(title="Settings and held-out accuracy", columns=coordinates),
            reports.ScatterPlot(
                title="Learning rate", x=config("optimizer.lr"), y=summary("heldout/accuracy"), log_x=True
            ),
            reports.ParameterImportancePlot(with_respect_to="heldout/accuracy"),
            reports.WeavePanelSummaryTable(table_name="tables/ingredients"),
            reports.RunComparer(diff_only="split"),
        ],
        "Cost": [
            reports.BarPlot(title="Time of a fit, s", metrics=["seconds/fit"]),
            reports.BarPlot(
                title="Time of search and evaluation, s", metrics=["seconds/search", "seconds/evaluation"]
            ),
        ],
    }  # fmt: skip


def workspace(project: str, entity: str, name: str = "Soups") -> Any:
    """Return a workspace with all panels; `.save()` stores it in W&B and gives its `url`.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    workspaces = _library("workspaces")
    made = [
        workspaces.Section(name=title, panels=panels, is_open=title != "Cost") for title, panels in sections().items()
    ]
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=made)


def as_json(made: Any) -> dict[str, Any]:
    """Return a workspace as W&B keeps it, without logging in or sending anything."""
    # The library has no public way to look at a workspace without saving it.
    return json.loads(made._to_model().model_dump_json(by_alias=True))  # pyright: ignore[reportPrivateUsage]


def report(project: str, entity: str, title: str = "Soups") -> Any:
    """Return a W&B report with the same panels under headings, for writing text between them; `.save()` stores a draft.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    reports = _library("reports.v2")
    jobs = {"Soups": ["soup"], "Ingredients": ["ingredient"], "Cost": ["soup", "ingredient"]}
    blocks: list[Any] = [
        reports.P("What was trained, what was averaged, and what came of it. Selection saw the held-out split alone.")
    ]
    for heading, panels in sections().items():
        wanted = ", ".join(repr(job) for job in jobs[heading])
        runs = reports.Runset(project=project, entity=entity, name=heading, filters=f"Metric('JobType') in [{wanted}]")
        blocks += [reports.H2(heading), reports.PanelGrid(runsets=[runs], panels=panels)]
    return reports.Report(project=project, entity=entity, title=title, blocks=blocks)


def metrics_of(panels: Sequence[Any]) -> set[str]:
    """Return the names of all that some panels draw: metrics of runs, tables, media; settings as `config:key`."""
    found: set[str] = set()
    for panel in panels:
        columns = [column.metric for column in getattr(panel, "columns", [])]
        axes = [getattr(panel, axis, None) for axis in ("x", "y", "with_respect_to", "table_name")]
        for value in [*columns, *axes, *getattr(panel, "metrics", []), *getattr(panel, "media_keys", [])]:
            for item in value if isinstance(value, list) else [value]:
                name = getattr(item, "name", item)
                if name:
                    found.add(f"config:{name}" if type(item).__name__ == "Config" else str(name))
    return found


def _library(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"wandb_workspaces.{module}")
    except ImportError as error:
        raise ConfigError(f"The dashboard needs wandb-workspaces: {install('dashboard')}.") from error
