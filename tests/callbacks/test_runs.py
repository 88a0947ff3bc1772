"""Runs that follow one another: folders of snapshots, plans, resumed and second fits, fits in other processes."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, ModelCheckpoint

from soups.averaging import Snapshots, averages, constant_swa, load_averaged
from soups.averaging.units import RunLength, Schedule
from soups.callbacks import EMA, LAWA, SWA, Averages, PostHocEMA, Trajectory
from soups.callbacks.run_length import run_length_of
from soups.errors import ConfigError
from tests.devices import forks


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda **o: PostHocEMA(snapshot_every="1ep", **o), Trajectory], ids=["posthoc", "trajectory"]
)
def test_a_second_run_leaves_the_firsts_snapshots_alone(tmp_path, toy, make):
    toy.trainer(tmp_path, make()).fit(toy.Toy())
    first = files(tmp_path)
    assert first
    callback = make()
    for number in (2, 3):  # a new trainer, and the same callback again
        toy.trainer(tmp_path, callback, max_epochs=2).fit(toy.Toy())
        there = files(tmp_path)
        assert {path: there[path] for path in first} == first
        name = callback.settings.name
        assert {s.step for s in Snapshots(tmp_path / "snapshots" / f"{name}-{number}").list()} == {6, 12}
    toy.trainer(tmp_path / "own", make(folder=tmp_path / "mine")).fit(toy.Toy())
    before = files(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"mine holds \d+ snapshots of .* from another run"):
        toy.trainer(tmp_path / "own", make(folder=tmp_path / "mine")).fit(toy.Toy())
    assert files(tmp_path / "mine") == before


@pytest.mark.parametrize("folder", [None, "mine"])
def test_only_a_resumed_run_removes_and_only_its_own(tmp_path, toy, folder):
    where = None if folder is None else tmp_path / folder

    def make():
        return PostHocEMA(snapshot_every="2st", folder=where), Trajectory("2st", folder=where)

    toy.trainer(tmp_path / "other", *(PostHocEMA(), Trajectory()), max_epochs=1).fit(toy.Toy())
    others = files(tmp_path / "other")

    class Save(toy.pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    toy.trainer(tmp_path, *make(), Save(), max_epochs=2).fit(toy.Toy())
    here = where or tmp_path / "snapshots/posthoc"
    assert {s.step for s in Snapshots(here).list("posthoc@0.1")} == {2, 4, 6, 8, 10, 12}
    posthoc, trajectory = make()
    toy.trainer(tmp_path, posthoc, trajectory, max_epochs=2, max_steps=9).fit(toy.Toy(), ckpt_path=tmp_path / "a.ckpt")
    assert {s.step for s in Snapshots(here).list("posthoc@0.1")} == {2, 4, 6, 8, 9}
    runs = {s.facts["run"] for s in Snapshots(here).list("posthoc@0.1")}
    assert len(runs) == 1 and files(tmp_path / "other") == others
    assert {s.step for s in Snapshots(where or tmp_path / "snapshots/trajectory").list("raw")} == {2, 4, 6, 8, 9}
    assert not list(tmp_path.glob("snapshots/*-2"))


def test_windows_on_disk_do_not_share_files(tmp_path):
    from soups.averaging import LAWA as Window

    one, two = (Window(k=2, snapshots="disk", folder=tmp_path) for _ in range(2))
    big = torch.zeros(200, 200)
    for step in range(3):
        one.update({"w": big + step})
        two.update({"w": big - step})
    assert float(one.value()["w"].mean()) == 1.5 and float(two.value()["w"].mean()) == -1.5


# Plans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduling", [{0: 1, 2: 3}, {0: 4, 1: 2, 3: 1}, {1: 6}])
def test_schedules_of_gradient_accumulation_are_part_of_the_plan(tmp_path, toy, scheduling):
    module = toy.Toy()
    swa, ema = SWA(start="50%", every="1ep"), EMA(half_life="10%")
    steps, plans = [], []

    class Look(toy.pl.Callback):
        def on_train_start(self, trainer, pl_module):
            plans.append(run_length_of(trainer))

        def on_train_batch_end(self, trainer, *_):
            steps.append(trainer.global_step)

    toy.trainer(tmp_path, swa, ema, GradientAccumulationScheduler(scheduling), Look(), max_epochs=4).fit(module)
    total = steps[-1]
    assert plans[0].steps == total == ema._session.steps
    ends = [steps[6 * epoch + 5] for epoch in range(4)]
    assert [plans[0].steps_after(epoch + 1) for epoch in range(4)] == ends
    chosen = [epoch for epoch, end in enumerate(ends) if end >= total / 2]
    toy.close(swa.average("swa"), toy.mean_of([module.points[6 * epoch + 5] for epoch in chosen]))
    moved = [0, *steps]
    points = [p for p, now, before in zip(module.points, moved[1:], moved, strict=False) if now > before]
    toy.close(swa.average("ema"), toy.ema_of(points, 2 ** (-10 / total)))


def test_a_second_fit_with_a_higher_max_epochs_goes_on_counting(tmp_path, toy):
    module, swa, ema = toy.Toy(), SWA("75%"), EMA(decay=0.9)
    trainer = toy.trainer(tmp_path, swa, ema, max_epochs=3)
    trainer.fit(module)
    trainer.fit_loop.max_epochs = 8
    trainer.fit(module)
    assert len(module.points) == 48
    toy.close(swa.average(), toy.mean_of([module.points[6 * epoch - 1] for epoch in (6, 7, 8)]))
    toy.close(swa.average("ema"), toy.ema_of(module.points[18:], 0.9))


@pytest.mark.parametrize(
    "make",
    [lambda: LAWA(k=3, every="4st"), lambda: LAWA(k=3, every="5st"), lambda: SWA("0st", "4st"), lambda: SWA("1st", "2ep"),
     lambda: LAWA(k=2, every="4st", snapshot_dtype="bfloat16"), lambda: SWA("0st", "4st", dtype="bfloat16"),
     lambda: LAWA(k=8, every="4st"), lambda: EMA(decay=0.9, every="4st")],
)  # fmt: skip
@pytest.mark.parametrize("finished", [1, 3])
def test_a_finished_run_that_is_made_longer_is_the_longer_run(tmp_path, toy, make, finished):
    class ByStep(toy.Toy):
        def training_step(self, batch, batch_idx):
            x, y = toy.data(batches=40).tensors
            at = 4 * self.trainer.global_step
            return self.loss((x[at : at + 4], y[at : at + 4]))

    whole, part, rest = make(), make(), make()
    toy.trainer(tmp_path, whole, max_epochs=5).fit(ByStep())
    trainer = toy.trainer(tmp_path, part, max_epochs=finished)
    trainer.fit(ByStep())
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    toy.trainer(tmp_path, rest, max_epochs=5).fit(ByStep(), ckpt_path=tmp_path / "done.ckpt")
    name = whole.settings.name
    one, other = whole._session.tracked[name].mean, rest._session.tracked[name].mean
    assert one.count == other.count and toy.same(whole.average(), rest.average())
    for plane, tensors in one.state_dict()["planes"].items():
        assert toy.same(tensors, other.state_dict()["planes"][plane])


@pytest.mark.parametrize("start", ["150%", "100.5%"])
def test_a_start_beyond_the_run_is_refused_at_once(start):
    with pytest.raises(ConfigError, match="beyond the end of the planned run"):
        SWA(start=start)
    with pytest.raises(ConfigError, match="beyond the end"):
        Schedule(start, "1st", RunLength())
    SWA(start="100%")


def test_constant_swa_takes_a_rate_for_each_group():
    def made(**options):
        a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        return torch.optim.SGD([{"params": [a], "lr": 0.4}, {"params": [b], "lr": 0.1}], lr=1.0), options

    optimizer, _ = made()
    scheduler = constant_swa(optimizer, start=10, swa_lr=[0.04, 0.05], anneal=10)
    rates = [[group["lr"] for group in optimizer.param_groups]]
    for _ in range(12):
        optimizer.step()
        scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates[0] == [0.4, 0.1] and rates[5] == pytest.approx([0.22, 0.075])
    assert rates[10] == pytest.approx([0.04, 0.05]) and rates[12] == pytest.approx([0.04, 0.05])
    optimizer, _ = made()
    with pytest.raises(ConfigError, match="2 parameter groups"):
        constant_swa(optimizer, start=10, swa_lr=[0.1, 0.1, 0.1])
    with pytest.raises(ConfigError, match="positive"):
        constant_swa(optimizer, start=10, swa_lr=[0.1, 0.0])


def test_an_error_without_averages_has_no_empty_list(tmp_path, toy):
    module, ema = toy.Toy(), EMA(test="average")
    with pytest.raises(ConfigError) as told:
        toy.trainer(tmp_path, ema).test(module, verbose=False)
    assert "Allowed: ." not in str(told.value) and "ema" in str(told.value)


def test_beside_lightnings_own_averaging_both_resume(tmp_path, toy):
    def make():
        return EMA(decay=0.9), EMAWeightAveraging(decay=0.5, update_starting_at_step=0)

    class ByStep(toy.Toy):
        def training_step(self, batch, batch_idx):
            x, y = toy.data(batches=30).tensors
            at = 4 * self.trainer.global_step
            return self.loss((x[at : at + 4], y[at : at + 4]))

    ours, theirs = make()
    whole = ByStep()
    toy.trainer(tmp_path, ours, theirs, max_epochs=4).fit(whole)
    first, other = make()
    save = ModelCheckpoint(dirpath=tmp_path, filename="a", save_top_k=-1, every_n_epochs=2)
    toy.trainer(tmp_path, first, other, save, max_epochs=2).fit(ByStep())
    assert [row.name for row in averages(tmp_path / "a.ckpt")] == ["raw", "ema", "lightning"]
    found, average = load_averaged(tmp_path / "a.ckpt", "ema"), first.average()
    toy.close(found, {name: tensor for name, tensor in average.items() if tensor.is_floating_point()})
    raw = load_averaged(tmp_path / "a.ckpt", "raw")
    assert not torch.equal(raw["net.0.weight"], load_averaged(tmp_path / "a.ckpt", "lightning")["net.0.weight"])
    again, lightning = make()
    rest = ByStep()
    toy.trainer(tmp_path, again, lightning, max_epochs=4).fit(rest, ckpt_path=tmp_path / "a.ckpt")
    assert toy.same(again.average(), ours.average()) and toy.same(toy.snapshot(rest), toy.snapshot(whole))


# Other processes ------------------------------------------------------------------------------------------------------


@forks
@pytest.mark.parametrize("devices", [1, 2])
def test_after_a_fit_in_other_processes_the_main_process_has_the_averages(tmp_path, toy, devices):
    module = toy.Toy()
    both = Averages(ema=EMA(decay=0.9), lawa=LAWA(k=3, every="2st"))
    swa = SWA("0st")
    save = ModelCheckpoint(dirpath=tmp_path, filename="fit")
    trainer = toy.trainer(tmp_path, both, swa, save, strategy="ddp_fork", devices=devices, accelerator="cpu")
    trainer.fit(module)
    for callback, name in ((both, "ema"), (both, "lawa"), (swa, "swa"), (both, None)):
        wanted = load_averaged(tmp_path / "fit.ckpt", name or "ema")
        assert toy.same(callback.average(name), wanted)
        module.load_state_dict(callback.average(name))
    with pytest.raises(ConfigError, match=r"other processes.*load_state_dict"):
        both.apply()
    trainer.save_checkpoint(tmp_path / "main.ckpt")
    assert toy.same(load_averaged(tmp_path / "main.ckpt", "lawa"), load_averaged(tmp_path / "fit.ckpt", "lawa"))
    spool = both._spool.path
    assert spool.exists()
    tester = toy.trainer(tmp_path, both, strategy="ddp_fork", devices=devices, accelerator="cpu")
    both.callbacks()[0].settings.test = "both"
    tester.test(module, verbose=False)
    assert "test/loss_ema" in tester.callback_metrics
    del both, tester, trainer, callback
    gc.collect()
    assert not spool.exists()


def test_callbacks_can_be_pickled_beside_a_projects_own_package(tmp_path):
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks/mine.py").write_text("MINE = 1\n")  # a folder without __init__.py
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing\n"
        "from soups.callbacks import EMA, SWA, LAWA, Mixout, PostHocEMA, Trajectory, Averages\n"
        "import callbacks.mine\n"
        "def name(callback):\n"
        "    return type(callback).__module__\n"
        "if __name__ == '__main__':\n"
        "    made = [EMA(), SWA(), LAWA(), Mixout(), PostHocEMA(), Trajectory(), Averages(ema=EMA())]\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(sorted(pool.map(name, made)), callbacks.mine.MINE)\n"
    )
    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("soups.callbacks.") == 7 and done.stdout.strip().endswith("1")


def test_copies_of_a_callback_start_without_a_session(tmp_path, toy):
    ema = EMA(decay=0.9)
    toy.trainer(tmp_path, ema).fit(toy.Toy())
    for twin in (copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        assert twin._session is None and twin.settings == ema.settings and math.isclose(twin.decay, 0.9)
