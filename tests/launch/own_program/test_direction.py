"""The metric's direction comes from whatever in the program watches it, in either direction, and is never guessed."""

from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from soups.errors import ConfigError
from soups.launch.own_program.direction import choose_metric
from soups.launch.own_program.evaluation import Evaluation
from tests.launch.own_program.conftest import fit_of

# Names whose direction people know, and no program should rely on.
NAMES = [
    "val/rmse",
    "val_mae",
    "wer",
    "val/fid",
    "nll",
    "val/ece",
    "crps",
    "val/acc",
    "auroc",
    "val/loss",
    "smape",
    "bleu",
]
MODES = ["min", "max"]


def choose(
    fit, config: dict[str, Any] | None = None, named: str | None = None, mode: str | None = None, **metrics: float
):
    made = OmegaConf.create(config or {})
    assert isinstance(made, DictConfig)
    return choose_metric(named, mode, metrics or {"val/acc": 0.5}, fit, made)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_says_it(name: str, mode: str, tmp_path) -> None:
    fit = fit_of(
        callbacks=lambda pl: [pl.callbacks.ModelCheckpoint(tmp_path, monitor=name, mode=mode)],
        enable_checkpointing=True,
    )
    assert choose(fit, **{name: 1.0}) == (name, mode, [])
    assert choose(fit, named=name, **{name: 1.0}) == (name, mode, []), (
        "also when the metric is named on the command line"
    )


@pytest.mark.parametrize("mode", MODES)
def test_early_stopping_of_either_package_says_it(package: str, mode: str) -> None:
    fit = fit_of(package, callbacks=lambda pl: [pl.callbacks.EarlyStopping("val/acc", mode=mode)])
    assert choose(fit) == ("val/acc", mode, [])


@pytest.mark.parametrize("mode", MODES)
def test_any_callback_with_a_monitor_says_it(mode: str) -> None:
    def callbacks(pl: Any) -> list[Any]:
        class KeepBest(pl.Callback):
            monitor = "val/acc"

        KeepBest.mode = mode
        return [KeepBest()]

    assert choose(fit_of(callbacks=callbacks)) == ("val/acc", mode, [])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["dict", "flat", "lists"])
def test_a_scheduler_says_it(mode: str, form: str) -> None:
    def optimizers(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.trainer.model.parameters(), 0.1)  # wants an attached trainer
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode)
        if form == "flat":
            return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "val/acc"}
        if form == "lists":
            return [optimizer], [{"scheduler": plateau, "monitor": "val/acc"}]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/acc"}}

    fit = fit_of(optimizers=optimizers)
    Evaluation(fit).validate()
    assert choose(fit, named="val/acc") == ("val/acc", mode, [])


@pytest.mark.parametrize(("direction", "mode"), [("maximize", "max"), ("minimize", "min"), ("MINIMIZE", "min")])
def test_the_objective_of_a_search_says_it(direction: str, mode: str) -> None:
    config = {"optimized_metric": "val/acc", "hydra": {"sweeper": {"direction": direction}}}
    assert choose(fit_of(), config) == ("val/acc", mode, [])
    with pytest.raises(ConfigError, match="Nothing in the program says"):
        choose(fit_of(), config, named="val/f1", **{"val/f1": 1.0, "val/acc": 1.0})


@pytest.mark.parametrize("mode", MODES)
def test_the_configuration_says_it_where_the_trainer_does_not(mode: str) -> None:
    config = {"callbacks": {"best": {"monitor": "${metric}", "mode": mode}}, "metric": "val/acc"}
    assert choose(fit_of(), config, named="val/acc") == ("val/acc", mode, [])
    nested = {"model": {"lr_scheduler": {"monitor": "val/acc", "scheduler": {"mode": mode}}}}
    assert choose(fit_of(), nested, named="val/acc") == ("val/acc", mode, [])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "other",
    [
        {"pooling": {"mode": "max"}},
        {"pooling": {"mode": "min"}},
        {"early_stopping": {"monitor": "val/loss", "mode": "min"}},
        {"scheduler": {"monitor": "val/loss", "mode": "min"}},
        {"tracking": {"mode": "max"}, "data": {"mode": "min"}},
    ],
)
def test_a_mode_of_something_else_says_nothing(other: dict[str, Any], mode: str) -> None:
    both = {"val/loss": 1.0, "val/acc": 0.5}
    with pytest.raises(ConfigError, match="Nothing in the program says"):
        choose(fit_of(), {"monitor": "val/acc", **other}, named="val/acc", **both)
    with pytest.raises(ConfigError, match="Nothing in the program says"):
        choose(fit_of(), {"model": {"monitor": "val/acc", **other}}, named="val/acc", **both)
    watched = {"monitor": "val/acc", **other, "plateau": {"_target_": "torch.optim.lr_scheduler.X", "mode": mode}}
    assert choose(fit_of(), {"model": watched}, named="val/acc", **both) == ("val/acc", mode, [])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_guessed(name: str) -> None:
    with pytest.raises(ConfigError, match=r"Nothing in the program says.*\+\+ingredient\.mode=min"):
        choose(fit_of(), named=name, **{name: 1.0})
    for mode in MODES:
        assert choose(fit_of(), named=name, mode=mode, **{name: 1.0}) == (name, mode, [])


def test_contradictions_are_told() -> None:
    fit = fit_of(callbacks=lambda pl: [pl.callbacks.EarlyStopping("val/acc", mode=mode) for mode in MODES])
    with pytest.raises(ConfigError, match="contradicts itself about val/acc"):
        choose(fit)
    one = fit_of(callbacks=lambda pl: [pl.callbacks.EarlyStopping("val/acc", mode="max")])
    _, mode, told = choose(one, mode="min")
    assert mode == "min" and "EarlyStopping has mode=max" in told[0]


def test_a_metric_that_nothing_names_or_logs() -> None:
    with pytest.raises(ConfigError, match=r"Validation logs val/loss, val/f1.*\+\+ingredient\.monitor"):
        choose(fit_of(), **{"val/loss": 1.0, "val/f1": 0.5})
    with pytest.raises(ConfigError, match="does not log 'val/acc'"):
        choose(fit_of(), named="val/acc", **{"val/loss": 1.0})
