"""BatchNorm statistics of averages, measured anew on training data."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from soups.averaging.batchnorm import batch_norms, reestimate, statistics
from soups.evaluation import Batch, forward
from soups.fitting.run import Run
from soups.tasks.data import ShuffledBatches
from soups.tasks.network import Network
from soups.weights import Weights


class BatchNorm:
    """Statistics by the hash of the weights that they were measured for.

    Args:
        run: with the training data.
        network: that runs.
        device: it is on.
        count: training batches that are read once and run through the network for each model.
    """

    def __init__(self, run: Run, network: Network, device: torch.device, count: int) -> None:
        self.run, self.network, self.device, self.count = run, network, device, count
        self._batches: list[Batch] = []
        self._statistics: dict[str, dict[str, Tensor]] = {}

    def reestimated(self, weights: Weights, weights_hash: str) -> Weights:
        """Return some weights with BatchNorm statistics measured for them on training data, without augmentation.

        The batches are the same for all weights, and every rank reads all of them: the bits do not depend on the ranks.

        Args:
            weights: of the network.
            weights_hash: statistics are measured once for each.
        """
        module = self.network.module
        if not batch_norms(module):
            return weights
        if weights_hash not in self._statistics:
            self._batches = self._batches or self._read()
            module.load_state_dict(weights)
            reestimate(module, self._batches, lambda batch: forward(module, batch[0], self.device))
            self._statistics[weights_hash] = {
                key: tensor.to("cpu", weights[key].dtype) for key, tensor in statistics(module).items()
            }
        return {**weights, **self._statistics[weights_hash]}

    def _read(self) -> list[Batch]:
        loader, samples = self.run.asked.loader, self.run.splits.train
        dataset = self.network.input.dataset(samples, loader.size)
        chosen = list(islice(ShuffledBatches(len(samples), loader.batch_size, 0), self.count))
        return list(DataLoader(dataset, sampler=chosen, batch_size=None, num_workers=self.run.layout.loader.workers))
