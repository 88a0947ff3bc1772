"""Modules that are awkward for a callback: each keeps state, draws numbers or changes itself in a way of its own."""

from __future__ import annotations

import copy
import functools
import random
from collections import deque

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, TensorDataset
from torchmetrics import MaxMetric, MeanMetric


def samples(seed=0, count=24):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=draw)
    return TensorDataset(x, x.sum(1, keepdim=True) + 0.1 * torch.randn(count, 1, generator=draw))


class Plain(pl.LightningModule):
    """The simplest of them, and what the others share: `losses` is a trace of training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        return (self(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.detach().clone())
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(samples(), batch_size=4)

    def val_dataloader(self):
        return DataLoader(samples(1, 8), batch_size=4)


class Gan(Plain):
    """Manual optimization of two optimizers that step in turn."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net.parameters(), lr=0.01), torch.optim.SGD(self.critic.parameters(), lr=0.01)]

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        loss = self.loss(batch) - 0.1 * self.critic(self(batch[0])).mean()
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()
        loss = self.critic(self(batch[0]).detach()).mean() - self.critic(batch[1]).mean()
        critic.zero_grad()
        self.manual_backward(loss)
        critic.step()
        self.losses.append(loss.detach().clone())


class SchedulerInHook(Plain):
    """Steps its scheduler in validation."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def lr_scheduler_step(self, scheduler, metric):
        pass

    def on_validation_epoch_end(self):
        self.lr_schedulers().step()


class PlateauInHook(SchedulerInHook):
    """Steps a scheduler on the metric of the validation that ends."""

    on_metric = True

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}

    def on_validation_epoch_end(self):
        self.lr_schedulers().step(self.trainer.callback_metrics["val/loss"])


class FilledBuffer(Plain):
    """Fills buffers in validation that training reads: from data alone, so that they do not depend on the weights."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("bank", torch.zeros(4, 3))
        self.register_buffer("grown", torch.zeros(0), persistent=True)

    def validation_step(self, batch, batch_idx):
        self.count += 1
        self.bank.data.mul_(0.5).add_(batch[0])
        self.grown = torch.cat([self.grown, batch[0][:, 0]])
        super().validation_step(batch, batch_idx)

    def loss(self, batch):
        return super().loss(batch) + 0.01 * (self.net[0].weight[0] * self.bank.mean(0)).sum() * self.count


class SharedGenerator(Plain):
    """One generator for the order of all loaders."""

    def __init__(self):
        super().__init__()
        self.draw = torch.Generator().manual_seed(5)

    def train_dataloader(self):
        return DataLoader(samples(), batch_size=4, shuffle=True, generator=self.draw)

    def val_dataloader(self):
        return DataLoader(samples(1, 8), batch_size=4, shuffle=True, generator=self.draw)


class BatchSampled(Plain):
    """A generator below a batch sampler, and a numpy one in a sampler of its own."""

    class Shuffled(Sampler):
        def __init__(self, count):
            self.count, self.state = count, np.random.RandomState(3)

        def __len__(self):
            return self.count

        def __iter__(self):
            return iter(self.state.permutation(self.count).tolist())

    def train_dataloader(self):
        data = samples()
        draw = torch.Generator().manual_seed(9)
        sampler = BatchSampler(RandomSampler(data, generator=draw), 4, drop_last=False)
        return DataLoader(data, batch_sampler=sampler)

    def val_dataloader(self):
        data = samples(1, 8)
        return DataLoader(data, batch_size=4, sampler=self.Shuffled(len(data)))


class RandomState(BatchSampled):
    """A numpy random state decides the order of training."""

    def train_dataloader(self):
        data = samples()
        return DataLoader(data, batch_size=4, sampler=self.Shuffled(len(data)))


class Streamed(Plain):
    """Training data from a data set that remembers how far it was read."""

    class Stream(IterableDataset):
        def __init__(self):
            self.data, self.position, self.draw = samples(2, 120), 0, np.random.default_rng(4)

        def __iter__(self):
            for _ in range(24):
                x, y = self.data[self.position % 120]
                self.position += 1
                yield x + float(self.draw.normal()) * 0.01, y

    def train_dataloader(self):
        return DataLoader(self.Stream(), batch_size=4)


class RandomEverywhere(Plain):
    """Draws from every global generator in training and validation, and augments with one of its own."""

    class Noisy(Dataset):
        def __init__(self, seed):
            self.data, self.draw = samples(seed), random.Random(seed)

        def __len__(self):
            return 12

        def __getitem__(self, index):
            x, y = self.data[index]
            return x + self.draw.random() * 0.1, y

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.net(self.drop(x))

    def noise(self):
        return torch.rand(()) + random.random() + float(np.random.rand())

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0] + 0.01 * self.noise(), batch[1]), batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val/noise", self.noise())
        super().validation_step(batch, batch_idx)

    def train_dataloader(self):
        return DataLoader(self.Noisy(0), batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.Noisy(0), batch_size=4)


class Spectral(Plain):
    """Spectral norm, by both of torch's ways."""

    def __init__(self):
        super().__init__()
        self.net[0] = parametrizations.spectral_norm(self.net[0])
        self.net[2] = nn.utils.spectral_norm(self.net[2])


class Masked(Plain):
    """A mask of minus infinities among the buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.mix = nn.Parameter(torch.zeros(3, 3))

    def forward(self, x):
        return self.net(x @ (self.mix + self.mask).softmax(1).T)


class Renamed(Plain):
    """Saves its tensors under other names, and reads them back."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {key.removeprefix("net."): t for key, t in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"net.{key}": tensor for key, tensor in checkpoint["state_dict"].items()}


