"""What decides a fit: every setting changes the fingerprint or is declared layout, and nothing unknown is accepted."""

import copy
import functools
import json
from typing import Any

import pytest

from soups.errors import ConfigError
from soups.fitting import FitSpec, fingerprint, read_configuration
from soups.fitting.configuration import Configuration, Layout
from soups.fitting.schema import arguments_of
from soups.stores.files import fingerprint as hash_json
from tests.launch.conftest import compose_settings

BASE = ["callbacks=[ema]"]


@functools.cache
def base() -> dict[str, Any]:
    return compose_settings(BASE)


def leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict) and values:
        return {key: leaf for name, part in values.items() for key, leaf in leaves(part, f"{prefix}.{name}").items()}
    return {prefix.removeprefix("."): values}


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(values)
    section = values
    *path, leaf = key.split(".")
    for name in path:
        section = section[name]
    section[leaf] = value
    return values


def other(key: str, value: Any) -> Any:
    """Another value that the key may have."""
    known = {
        "optimizer.name": None, "optimizer.schedule": "constant", "start.optimizer.schedule": "constant",
        "start.optimizer.name": None, "trainer.gradient_clip_val": 1.0, "trainer.threads": 2,
        "trainer.deterministic": True, "tracking.mode": "online", "callbacks.ema._target_": "soups.callbacks.LAWA",
    }  # fmt: skip
    if key in known:
        return known[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.01
    return "other"


def part_of(configuration: Configuration) -> dict[str, Any]:
    return configuration.layout.model_dump(mode="json")


# The fit is named by the leaves of these; `soup` and `sweep` say which fits there are and what becomes of them.
NOT_OF_A_FIT = ("soup.", "sweep.")


def leaves_of_the_main_job() -> list[str]:
    return [key for key in leaves(base()) if not key.startswith(NOT_OF_A_FIT)]


@pytest.mark.parametrize("key", leaves_of_the_main_job())
def test_a_setting_decides_the_fit_or_is_declared_layout(key: str) -> None:
    settings = base()
    value = other(key, leaves(settings)[key])
    if key.endswith("optimizer.name"):  # sgd with the other settings of adamw
        value = "sgd"
    if key.endswith("_target_"):  # another function of the same arguments
        section = key.rpartition(".")[0]
        spec = read_configuration(settings).fit
        before = spec.callbacks["ema"] if "callbacks" in section else getattr(spec, section)
        after = {**before, "_target_": value}
        altered = spec.with_(**({"callbacks": {"ema": after}} if "callbacks" in section else {section: after}))
        assert fingerprint(altered) != fingerprint(spec)
        return
    one, two = read_configuration(settings), read_configuration(changed(settings, key, value))
    decides = fingerprint(one.fit) != fingerprint(two.fit)
    is_layout = part_of(one) != part_of(two)
    validation = key.startswith("trainer.check_val")  # with callbacks it is of both
    assert decides != is_layout or validation, f"{key} must be part of the fit or of the layout, and not of both"
    assert decides or is_layout


def test_what_is_declared_but_not_given_decides_too() -> None:
    """Optional fields that no configuration file mentions: the same law, from the types."""
    settings = base()
    one = read_configuration(settings)
    given = {
        "max_steps": 5, "min_epochs": 1, "min_steps": 1, "max_time": "00:01:00:00", "limit_train_batches": 2,
        "overfit_batches": 1, "gradient_clip_algorithm": "value", "sync_batchnorm": True, "fast_dev_run": True,
        "reload_dataloaders_every_n_epochs": 1, "limit_val_batches": 3, "val_check_interval": 5, "benchmark": True,
        "profiler": "simple", "detect_anomaly": True,
    }  # fmt: skip
    mentioned = set(settings["trainer"])
    from soups.fitting.configuration import Devices, Trainer

    assert set(given) | mentioned == set(Trainer.model_fields), "a new field of the trainer needs a value here"
    for name, value in given.items():
        two = read_configuration(changed(settings, f"trainer.{name}", value))
        assert (fingerprint(one.fit) == fingerprint(two.fit)) == (name in Devices.model_fields), name


def test_validation_decides_only_beside_callbacks() -> None:
    without = compose_settings([])
    one, two = (
        read_configuration(one).fit for one in (without, changed(without, "trainer.check_val_every_n_epoch", 1))
    )
    assert fingerprint(one) == fingerprint(two) and one.validation is None


def test_names_of_old_pools_stay() -> None:
    """Fingerprints as they were before there was a `FitSpec`: the same settings, the same hash."""
    settings = compose_settings([])
    expected = {
        "training_version": 1, "start": "S", "split": "D", "model": {"_target_": "soups.tasks.models.timm_model", "name": "tf_efficientnet_lite0"},
        "seed": 0, "task": {"label_smoothing": 0.0, "freeze_batchnorm": True, "channels_last": True},
        "optimizer": {"name": "adamw", "lr": 2e-4, "weight_decay": 0.01, "warmup": 0.1, "schedule": "cosine"},
        "augment": {"num_ops": 1, "magnitude": 6, "min_crop": 1.0, "flip": False}, "size": 56, "batch_size": 32,
        "trainer": {"max_epochs": 3, "precision": "32-true", "gradient_clip_val": None, "accumulate_grad_batches": 1},
        "callbacks": {}, "weights": "raw",
    }  # fmt: skip
    spec = read_configuration(settings).fit.on(split="D", base_model="S")
    assert spec.determinants() == expected and fingerprint(spec) == hash_json(expected)
    probe = {
        "training_version": 1, "split": "D", "probe": True, "seed": 0, "size": 56,
        "model": {"_target_": "soups.tasks.models.timm_model", "name": "tf_efficientnet_lite0", "pretrained": True},
    }  # fmt: skip
    assert fingerprint(spec.probe()) == hash_json(probe)
    shared = spec.shared_epochs("P").determinants()
    assert shared["start"] == "P" and shared["trainer"]["max_epochs"] == 5 and shared["optimizer"]["lr"] == 4e-4
    assert shared["seed"] == 0 and shared["augment"]["min_crop"] == 1.0 and shared["callbacks"] == {}


def test_a_description_goes_through_json_and_changes_by_section() -> None:
    spec = read_configuration(compose_settings([*BASE, "ingredient.weights=ema"])).fit
    assert FitSpec.read(json.loads(json.dumps(spec.plain()))) == spec
    altered = spec.with_(optimizer={"lr": 1e-3}, seed=4, callbacks={})
    assert (
        altered.optimizer.lr == 1e-3 and altered.optimizer.warmup == 0.1 and altered.seed == 4 and not altered.callbacks
    )
    with pytest.raises(ConfigError, match=r"optimizer\.lrr is no setting: did you mean 'lr'"):
        spec.with_(optimizer={"lrr": 1})
    with pytest.raises(ConfigError, match="sead is no setting: did you mean 'seed'"):
        spec.with_(sead=1)


def test_content_stands_for_sections_once_it_is_known() -> None:
    spec = read_configuration(compose_settings([])).fit
    moved = spec.with_(data={**spec.data, "train": 10})
    assert fingerprint(spec) != fingerprint(moved)
    assert fingerprint(spec.on(split="D")) == fingerprint(moved.on(split="D"))
    random = spec.with_(model={**spec.model, "pretrained": False})
    assert fingerprint(spec.on(split="D")) != fingerprint(random.on(split="D"))
    assert fingerprint(spec.on(split="D", base_model="B")) == fingerprint(random.on(split="D", base_model="B"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+ingredient.weigts=ema", "ingredient.weigts is no setting: did you mean 'weights'"),
        ("+start.epoch=9", "start.epoch is no setting: did you mean 'epochs'"),
        ("+start.optimizer.lrr=9", "start.optimizer.lrr is no setting: did you mean 'lr'"),
        ("+pool.pth=x", "pool.pth is no setting: did you mean 'path'"),
        ("+pool.state=x", "pool.state is for checkpoints made elsewhere"),
        ("+loader.prefetch=4", "loader.prefetch is no setting"),
        ("+task.label_smooting=0.1", "task.label_smooting is no setting: did you mean 'label_smoothing'"),
        ("+trainer.max_epoch=3", "trainer.max_epoch is no setting: did you mean 'max_epochs'"),
        ("+tracking.entty=me", "tracking.entty is no setting: did you mean 'entity'"),
        ("+sweep.sise=3", "sweep.sise is no setting: did you mean 'size'"),
        ("+traner.x=3", "traner is no setting: did you mean 'trainer'"),
        ("+data.trian=3", "data.trian is no setting of soups.tasks.digits.digits: did you mean 'train'"),
        ("+callbacks.ema.half_lif=3%", "callbacks.ema.half_lif is no setting of soups.callbacks.EMA"),
        ("+callbacks.mine._target_=soups.callbacks.EMMA", "cannot be imported"),
        ("+optimizer.momentum=0.5", "optimizer.momentum would do nothing with optimizer.name=adamw"),
        ("optimizer.lr=-1", "optimizer.lr=-1 must be a positive number"),
        ("optimizer.lr=nan", "optimizer.lr=nan must be a positive number"),
        ("optimizer.name=adam", "optimizer.name=adam must be adamw or sgd"),
        ("trainer.devices=[a]", "trainer.devices="),
        ("loader.batch_size=0", "loader.batch_size=0 must be a positive whole number"),
        ("task.label_smoothing=1", r"task.label_smoothing=1 must be a number in \[0, 1\)"),
    ],
)
def test_mistakes_are_one_sentence(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_configuration(compose_settings([*BASE, override]))


def test_a_folder_of_checkpoints_is_checked_too() -> None:
    folder = ["pool=folder", "pool.path=x"]
    assert read_configuration(compose_settings([*folder, "+soup=greedy", "pool.prefix=model."])).layout.pool.prefix
    with pytest.raises(ConfigError, match="never added to"):
        read_configuration(compose_settings(folder))
    with pytest.raises(ConfigError, match=r"pool\.stat is no setting: did you mean 'state'"):
        read_configuration(compose_settings([*folder, "+soup=greedy", "+pool.stat=x"]))


def test_the_layout_has_no_field_of_a_fit() -> None:
    fit = set(FitSpec.model_fields) - {"loader", "validation"}
    assert not fit & set(Layout.model_fields)


def test_arguments_behind_typed_options_are_known() -> None:
    from soups.callbacks import EMA

    known = arguments_of(EMA)
    assert known is not None and {"half_life", "validate", "every"} <= set(known)
    assert arguments_of(dict) is None
