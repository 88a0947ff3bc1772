"""The behaviours that Lightning's public tests ask of its averaging callbacks, asked of ours.

Eight epochs of eight batches, two batches to a step, on one and two processes; crashes at several epochs; streamed data; with
and without BatchNorm; the user's own schedulers and rates.
"""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from soups.averaging import averages, load_averaged
from soups.callbacks import EMA, SWA, Averages
from soups.errors import SoupError
from tests.devices import forks

EPOCHS = 8


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(zip(*self.data.tensors, strict=True))


def crashing(toy, crash=None, *, scheduler=None, stream=False, norm=True):
    class Crashing(toy.Toy):
        def training_step(self, batch, batch_idx):
            if crash is not None and self.current_epoch >= crash:
                raise RuntimeError("CRASH")
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            if scheduler is None:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": scheduler(optimizer)}

        def train_dataloader(self):
            data = toy.data(batches=8)
            return DataLoader(Stream(data) if stream else data, batch_size=4)

    return Crashing(norm=norm)


def callbacks():
    return Averages(ema=EMA(decay=0.9), swa=SWA(start="4ep", every="2ep"))


def fit(toy, folder, module, keep, devices=1, ckpt_path=None):
    save = ModelCheckpoint(dirpath=folder, filename="last", save_on_exception=False)
    strategy = {"strategy": "ddp_fork", "devices": 2} if devices == 2 else {}
    trainer = toy.trainer(
        folder, keep, save, max_epochs=EPOCHS, accumulate_grad_batches=2, limit_val_batches=0, **strategy
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_counts_and_values(tmp_path, toy, norm, stream):
    keep, module = callbacks(), crashing(toy, stream=stream, norm=norm)
    fit(toy, tmp_path, module, keep)
    tracked = keep._session.tracked
    assert tracked["ema"].mean.count == 4 * EPOCHS and tracked["swa"].mean.count == 3
    toy.close(keep.average("ema"), toy.ema_of(module.points[1::2], 0.9))
    toy.close(keep.average("swa"), toy.mean_of([module.points[8 * e - 1] for e in (4, 6, 8)]))


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=forks)])
@pytest.mark.parametrize("crash", [1, 3, 5])
def test_crash_and_resume(tmp_path, toy, crash, devices):
    fit(toy, tmp_path / "whole", crashing(toy), callbacks(), devices)
    with pytest.raises(Exception, match="CRASH"):
        fit(toy, tmp_path / "part", crashing(toy, crash), callbacks(), devices)
    fit(toy, tmp_path / "rest", crashing(toy), callbacks(), devices, ckpt_path=tmp_path / "part/last.ckpt")
    steps = 4 * EPOCHS // devices
    assert [(row.name, row.count) for row in averages(tmp_path / "rest/last.ckpt")] == [
        ("raw", steps),
        ("ema", steps),
        ("swa", 3),
    ]
    for name in ("raw", "ema", "swa"):
        assert toy.same(
            load_averaged(tmp_path / "rest/last.ckpt", name), load_averaged(tmp_path / "whole/last.ckpt", name)
        )


def test_resume_of_a_stream_remembers_where_counting_began(tmp_path, toy):
    # the length of an epoch is not known beforehand: `origin` is found while training, and saved
    def keep():
        return SWA(start="1ep", every="3st")

    whole, module = keep(), crashing(toy, stream=True)
    fit(toy, tmp_path / "whole", module, whole)
    toy.close(whole.average(), toy.mean_of([module.points[2 * step - 1] for step in range(4, 32, 3)]))
    with pytest.raises(RuntimeError, match="CRASH"):
        fit(toy, tmp_path / "part", crashing(toy, 2, stream=True), keep())
    rest = keep()
    fit(toy, tmp_path / "rest", crashing(toy, stream=True), rest, ckpt_path=tmp_path / "part/last.ckpt")
    assert toy.same(rest.average(), whole.average())


@pytest.mark.parametrize("crash", [1, 5])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_resume_with_a_scheduler_of_ones_own(tmp_path, toy, crash, interval):
    def scheduler(optimizer):
        return {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n), "interval": interval}

    whole = crashing(toy, scheduler=scheduler)
    fit(toy, tmp_path / "whole", whole, callbacks())
    with pytest.raises(RuntimeError, match="CRASH"):
        fit(toy, tmp_path / "part", crashing(toy, crash, scheduler=scheduler), callbacks())
    rest = crashing(toy, scheduler=scheduler)
    trainer = fit(toy, tmp_path / "rest", rest, callbacks(), ckpt_path=tmp_path / "part/last.ckpt")
    assert toy.same(toy.snapshot(rest), toy.snapshot(whole))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(
        0.05 * 0.9 ** (EPOCHS * (4 if interval == "step" else 1))
    )


def test_each_group_keeps_its_rate(tmp_path, toy):
    class Groups(toy.Toy):
        def configure_optimizers(self):
            groups = [{"params": self.net[i].parameters(), "lr": lr} for i, lr in ((0, 0.01), (2, 0.02))]
            return torch.optim.SGD(groups)

    trainer = toy.trainer(tmp_path, SWA(start="0st"))
    trainer.fit(Groups())
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.01, 0.02]
    assert all("swa_lr" not in group for group in trainer.optimizers[0].param_groups)


def test_nothing_is_deep_copied(tmp_path, toy):
    class Loud(toy.Toy):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    toy.trainer(tmp_path, callbacks(), fast_dev_run=True).fit(Loud())


def test_starts_by_step_and_by_epoch(tmp_path, toy):
    for start, first in (("10st", 9), ("2ep", 11)):
        module, ema = toy.Toy(), EMA(decay=0.9, start=start)
        toy.trainer(tmp_path, ema).fit(module)
        toy.close(ema.average(), toy.ema_of(module.points[first:], 0.9))


def test_fast_dev_run_writes_nothing(tmp_path, toy):
    from soups.callbacks import PostHocEMA, Trajectory

    toy.trainer(tmp_path, EMA(), PostHocEMA(), Trajectory(), fast_dev_run=True).fit(toy.Toy())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_errors_are_ours_and_callbacks_can_be_copied(tmp_path, toy):
    ema = EMA(decay=0.9)
    toy.trainer(tmp_path, ema).fit(toy.Toy())
    twin = copy.deepcopy(ema)
    with pytest.raises(SoupError, match=r"run trainer\.fit"):
        twin.average()
    assert isinstance(twin, pl.Callback) and twin.state_key == "EMA[ema]"
