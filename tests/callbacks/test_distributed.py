"""Averages on two gloo processes: replicated (DDP) and sharded (FSDP2 through ModelParallelStrategy).

Where there is a GPU, also sharded on one NCCL process: the shards are whole there, but they are DTensors all the same.
"""

from __future__ import annotations

import os
import socket
import traceback

import lightning.pytorch as pl
import pytest
import torch
import torch.multiprocessing as processes
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from soups.averaging import PostHoc, Power, Snapshots, averages, load_averaged
from soups.callbacks import EMA, LAWA, SWA, Averages, PostHocEMA, Trajectory
from soups.callbacks.sharding import refuse_opaque
from soups.errors import ConfigError
from tests.devices import forks


@forks
def test_ddp_keeps_the_same_average_on_both_processes(tmp_path, toy):
    class Check(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            average = torch.cat([ema.average()[name].flatten() for name, _ in pl_module.named_parameters()])
            both = trainer.strategy.all_gather(average)
            assert trainer.world_size == 2 and torch.equal(both[0], both[1])
            toy.close(
                {name: ema.average()[name] for name, _ in pl_module.named_parameters()},
                {n: t for n, t in toy.ema_of(pl_module.points, 0.9).items() if "running" not in n},
            )
            statistics = trainer.strategy.all_gather(ema.average("swa")["net.1.running_var"])
            assert torch.equal(statistics[0], statistics[1]), "measured on both processes' batches"

    module = toy.Toy()
    ema = Averages(ema=EMA(decay=0.9, validate="both"), swa=SWA(start="1ep", buffers="reestimate", validate="both"))
    save = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="a")
    toy.trainer(tmp_path, ema, Check(), save, strategy="ddp_fork", devices=2).fit(module)
    assert [row.name for row in averages(tmp_path / "a.ckpt")] == ["raw", "ema", "swa"]
    resumed = Averages(ema=EMA(decay=0.9), swa=SWA(start="1ep"))
    toy.trainer(tmp_path, resumed, strategy="ddp_fork", devices=2, max_epochs=4).fit(
        toy.Toy(), ckpt_path=tmp_path / "a.ckpt"
    )


class Sharded(pl.LightningModule):
    """A small network whose shards are uneven: 5 rows on two processes."""

    def __init__(self):
        super().__init__()
        self.net = None
        self.points = []

    def configure_model(self):
        if self.net is not None:
            return
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[0], mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def loss(self, batch):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch, batch_idx):
        draw = torch.Generator().manual_seed(self.trainer.global_step)
        x = torch.randn(4, 3, generator=draw).to(self.device)
        return self.loss((x, x.sum(1, keepdim=True)))

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def on_train_batch_end(self, *_):
        self.points.append({name: p.full_tensor().detach().clone() for name, p in self.named_parameters()})

    def train_dataloader(self):
        samples = 24 * int(os.environ["WORLD_SIZE"])  # six steps an epoch
        return DataLoader(TensorDataset(torch.zeros(samples, 3), torch.zeros(samples, 1)), batch_size=4)

    def val_dataloader(self):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(9))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def make_trainer(folder, *callbacks, distributed=True, **options):
    world = int(os.environ["WORLD_SIZE"])
    defaults = {
        "max_epochs": 3, "accelerator": "cpu" if world > 1 else "gpu", "devices": world, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }  # fmt: skip
    strategy = ModelParallelStrategy(
        data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=distributed
    )
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), strategy=strategy, **{**defaults, **options})


def kept(folder):
    return [
        EMA(decay=0.9, validate="both", log_distance=True),
        LAWA(k=3, every="2st"),
        PostHocEMA(snapshot_every="1ep", folder=folder / "posthoc"),
        Trajectory(folder=folder / "trajectory"),
    ]


def close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].cpu().double(), tensor.cpu().double(), rtol=1e-6, atol=1e-6)


def whole(weights):
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in weights.items()}


def shards(callback):
    return {
        f"{name}/{plane}/{key}": tensor
        for name, tracked in callback._session.tracked.items()
        for plane, tensors in tracked.mean.state_dict()["planes"].items()
        for key, tensor in tensors.items()
    }


