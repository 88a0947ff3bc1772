"""What of somebody's configuration decides an ingredient: everything but our own keys, paths and loggers."""

import pytest
from omegaconf import OmegaConf

from soups.errors import ConfigError
from soups.launch.own_program.configuration import Program

CONFIG = {
    "model": {"lr": 0.1, "width": "${size}"},
    "size": 8,
    "seed": "${sweep.seed}",
    "trainer": {"max_epochs": 1, "devices": 2, "strategy": "ddp", "check_val_every_n_epoch": 1, "logger": False},
    "paths": {"output_dir": "${hydra:runtime.output_dir}", "data_dir": "/data", "log": "${now:%H}"},
    "data": {"root": "${paths.data_dir}/mnist", "num_workers": 4, "fold": 0},
    "callbacks": {"checkpoint": {"_target_": "x.ModelCheckpoint", "dirpath": "${paths.output_dir}/c", "monitor": "val/acc"}},
    "logger": {"wandb": {"_target_": "lightning.pytorch.loggers.wandb.WandbLogger", "tags": "${tags}"}},
    "more": {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "a"}},
    "extras": {"ignore_warnings": False},
    "tags": ["dev"],
    "pool": {"kernel": 3},
    "sweep": {"seed": 0, "size": 3},
    "loaded": "${oc.env:SOUPS_TEST_LR,1}",
}  # fmt: skip


def program(varied: tuple[str, ...] = (), given: tuple[str, ...] = (), **changes) -> Program:
    return Program.of(OmegaConf.merge(CONFIG, changes), "train", given, varied)  # type: ignore[arg-type]


def test_nothing_but_our_keys_paths_and_loggers_is_left_out() -> None:
    kept = program().spec.config
    assert set(kept) == {"model", "size", "seed", "trainer", "data", "callbacks", "extras", "tags", "pool", "loaded"}
    assert kept["trainer"] == {"max_epochs": 1, "devices": 2, "strategy": "ddp", "check_val_every_n_epoch": 1}
    assert kept["callbacks"] == {"checkpoint": {"_target_": "x.ModelCheckpoint", "monitor": "val/acc"}}
    assert kept["pool"] == {"kernel": 3}, "the program's own section"
    assert kept["model"] == {"lr": 0.1, "width": 8} and kept["seed"] == 0, "interpolations have their values"


@pytest.mark.parametrize(
    "change",
    [
        {"paths": {"output_dir": "elsewhere"}}, {"paths": {"data_dir": "/other"}}, {"soup": {"recipe": "greedy"}},
        {"pool": {"path": "s3://bucket/pool"}}, {"ingredient": {"monitor": "val/acc", "mode": "max"}},
        {"logger": {"wandb": {"project": "p"}}}, {"more": {"csv": {"name": "b"}}}, {"trainer": {"logger": True}},
        {"trainer": {"default_root_dir": "/tmp"}}, {"sweep": {"size": 9}},
    ],
)  # fmt: skip
def test_what_does_not_decide_the_weights(change: dict) -> None:
    assert program(**change).fingerprint == program().fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"lr": 0.2}}, {"size": 9}, {"trainer": {"max_epochs": 2}}, {"ingredient": {"weights": "ema"}},
        {"trainer": {"devices": 1}}, {"trainer": {"check_val_every_n_epoch": 2}}, {"extras": {"ignore_warnings": True}},
        {"tags": ["prod"]}, {"pool": {"kernel": 5}}, {"data": {"num_workers": 8}}, {"sweep": {"seed": 7}},
        {"ingredient": {"fit": 2}}, {"ingredient": {"start": "abc"}}, {"ingredient": {"data": "abc"}},
        {"callbacks": {"checkpoint": {"monitor": "val/loss"}}}, {"tracking": {"iou": 0.5}},
    ],
)  # fmt: skip
def test_what_decides_the_weights(change: dict) -> None:
    assert program(**change).fingerprint != program().fingerprint


def test_a_value_from_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = program().fingerprint
    monkeypatch.setenv("SOUPS_TEST_LR", "2")
    assert program().fingerprint != before


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("paths.data_dir", {"paths": {"data_dir": "/other"}}),
        ("logger.wandb.tags", {"logger": {"wandb": {"tags": ["b"]}}}),
        ("more.csv.name", {"more": {"csv": {"name": "b"}}}),
        ("trainer.logger", {"trainer": {"logger": True}}),
        ("data.num_workers", {"data": {"num_workers": 8}}),
        ("logger", {"logger": {"wandb": {"tags": ["b"]}}}),
    ],
)
def test_a_key_that_the_sweep_varies_always_counts(key: str, change: dict) -> None:
    ignore = {"ingredient": {"ignore": ["data.num_workers"]}}
    assert program(**change, **ignore).fingerprint == program(**ignore).fingerprint, "ignored otherwise"
    assert program((key,), **change, **ignore).fingerprint != program((key,), **ignore).fingerprint
    # A job gets the varied keys in its configuration, and comes to the same name.
    told = {"ingredient": {**ignore["ingredient"], "varied": [key]}}
    assert program(**change, **told).fingerprint == program((key,), **change, **ignore).fingerprint


def test_folders_and_addresses_of_the_pool() -> None:
    import os

    assert program().pool == f"{os.getcwd()}/pools/train"  # noqa: PTH109
    assert program(pool={"path": "s3://bucket/pool"}).pool == "s3://bucket/pool"
    assert program(pool={"path": "/abs"}).pool == "/abs"


@pytest.mark.parametrize(
    ("changes", "given", "varied", "message"),
    [
        ({"ingredient": {"monitr": "val/acc"}}, (), (), "ingredient.monitr is unknown: did you mean 'monitor'"),
        ({"ingredient": {"weigts": "ema"}}, ("ingredient.weigts",), (), "did you mean 'weights'"),
        ({"ingredient": {"colour": "red"}}, ("ingredient.colour",), (), "ingredient.colour is unknown"),
        ({"pool": {"pth": "x"}}, ("pool.pth",), (), "pool.pth is unknown: did you mean 'path'"),
        ({"ingredient": {"mode": "maximum"}}, (), (), "ingredient.mode=maximum"),
        ({"ingredient": {"fit": "first"}}, (), (), "ingredient.fit=first must be"),
        ({}, (), ("pool.path",), "pool.path cannot vary"),
        ({}, (), ("sweep.size",), "sweep.size cannot vary"),
        ({}, (), ("ingredient.monitor",), "ingredient.monitor cannot vary"),
    ],
)
def test_mistakes_are_named(changes: dict, given: tuple, varied: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        program(varied, given, **changes)


def test_a_section_of_theirs_keeps_its_keys() -> None:
    assert program(pool={"kernel": 5}).spec.config["pool"] == {"kernel": 5}
    assert program(ingredient={"flour": 1}).spec.config["ingredient"] == {"flour": 1}, "a program about recipes"


def test_overrides_hand_the_findings_to_a_job() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found = program(("model.lr",)).on("start", "data", "val/it's", "min")
    values = {one.key_or_group: one.value() for one in OverridesParser.create().parse_overrides(found.overrides())}
    assert values["ingredient.monitor"] == "val/it's" and values["ingredient.mode"] == "min"
    assert values["ingredient.varied"] == ["model.lr"] and values["pool.path"] == found.pool
