"""Training on a GPU: mixed precision, averages on the host, checkpoints that leave the machine, memory, compiled networks.

The other tests of this folder run there with `SOUPS_TEST_ACCELERATOR=gpu`.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from soups.averaging import averages, load_averaged
from soups.callbacks import EMA, LAWA, SWA, Mixout

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


def fit(toy, folder, *callbacks, module=None, ckpt_path=None, **options):
    module = module or toy.Toy()
    trainer = toy.trainer(folder, *callbacks, **{"accelerator": "gpu", **options})
    trainer.fit(module, ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_lightnings_scaler_skips_do_not_count(tmp_path, toy, fused):
    class Overflows(toy.Toy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, fused=fused)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx in (2, 3) else 1.0)

    ema = EMA(decay=0.9, buffers="live")
    module, _ = fit(toy, tmp_path, ema, module=Overflows(), precision="16-mixed")
    first = toy.snapshot(toy.Toy())
    before = [first, *module.points[:-1]]
    kept = [
        p
        for p, old in zip(module.points, before, strict=True)
        if not torch.equal(p["net.0.weight"], old["net.0.weight"])
    ]
    assert len(module.points) == 18 and len(kept) <= 12
    assert ema._session.tracked["ema"].mean.count == len(kept) > 6
    toy.close({n: t for n, t in ema.average().items() if "running" not in n}, parameters_of(toy.ema_of(kept, 0.9)))


def parameters_of(weights):
    return {name: tensor for name, tensor in weights.items() if "running" not in name}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_other_precisions(tmp_path, toy, precision):
    ema = EMA(decay=0.9)
    module, _ = fit(toy, tmp_path, ema, module=toy.Toy(norm=False, lr=0.01), precision=precision)
    value = ema._session.value("ema")
    assert all(tensor.dtype == torch.float32 and tensor.is_cuda for tensor in value.values())
    toy.close(value, toy.ema_of(module.points, 0.9))


def test_an_average_on_the_host_is_the_one_on_the_device_and_training_is_untouched(tmp_path, toy):
    plain, _ = fit(toy, tmp_path)
    ways = {"device": {}, "behind": {"device": "cpu"}, "waiting": {"device": "cpu", "background": False}}
    held = {}
    for name, options in ways.items():
        callbacks = [
            EMA(decay=0.9, validate="both", **options),
            LAWA(k=3, every="2st", **options),
            SWA(start="1ep", **options),
        ]
        module, _ = fit(toy, tmp_path, *callbacks)
        assert toy.same(toy.snapshot(module), toy.snapshot(plain))
        held[name] = {kind: callbacks[0]._session.value(kind) for kind in ("ema", "lawa", "swa")}
    for kind in ("ema", "lawa", "swa"):
        assert {t.is_cuda for t in held["device"][kind].values()} == {True}
        assert {t.is_cuda for t in held["behind"][kind].values()} == {False}
        assert toy.same(held["behind"][kind], held["waiting"][kind])
        toy.close(held["behind"][kind], held["device"][kind])


@pytest.mark.parametrize("place", [None, "cpu"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, toy, place):
    def callbacks():
        return [
            EMA(decay=0.9, device=place), EMA(decay=0.99, name="rounded", dtype="bfloat16", device=place),
            LAWA(k=3, every="4st", device=place), SWA(start="25%", every="1ep", device=place), Mixout(p=0.3),
        ]  # fmt: skip

    class Save(toy.pl.Callback):
        def on_train_epoch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole, rest = callbacks(), callbacks()
    one, _ = fit(toy, tmp_path, *whole, Save(), module=toy.Toy(lr=0.002), max_epochs=4)
    two, _ = fit(toy, tmp_path, *rest, module=toy.Toy(lr=0.002), max_epochs=4, ckpt_path=tmp_path / "1.ckpt")
    assert len(two.points) == 12 and toy.same(toy.snapshot(two), toy.snapshot(one))
    for name in ("ema", "rounded", "lawa", "swa"):
        assert toy.same(rest[0]._session.value(name), whole[0]._session.value(name)), name


ELSEWHERE = """
import sys, torch
from soups.averaging import load_averaged
from soups.callbacks import EMA
from tests.callbacks.conftest import Toy, trainer
assert not torch.cuda.is_available()
path, out = sys.argv[1:]
ema = EMA(decay=0.9)
module = Toy()
trainer(out, ema, max_epochs=4, accelerator="cpu").fit(module, ckpt_path=path)
torch.save({"loaded": load_averaged(path), "count": ema._session.tracked["ema"].mean.count,
            "resumed": ema.average(), "points": module.points}, out + "/found.pt")