def sharded_run(folder, distributed):
    callbacks, module = kept(folder), Sharded()
    trainer = make_trainer(folder, *callbacks, distributed=distributed)
    trainer.fit(module)
    # shard by shard: no process holds more than its part (3 and 2 of 5 rows)
    rows = 5 if trainer.world_size == 1 else 3 if trainer.global_rank == 0 else 2
    assert callbacks[0]._session.tracked["ema"].mean.value()["net.0.weight"].shape == (rows, 3)
    shares = torch.tensor([0.9 ** (17 - i) for i in range(18)], dtype=torch.float64)
    shares /= shares.sum()
    names = list(module.points[0])
    ema = {n: sum(float(s) * p[n].double() for s, p in zip(shares, module.points, strict=True)) for n in names}
    close(whole(callbacks[0].average()), ema)
    lawa = {n: torch.stack([module.points[i][n].double() for i in (13, 15, 17)]).mean(0) for n in names}
    close(whole(callbacks[0].average("lawa")), lawa)
    close({n: p.full_tensor() for n, p in module.named_parameters()}, module.points[-1])
    reference = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    for suffix, weights in (("", module.points[-1]), ("_ema", ema)):
        reference.load_state_dict({name.removeprefix("net."): tensor.float() for name, tensor in weights.items()})
        x, y = module.val_dataloader().dataset.tensors
        wanted = (reference(x) - y).square().mean()
        found = trainer.callback_metrics[f"val/loss{suffix}"].cpu()
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-6)
    distance = sum(float((ema[n] - module.points[-1][n]).square().sum()) for n in names) ** 0.5
    assert float(trainer.callback_metrics["distance/ema"]) == pytest.approx(distance, rel=1e-4)
    path = folder / "run.ckpt"
    trainer.save_checkpoint(path)
    torch.distributed.barrier()
    for name, wanted in (("ema", ema), ("lawa", lawa), ("raw", module.points[-1])):
        close(load_averaged(path, name), wanted)
    # resume from there, and compare with a run that was never stopped
    first, second = kept(folder / "a"), kept(folder / "b")
    one, two = Sharded(), Sharded()
    make_trainer(folder, *first, distributed=distributed, max_epochs=4).fit(one)
    make_trainer(folder, *second, distributed=distributed, max_epochs=4).fit(two, ckpt_path=path)
    assert len(two.points) == 6
    assert all(torch.equal(one.points[-1][name], two.points[-1][name]) for name in names)
    left, right = shards(first[0]), shards(second[0])
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    # test on the average, from the file
    # torch 2.11's fully_shard on one process cannot take tensors of inference mode
    tester = make_trainer(folder, EMA(test="average"), distributed=distributed, inference_mode=trainer.world_size > 1)
    found = tester.validate(Sharded(), ckpt_path=path, verbose=False)[0]["val/loss"]
    assert found == pytest.approx(float(trainer.callback_metrics["val/loss_ema"]), rel=1e-5)
    if trainer.is_global_zero:
        assert PostHoc(folder / "posthoc").synthesize(Power(0.08, 18)).fit.residual < 0.3
        close(Snapshots(folder / "trajectory").load("raw", 18), module.points[-1])


def child(rank, world, port, folder, distributed):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    try:
        torch.set_num_threads(1)
        sharded_run(folder, distributed)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("world", [pytest.param(2, marks=forks), pytest.param(1, marks=pytest.mark.gpu, id="1-gpu")])
@pytest.mark.parametrize("distributed", [True, False], ids=["folder", "one-file"])
def test_sharded_models_are_averaged_shard_by_shard(tmp_path, distributed, world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = processes.get_context("fork" if world > 1 else "spawn")  # CUDA does not survive a fork
    children = [context.Process(target=child, args=(rank, world, port, tmp_path, distributed)) for rank in range(world)]
    for process in children:
        process.start()
    for process in children:
        process.join(120)
        if process.is_alive():
            process.terminate()
    assert [process.exitcode for process in children] == [0] * world


@pytest.mark.parametrize(
    ("strategy", "message"), [(FSDPStrategy, "fully_shard"), (DeepSpeedStrategy, "DeepSpeed keeps")]
)
def test_opaque_strategies_are_refused(strategy, message):
    trainer = type("Trainer", (), {"strategy": strategy.__new__(strategy)})()
    with pytest.raises(ConfigError, match=message):
        refuse_opaque(trainer)