class OwnStateDict(Plain):
    """Overrides `state_dict` and leaves a frozen part out."""

    strict_loading = False

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x):
        return self.net(self.frozen(x))

    def state_dict(self, *args, **kwargs):
        whole = super().state_dict(*args, **kwargs)
        return {key.replace("net.", "model."): t for key, t in whole.items() if "frozen" not in key}

    def load_state_dict(self, state_dict, strict=False):
        return super().load_state_dict({k.replace("model.", "net."): t for k, t in state_dict.items()}, strict=False)


class Lazy(Plain):
    """Layers that get their shapes in the first forward pass, and one that is built then."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Linear(5, 5))
        self.head = None

    def forward(self, x):
        if self.head is None:
            torch.manual_seed(1)
            self.head = nn.Linear(5, 1)
            if self._trainer is not None and self.trainer.optimizers:
                self.trainer.optimizers[0].add_param_group({"params": list(self.head.parameters())})
        return self.head(self.net(x))


class NewHead(Plain):
    """Exchanges its head in the middle of the fit for one of another width, and adds a layer."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            torch.manual_seed(3)
            self.net[2] = nn.Linear(5, 2)
            self.extra = nn.Linear(2, 1)
            self.net.append(self.extra)
            self.trainer.optimizers[0].add_param_group(
                {"params": list(self.net[2].parameters()) + list(self.extra.parameters())}
            )


class WeightNormed(Plain):
    """Puts weight norm on a layer in the middle of the fit."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            parametrizations.weight_norm(self.net[0])
            new = list(self.net[0].parametrizations.parameters())
            self.trainer.optimizers[0].add_param_group({"params": new})


class Lora(Plain):
    """Freezes its layers and trains adapters, which are added in the middle of the fit."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base.requires_grad_(False)
            self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.base_layer(x) + self.up(self.down(x))

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            torch.manual_seed(2)
            self.net[0] = self.Adapted(self.net[0])
            new = [*self.net[0].down.parameters(), *self.net[0].up.parameters()]
            self.trainer.optimizers[0].add_param_group({"params": new})


class Remembering(Plain):
    """Keeps bests, histories and metrics in Python and in torchmetrics, and trains differently by them."""

    def __init__(self):
        super().__init__()
        self.seen, self.recent, self.facts = 0, deque(maxlen=3), {"runs": [], "best": 9.0}
        self.mean, self.best = MeanMetric(), MaxMetric()
        self.outputs = []

    def on_validation_epoch_start(self):
        self.outputs = []

    def validation_step(self, batch, batch_idx):
        self.seen += 1
        loss = self.loss(batch)
        self.outputs.append(batch[0].sum())
        self.mean(loss)
        self.log("val/mean", self.mean)
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.recent.append(float(torch.stack(self.outputs).sum()))
        self.best.update(self.recent[-1] + self.seen)
        self.log("val/best", self.best.compute())

    def on_validation_end(self):
        self.facts["runs"].append(self.seen)
        self.facts["best"] = min(self.facts["best"], self.recent[-1])

    def loss(self, batch):
        return super().loss(batch) * (1 + 0.01 * len(self.facts["runs"])) + 0.001 * self.net[0].weight.sum() * self.seen


class Teacher(Plain):
    """Trains towards a frozen copy of itself, which follows after each validation; it writes through `.data`."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def on_validation_end(self):
        for own, trained in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            own.data.lerp_(trained.data, 0.3)

    def loss(self, batch):
        return super().loss(batch) + (self(batch[0]) - self.teacher(batch[0])).square().mean()


class Unfreezing(Plain):
    """Unfreezes and freezes layers in validation, and scales the momentum there."""

    def on_validation_epoch_end(self):
        weight = self.net[0].weight
        weight.requires_grad_(not weight.requires_grad)
        for state in self.optimizers().optimizer.state.values():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].mul_(0.5)


class Gradients(Plain):
    """Leaves gradients of its own behind a validation, in the middle of an accumulation."""

    def on_fit_start(self):
        self.trainer.accumulate_grad_batches = 2

    def on_validation_epoch_end(self):
        with torch.inference_mode(False), torch.enable_grad():
            self.net[0].weight.square().sum().mul(
                0.01 * float(self.trainer.val_dataloaders.dataset[0][0][0])
            ).backward()

    on_metric = True


class Hidden(Plain):
    """Counts validations in a closure, a partial call, a method of another object, and containers of other libraries."""

    class Counter:
        count = 0

        def add(self, step):
            self.count += step
            return self.count

    def __init__(self):
        super().__init__()
        number, held = 0, []

        def add(step):
            nonlocal number
            number += step
            return number

        def append(items, step):
            items.extend([1] * step)
            return len(items)

        self.counters = [
            add, lambda step: append(held, step), functools.partial(append, []), self.Counter().add,
            functools.partial(append, bytearray()),
        ]  # fmt: skip
        self.array = np.array([0, []], dtype=object)
        self.sparse = torch.eye(2).to_sparse()

    def on_validation_epoch_end(self):
        for count in self.counters:
            count(1)
        self.array[0] += 1
        self.array[1].append(1)
        self.sparse.mul_(1.5)

    def loss(self, batch):
        total = sum(count(0) for count in self.counters) + self.array[0] + len(self.array[1])
        return super().loss(batch) + 0.001 * self.net[0].weight.sum() * (total + float(self.sparse.to_dense().sum()))


ZOO = [
    Plain, Gan, SchedulerInHook, PlateauInHook, FilledBuffer, SharedGenerator, BatchSampled, RandomState, Streamed,
    RandomEverywhere, Spectral, Masked, Renamed, OwnStateDict, Lazy, NewHead, WeightNormed, Lora, Remembering, Teacher,
    Unfreezing, Gradients, Hidden,
]  # fmt: skip
