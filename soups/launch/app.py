"""What `train.py` runs: one fine-tune; and what the sweeper runs after its fine-tunes: the soup."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from soups.errors import ConfigError, SoupError
from soups.fitting.configuration import Configuration
from soups.fitting.environment import is_first_process
from soups.fitting.ingredient import fine_tune
from soups.fitting.quiet import quiet
from soups.fitting.run import Run, run_of
from soups.launch.failures import Failed, tell_failures
from soups.launch.hydra_errors import check_hydra
from soups.launch.ignored import refuse_ignored
from soups.launch.settings import UserError, configuration_of, resolve
from soups.launch.terminal import show_report
from soups.reporting import SoupReport
from soups.soup_making.soup import make_soup
from soups.soup_making.tracking import track_soup


def run(config: DictConfig) -> float:
    """Fine-tune one ingredient; return its held-out accuracy in [0, 1], which other sweepers can maximise.

    With `+node=…` the run is one node of a protocol's plan instead; it returns 0.

    Raises:
        UserError: for every mistake that the user can put right.
    """
    quiet()
    alone = HydraConfig.get().mode == RunMode.RUN
    try:
        if config.get("node") is not None:
            from soups.launch.protocol import run_node

            settings = resolve(config)
            run_node(settings, str(settings["node"]))
            return 0.0
        run = run_of(_checked(config))
        before = set(run.pool.names())
        record = fine_tune(run, show_progress=alone)
    except SoupError as error:
        raise UserError(f"\n{error}") from error
    if alone and is_first_process():
        verb = "was in the pool already" if record.fingerprint in before else "is finished"
        Console().print(
            f"Ingredient [bold]{record.short}[/] {verb}: held-out accuracy {record.heldout():.2%}, in "
            f"{escape(run.pool.url)}. A soup of the ingredients in the pool: python train.py +soup=greedy sweep.size=0",
            highlight=False,
        )
    return record.heldout()


def _checked(config: DictConfig) -> Configuration:
    """Return the configuration of one fine-tune: every name known, no override ignored.

    Raises:
        ConfigError: naming the setting.
    """
    hydra = HydraConfig.get()
    check_hydra(cast(DictConfig, hydra))
    configuration = configuration_of(config)
    if configuration.soup is not None and hydra.runtime.choices.get("hydra/sweeper") != "soup":
        raise ConfigError("The section soup would be ignored: a recipe is chosen as a group, +soup=greedy.")
    run = run_of(configuration)
    refuse_ignored(list(hydra.overrides.task), configuration, lambda: run.splits)
    return configuration


def finish(run: Run, failed: Mapping[str, Failed]) -> int:
    """Make the soup of a finished sweep, show and track it; return the exit code (3 when ingredients failed).

    Raises:
        SoupError: no ingredients, or ingredients that do not fit.
    """
    console = Console()
    before = {path.parent for path in Path(run.layout.paths.output).glob("soups/*/report.json")}
    report, folder = make_soup(run)
    if folder not in before:
        track_soup(run, report, folder)
    show_report(report, folder, _how_to_load(run, report, folder), console)
    return tell_failures(console, failed)


def _how_to_load(run: Run, report: SoupReport, folder: Path) -> str:
    model, path = run.asked.model, folder / "soup.safetensors"
    if str(model["_target_"]).endswith("timm_model"):
        classes = len(report.lineage["classes"])
        return f"timm.create_model({model['name']!r}, num_classes={classes}, checkpoint_path='{path}')"
    return f"model.load_state_dict(safetensors.torch.load_file('{path}'))"
