"""Which weights are validated, side by side, and that the raw ones always come back."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification import BinaryAccuracy

from soups.averaging import load_averaged
from soups.averaging.batchnorm import reestimate
from soups.callbacks import EMA, LAWA, SWA, Averages
from soups.errors import ConfigError


class Record(pl.Callback):
    """Keeps the metrics that a monitoring callback would see."""

    def __init__(self):
        self.rows = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_one_validation_logs_raw_and_every_average_side_by_side(tmp_path, toy):
    module, record = toy.Toy(metric=True), Record()
    both = Averages(ema=EMA(decay=0.9, validate="both"), lawa=LAWA(k=3, every="2st", validate="both"))
    values = []

    class Look(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            values.append({"": toy.snapshot(pl_module), "_ema": both.average("ema"), "_lawa": both.average("lawa")})

    toy.trainer(tmp_path, record, Look(), both).fit(module)
    assert len(record.rows) == 3
    for row, held in zip(record.rows, values, strict=True):
        for suffix, weights in held.items():
            for metric in ("val/loss", "val/metric"):
                assert row[f"{metric}{suffix}"] == pytest.approx(toy.evaluate(module, weights), rel=1e-5), (
                    metric,
                    suffix,
                    row,
                )
    assert len({row["val/loss"] for row in record.rows} | {row["val/loss_ema"] for row in record.rows}) == 6


def test_metrics_computed_by_hand_at_the_end_of_the_epoch(tmp_path, toy):
    class Hand(toy.Toy):
        def __init__(self):
            super().__init__()
            self.accuracy, self.best = BinaryAccuracy(), MaxMetric()
            self.losses = []

        def on_validation_epoch_start(self):
            self.losses = []

        def validation_step(self, batch, batch_idx):
            self.losses.append(self.loss(batch))
            self.accuracy.update(self(batch[0]).sigmoid().flatten(), (batch[1] > 0).int().flatten())

        def on_validation_epoch_end(self):
            self.log("val/hand", torch.stack(self.losses).mean())
            self.best.update(self.accuracy.compute())
            self.log("val/best", self.best.compute())
            self.log_dict({"val/accuracy": self.accuracy.compute()})
            self.accuracy.reset()

    plain, record_plain = Hand(), Record()
    toy.trainer(tmp_path, record_plain).fit(plain)
    module, record, ema = Hand(), Record(), EMA(decay=0.9, validate="both")
    toy.trainer(tmp_path, record, ema).fit(module)
    assert toy.same(toy.snapshot(module), toy.snapshot(plain))
    for row, alone in zip(record.rows, record_plain.rows, strict=True):
        assert {name: row[name] for name in alone} == alone, "raw metrics are those of a run without the callback"
    assert record.rows[-1]["val/hand_ema"] == pytest.approx(toy.evaluate(module, ema.average()), rel=1e-5)
    assert {"val/best_ema", "val/accuracy_ema"} <= record.rows[-1].keys()


def test_validating_averages_changes_nothing_in_training(tmp_path, toy):
    class Random(toy.Toy):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.net(self.drop(x))

        def validation_step(self, batch, batch_idx):
            self.log("val/noise", torch.rand(()))
            super().validation_step(batch, batch_idx)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(toy.data(), batch_size=4, shuffle=True)

    runs = []
    for callbacks in ([], [EMA(validate="both"), SWA(start="0st", validate="both", buffers="reestimate")]):
        pl.seed_everything(3, verbose=False)
        module = Random()
        toy.trainer(tmp_path, *callbacks, val_check_interval=2).fit(module)
        runs.append(toy.snapshot(module))
    assert toy.same(*runs)


@pytest.mark.parametrize("choice", ["average", "both"])
def test_validation_inside_an_epoch(tmp_path, toy, choice):
    module, record, ema = toy.Toy(), Record(), EMA(decay=0.9, validate=choice)
    toy.trainer(tmp_path, record, ema, val_check_interval=2, max_epochs=2).fit(module)
    assert len(record.rows) == 6
    toy.close(ema.average(), toy.ema_of(module.points, 0.9))
    key = "val/loss" if choice == "average" else "val/loss_ema"
    assert record.rows[-1][key] == pytest.approx(toy.evaluate(module, ema.average()), rel=1e-5)


def test_sanity_validation_runs_on_the_raw_weights(tmp_path, toy):
    seen = []

    class Look(toy.Toy):
        def validation_step(self, batch, batch_idx):
            seen.append((self.trainer.sanity_checking, toy.snapshot(self)))

    module = Look()
    first = toy.snapshot(module)
    toy.trainer(tmp_path, EMA(validate="average"), num_sanity_val_steps=2, max_epochs=1).fit(module)
    assert [sanity for sanity, _ in seen] == [True, True, False, False]
    assert toy.same(seen[0][1], first) and not torch.equal(seen[-1][1]["net.0.weight"], first["net.0.weight"])


def test_before_the_start_validation_is_raw(tmp_path, toy):
    module, record = toy.Toy(), Record()
    ema = EMA(decay=0.9, start="2ep", every="1ep", validate="average")
    toy.trainer(tmp_path, record, ema).fit(module)
    assert record.rows[0]["val/loss"] == pytest.approx(toy.evaluate(module, module.points[5]), rel=1e-5)
    assert record.rows[2]["val/loss"] == pytest.approx(toy.evaluate(module, ema.average()), rel=1e-5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("choice", ["average", "both"])
def test_exceptions_in_validation_bring_the_raw_weights_back(tmp_path, toy, error, choice):
    # the third epoch's validation of the average; the average's turn in the second epoch
    at = 5 if choice == "average" else 7

    calls = []  # not the module's: an attribute counts the raw weights' and the average's evaluations apart

    class Fails(toy.Toy):
        def validation_step(self, batch, batch_idx):
            calls.append(batch_idx)
            if len(calls) == at:
                raise error("stop")
            super().validation_step(batch, batch_idx)

    module, ema = Fails(), EMA(decay=0.5, validate=choice)
    save = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True, save_top_k=0, save_last=False)
    with pytest.raises((RuntimeError, SystemExit)):
        toy.trainer(tmp_path, save, ema).fit(module)
    assert toy.same(toy.snapshot(module), module.points[-1])
    assert len(calls) == at and not module.net[0].weight.is_inference()
    saved = list(tmp_path.glob("*.ckpt"))
    assert len(saved) == 1
    assert toy.same(load_averaged(saved[0], "raw"), module.points[-1])
    assert toy.same(load_averaged(saved[0], "ema"), ema.average())
    assert not torch.equal(load_averaged(saved[0])["net.0.weight"], module.points[-1]["net.0.weight"])


def test_early_stopping_can_watch_an_average_from_any_place_in_the_list(tmp_path, toy):
    stop = EarlyStopping("val/loss_ema", patience=0, mode="max", check_on_train_epoch_end=False)
    module = toy.Toy()
    toy.trainer(tmp_path, stop, EMA(decay=0.9, validate="both"), max_epochs=8).fit(module)
    assert stop.wait_count > 0 and len(module.points) < 48


def test_trainer_validate_says_which_weights(tmp_path, toy):
    module, ema = toy.Toy(), EMA(decay=0.9, test="average")
    trainer = toy.trainer(tmp_path, ema)
    trainer.fit(module)
    found = trainer.validate(module, verbose=False)[0]["val/loss"]
    assert found == pytest.approx(toy.evaluate(module, ema.average()), rel=1e-5)
    assert toy.same(toy.snapshot(module), module.points[-1])


def test_applied_and_apply(tmp_path, toy):
    module, ema = toy.Toy(), EMA(decay=0.9)
    toy.trainer(tmp_path, ema).fit(module)
    average = ema.average()

    def fail_inside():
        with ema.applied() as held:
            assert toy.same(toy.snapshot(held), average)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert toy.same(toy.snapshot(module), module.points[-1])
    ema.apply()
    assert toy.same(toy.snapshot(module), average)


def test_two_averages_cannot_both_be_validated_under_the_plain_names(tmp_path, toy):
    with pytest.raises(ConfigError, match="both ask for validate='average'"):
        toy.trainer(tmp_path, EMA(validate="average"), SWA(validate="average")).fit(toy.Toy())


def test_averages_before_a_fit_are_an_error():
    with pytest.raises(ConfigError, match=r"run trainer\.fit"):
        EMA().average()


def test_distance_is_logged(tmp_path, toy):
    module, ema = toy.Toy(), EMA(decay=0.9, log_distance=True)
    trainer = toy.trainer(tmp_path, ema)
    trainer.fit(module)
    average, raw = ema.average(), module.points[-1]
    wanted = sum(float((average[n] - raw[n]).square().sum()) for n, _ in module.named_parameters()) ** 0.5
    assert float(trainer.callback_metrics["distance/ema"]) == pytest.approx(wanted, rel=1e-5)


def test_loggers_get_the_curves_of_raw_weights_and_averages(tmp_path, toy):
    logger = pl.loggers.CSVLogger(tmp_path)
    trainer = toy.trainer(tmp_path, EMA(decay=0.9, validate="both", log_distance=True), logger=logger)
    trainer.fit(toy.Toy())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("val/loss", "val/loss_ema", "distance/ema"):
        assert [row["step"] for row in rows if row[name]] == ["5", "11", "17"], name


def test_wandb_gets_the_curves_of_raw_weights_and_averages(tmp_path, toy):
    wandb = pytest.importorskip("wandb")
    record = Record()
    logger = pl.loggers.WandbLogger(project="averages", save_dir=tmp_path, offline=True)
    callbacks = [EMA(decay=0.9, validate="both", log_distance=True), SWA(start="1ep", validate="both"), record]
    toy.trainer(tmp_path, *callbacks, logger=logger).fit(toy.Toy())
    wandb.finish()
    (run,) = tmp_path.glob("wandb/offline-run-*")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(run)]
    output = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    curves = {}
    for line in output.splitlines():
        entry = json.loads(line)
        if entry.get("type") == "history":
            for name, value in entry["history"]["item"].items():
                curves.setdefault(name, []).append(float(value))
    for name in ("val/loss", "val/loss_ema", "val/loss_swa"):
        assert curves[name] == pytest.approx([row[name] for row in record.rows], rel=1e-6), name
    # distances are logged when an epoch has ended, so the next validation is the first to see them
    assert len(curves["distance/ema"]) == 3
    assert curves["distance/ema"][:2] == pytest.approx([row["distance/ema"] for row in record.rows[1:]], rel=1e-6)


def test_several_loaders_keep_their_names(tmp_path, toy):
    class Several(toy.Toy):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

        def val_dataloader(self):
            return [super(Several, self).val_dataloader() for _ in range(2)]

    module, ema = Several(), EMA(decay=0.9, validate="both")
    trainer = toy.trainer(tmp_path, ema)
    trainer.fit(module)
    for number in range(2):
        found = float(trainer.callback_metrics[f"val/loss_ema/dataloader_idx_{number}"])
        assert found == pytest.approx(toy.evaluate(module, ema.average()), rel=1e-5)


@pytest.mark.slow
def test_workers_that_stay_alive_are_left_alone(tmp_path, toy):
    class Workers(toy.Toy):
        def loader(self, seed, batches):
            data = toy.data(seed, batches)
            return torch.utils.data.DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True)

        def train_dataloader(self):
            return self.loader(0, 6)

        def val_dataloader(self):
            return self.loader(1, 2)

    plain, module = toy.Toy(), Workers()
    toy.trainer(tmp_path, val_check_interval=3).fit(plain)
    swa = SWA(start="0st", every="2st", buffers="reestimate", validate="both", batches=2)
    trainer = toy.trainer(tmp_path, swa, val_check_interval=3)
    trainer.fit(module)
    assert toy.same(toy.snapshot(module), toy.snapshot(plain))
    assert float(trainer.callback_metrics["val/loss_swa"]) == pytest.approx(
        toy.evaluate(module, swa.average()), rel=1e-5
    )


# BatchNorm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [3, 100])
def test_reestimated_statistics_are_torchs(tmp_path, toy, batches):
    class Metric(toy.Toy):
        def __init__(self):
            super().__init__()
            self.train_metric = MeanMetric()

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.train_metric(loss)
            self.log("train/metric", self.train_metric, on_epoch=True, on_step=False)
            return loss

    runs = []
    for callbacks in ([], [SWA(start="1ep", buffers="reestimate", batches=batches, validate="both")]):
        module, record = Metric(), Record()
        trainer = toy.trainer(tmp_path, *callbacks, record)
        trainer.fit(module)
        runs.append((module, trainer, record))
    (plain, alone, rows), (module, trainer, _) = runs
    assert toy.same(toy.snapshot(module), toy.snapshot(plain)), "training is untouched, its own statistics included"
    assert torch.equal(trainer.callback_metrics["train/metric"], alone.callback_metrics["train/metric"])
    assert [row["val/loss"] for row in rows.rows] == [row["val/loss"] for row in runs[1][2].rows]
    average = callbacks[0].average()
    reference = toy.Toy()
    reference.load_state_dict(average)
    loader = [batch for batch, _ in zip(module.train_dataloader(), range(batches), strict=False)]
    torch.optim.swa_utils.update_bn([x for x, _ in loader], reference)
    for key, tensor in reference.state_dict().items():
        torch.testing.assert_close(average[key], tensor, msg=key)
    assert reference.net[1].momentum == 0.1
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert toy.same(load_averaged(tmp_path / "a.ckpt", "swa"), average)


def test_live_and_averaged_buffers(tmp_path, toy):
    module = toy.Toy()
    live, average = EMA(decay=0.9, name="live", buffers="live"), EMA(decay=0.9)
    toy.trainer(tmp_path, live, average).fit(module)
    key = "net.1.running_mean"
    assert torch.equal(live.average("live")[key], module.points[-1][key])
    torch.testing.assert_close(
        live.average("ema")[key].double(), toy.ema_of(module.points, 0.9)[key], rtol=1e-6, atol=1e-6
    )


def test_reestimation_under_manual_optimization_asks_for_a_forward(tmp_path, toy):
    class Manual(toy.Toy):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    with pytest.raises(ConfigError, match="Say what the forward pass is"):
        toy.trainer(tmp_path, EMA(buffers="reestimate")).fit(Manual())
    module, ema = Manual(), EMA(buffers="reestimate", forward=lambda module, batch: module(batch[0]))
    toy.trainer(tmp_path, ema).fit(module)
    assert toy.same(toy.snapshot(module), module.points[-1])
    assert ema.average()["net.1.num_batches_tracked"] == 6


def test_reestimation_leaves_the_training_order_alone(tmp_path, toy):
    def run(callbacks):
        class Shuffled(toy.Toy):
            def train_dataloader(self):
                draw = torch.Generator().manual_seed(5)
                return torch.utils.data.DataLoader(toy.data(), batch_size=4, shuffle=True, generator=draw)

        module = Shuffled()
        toy.trainer(tmp_path, *callbacks, val_check_interval=2).fit(module)
        return toy.snapshot(module)

    assert toy.same(run([]), run([EMA(buffers="reestimate", validate="both")]))


def test_the_plain_function_for_loops_of_ones_own(toy):
    model, twin = toy.Toy().net, toy.Toy().net
    batches = [x for x, _ in toy.Toy().train_dataloader()]
    reestimate(model, batches)
    torch.optim.swa_utils.update_bn(batches, twin)
    assert toy.same(toy.snapshot(model), toy.snapshot(twin))
