"""A program's own loops, in a Trainer like its own, for both packages; and the digest of the data that pass by."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from soups.launch.own_program.evaluation import Evaluation
from soups.launch.own_program.interception import Fit
from soups.launch.own_program.module_weights import extra_state, load_weights, weights_of
from soups.launch.own_program.validation_data import Observer, ValidationData, data_section
from tests.launch.own_program.conftest import fit_of


def test_any_weights_are_validated(package: str) -> None:
    fit = fit_of(package)
    evaluation = Evaluation(fit)
    assert evaluation.validate() == {"val/acc": 0.25}
    assert evaluation.validate({"weight": torch.tensor([0.75])}) == {"val/acc": 0.75}
    assert evaluation.data is not None and evaluation.data.samples == [12] and len(evaluation.data.batches[0]) == 3


def test_the_trainer_has_the_settings_of_the_programs_own(package: str, tmp_path) -> None:
    seen: list[Any] = []

    def log(module: Any, value: float) -> None:
        trainer = module.trainer
        module.logger.log_metrics({"x": 1.0})
        module.logger.experiment[0].add_anything("x", [1])
        module.logger.log_hyperparams({"a": 1})
        seen.append((trainer, torch.is_inference_mode_enabled(), type(module.logger).__name__, module.logger.name))
        module.log("val/acc", value)

    def callbacks(pl: Any) -> list[Any]:
        return [
            pl.callbacks.ModelCheckpoint(tmp_path / "kept", monitor="val/acc"),
            pl.callbacks.EarlyStopping("val/acc", mode="max"),
        ]

    import importlib

    logger = importlib.import_module(package).loggers.CSVLogger(tmp_path / "csv", name="mine")
    fit = fit_of(
        package, callbacks, log=log, logger=logger, enable_checkpointing=True, inference_mode=False, limit_val_batches=2,
        max_epochs=7,
    )  # fmt: skip
    Evaluation(fit).validate()
    trainer, inference, kind, name = seen[0]
    assert len(seen) == 2 and not inference and (kind, name) == ("CSVLogger", "mine")
    assert trainer is not fit.trainer and type(trainer) is type(fit.trainer) and trainer.max_epochs == 7
    assert trainer.checkpoint_callback is not fit.trainer.checkpoint_callback, "a copy: the fit's stays as it is"
    assert trainer.checkpoint_callback.monitor == "val/acc" and len(trainer.callbacks) == 1, (
        "nobody stops or swaps weights"
    )
    assert not (tmp_path / "csv").exists() and not (tmp_path / "kept").exists(), "nothing is written"
    fit.module.logger  # noqa: B018  # and the fit goes on with its own
    logger.log_metrics({"x": 1.0})
    logger.save()
    assert (tmp_path / "csv").exists()


@pytest.mark.parametrize("inference", [True, False])
def test_inference_mode_is_theirs(inference: bool) -> None:
    seen: list[bool] = []
    Evaluation(
        fit_of(log=lambda module, value: seen.append(torch.is_inference_mode_enabled()), inference_mode=inference)
    ).validate()
    assert seen == [inference] * 3


def test_a_trainer_class_of_their_own_keeps_its_attributes() -> None:
    import lightning.pytorch as pl

    class Mine(pl.Trainer):
        def __init__(self, schedule: str, **options: Any) -> None:
            super().__init__(**options)
            self.schedule = schedule

    fit = fit_of()
    plain = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    own = Fit(Mine("steep", **plain), fit.module, fit.arguments, lambda: None)
    made = Evaluation(own).trainer
    assert type(made) is Mine and made.schedule == "steep"


class WithState(torch.nn.Module):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


@pytest.mark.parametrize("state", [{"a": 1}, b"bytes", torch.zeros(3, dtype=torch.uint8)])
def test_extra_state_is_no_weight(state: Any) -> None:
    module = WithState(state)
    weights = weights_of(module)
    assert set(weights) == {"layer.weight", "layer.bias"} and extra_state(module) == ["_extra_state"]
    load_weights(module, {name: torch.ones_like(tensor) for name, tensor in weights.items()})
    assert module.layer.weight.eq(1).all() and module.state is state
    with pytest.raises(RuntimeError, match=r"missing: layer\.bias; unexpected: more"):
        load_weights(module, {"layer.weight": weights["layer.weight"], "more": weights["layer.bias"]})


def observed(data: torch.Tensor, batch: int, section: str = "s", shuffle: bool = False) -> ValidationData:
    loader = DataLoader(TensorDataset(data), batch, shuffle=shuffle)
    observer = Observer()
    for one in loader:
        observer.see(one, 0)
    return observer.found(loader, section)


def test_data_are_told_apart_by_content_and_length() -> None:
    data = torch.arange(24.0).reshape(12, 2)
    base = observed(data, 4)
    assert base.differs(observed(data.clone(), 4)) == "" and base.digest == observed(data.clone(), 4).digest
    changed = data.clone()
    changed[11, 1] += 1
    assert base.differs(observed(changed, 4)) == "their contents differ"
    assert base.differs(observed(data[:8], 4)) == "8 samples there, 12 here"
    assert base.differs(observed(data.flip(0), 4)) == "their contents differ"
    assert base.differs(observed(data, 4, "another section")) == "", "equal batches are equal data"
    # Another batch size cuts the same data otherwise: the section decides.
    assert base.differs(observed(data, 6)) == "" and "section" in base.differs(observed(data, 6, "t"))
    # Loaders that shuffle are compared by length and section.
    assert base.differs(observed(data.flip(0), 4, shuffle=True)) == ""
    assert observed(data, 4, shuffle=True).batches == [[]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_a_batch_of_any_kind_is_seen(dtype: torch.dtype) -> None:
    class Graph:
        def __init__(self, value: float) -> None:
            self.x, self.names = torch.tensor([value, 1.0]).to(dtype), ["a"]

    def found(value: float) -> ValidationData:
        observer = Observer()
        observer.see({"graph": Graph(value), "rest": [torch.zeros(2), None, "text"]}, 0)
        return observer.found(None, "")

    assert found(0.0).digest == found(0.0).digest
    assert found(0.0).differs(found(1.0)) == "their contents differ"


def test_the_data_section_leaves_out_what_varies() -> None:
    config = {"data": {"fold": 0, "batch_size": 8}, "datamodule": {"root": "x"}, "model": {"lr": 1}}
    other = {**config, "data": {"fold": 0, "batch_size": 16}, "model": {"lr": 2}}
    assert data_section(config, ()) != data_section(other, ()) and data_section({"model": {}}, ()) == ""
    assert data_section(config, ("data.batch_size",)) == data_section(other, ("data.batch_size",))
    assert data_section(config, ()) != data_section({**config, "datamodule": {"root": "y"}}, ())