"""


def test_a_checkpoint_is_read_and_resumed_on_a_machine_without_a_gpu_and_back(tmp_path, toy):
    saved = {}

    class Save(toy.pl.Callback):
        def on_train_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "gpu.ckpt")
            saved.update(ema._session.state_dict("ema"))

    ema = EMA(decay=0.9)
    module, _ = fit(toy, tmp_path, ema, Save(), max_epochs=2)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "gpu.ckpt"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert toy.same(found["loaded"], saved) and found["count"] == 24
    toy.close(found["resumed"], toy.ema_of([*module.points, *found["points"]], 0.9))
    # and what the CPU wrote goes on on the GPU
    cpu = EMA(decay=0.9)
    first, trainer = fit(toy, tmp_path, cpu, accelerator="cpu", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "cpu.ckpt")
    ema = EMA(decay=0.9)
    second, _ = fit(toy, tmp_path, ema, max_epochs=2, ckpt_path=tmp_path / "cpu.ckpt")
    assert all(tensor.is_cuda for tensor in ema._session.value("ema").values())
    toy.close(ema.average(), toy.ema_of([*first.points, *second.points], 0.9))


def test_weights_only_checkpoints_name_the_averages(tmp_path, toy):
    ema = EMA(decay=0.9, test="average")
    module, trainer = fit(toy, tmp_path, ema)
    trainer.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    assert [(row.name, row.count) for row in averages(tmp_path / "w.ckpt")] == [("raw", 18), ("ema", 18)]
    assert toy.same(load_averaged(tmp_path / "w.ckpt"), ema.average())
    found = trainer.test(module, verbose=False)[0]["test/loss"]
    assert found == pytest.approx(toy.evaluate(module, ema.average()), rel=1e-4)


def test_memory_goes_back_when_a_fit_and_its_callbacks_are_gone(tmp_path, toy):
    class Wide(toy.Toy):
        def __init__(self):
            super().__init__(norm=False)
            self.net = torch.nn.Sequential(torch.nn.Linear(3, 500_000), torch.nn.Tanh(), torch.nn.Linear(500_000, 1))
            self.lr = 1e-8

        def on_train_batch_end(self, *_):
            pass

    def once():
        callbacks = [
            EMA(decay=0.9, validate="both"),
            LAWA(k=3, every="1st"),
            EMA(name="host", device="cpu"),
            Mixout(p=0.1),
        ]
        fit(toy, tmp_path, *callbacks, module=Wide(), max_epochs=1)

    once()
    gc.collect()
    first = torch.cuda.memory_allocated()
    for _ in range(2):
        once()
        gc.collect()
        assert torch.cuda.memory_allocated() <= first + (1 << 20)
    assert first < 40e6  # cuBLAS's workspace; one copy of the network is 10 MB, of which there were nine


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_networks_see_the_average_while_it_is_in_place(tmp_path, toy, mode):
    """`reduce-overhead` records CUDA graphs, which remember addresses."""

    class Compiled(toy.Toy):
        def __init__(self, **options):
            super().__init__(norm=False)
            self.net = torch.compile(self.net, mode=mode)

        def loss(self, batch):
            return (self(batch[0]) - batch[1]).square().mean()

    ema = EMA(decay=0.9, validate="both")
    module, trainer = fit(toy, tmp_path, ema, module=Compiled(), max_epochs=4)
    for suffix, weights in (("", module.points[-1]), ("_ema", ema.average())):
        plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}
        found = float(trainer.callback_metrics[f"val/loss{suffix}"])
        assert found == pytest.approx(toy.evaluate(toy.Toy(norm=False), plain), rel=1e-4)
    toy.close(ema.average(), toy.ema_of(module.points, 0.9))
