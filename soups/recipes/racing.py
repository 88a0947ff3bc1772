"""Racing: stop evaluating a candidate soup as soon as it cannot reach the one to beat.

Held-out samples come in blocks of a fixed order. After each block two rules may drop the candidate:

- *exact* (always on): it would not be kept even if it did as well as possible on all samples still to come. The soup is
  the one that full evaluation gives, whatever the order; `hardest_first` makes the rule bite early.
- *by confidence* (`delta` > 0): the paired differences so far would be too unlikely if it were to be kept. Needs a random
  order that nothing depends on (`random_order`). The soup is another than with full evaluation with probability at most
  `delta`, for the whole search.

The second rule is a bet against the candidate. Let x_i be its score minus that of the one to beat on the i-th sample,
S_i their sum, N the number of samples, and b the largest x possible. If the full sum is at least 0, the samples not yet
seen have a mean of at least m_i = −S_{i−1}/(N − i + 1), and in random order each capital
K_c = Π (1 − c·(x_i − m_i)/(b − m_i)), 0 < c < 1, grows on average never (a supermartingale without replacement,
arXiv:2006.04347). By Ville's inequality the mean of several K_c reaches 1/δ at any time with probability at most δ.
No variance needs to be known, and only an upper bound of the per-sample score: 1 for being right, 0 for −loss.

    race = Race(network_samples(model, in_order(batches, hardest_first(scores), 64), "accuracy"), ceiling=1.0)
    soup = greedy(pool, race)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from soups.errors import ConfigError
from soups.evaluation.scores import Batch, predict
from soups.evaluation.statistics import losses, right
from soups.recipes.recipe import Step, Ties, Trial, reaches
from soups.seeding import generator
from soups.weights import Weights

Blocks = Callable[[Weights], Iterable[Tensor]]

# The stakes c: a geometric grid, since the best one depends on how far behind the candidate is.
_STAKES = torch.tensor([0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 0.9], dtype=torch.float64)


class Race:
    """Judges trial soups for `greedy`, from as few held-out samples as its rules allow; also a plain score of weights.

    Scores are means of per-sample scores, summed exactly (`math.fsum`), so that the order of samples changes no bit.

    Args:
        blocks: gives the per-sample scores of some weights block by block, larger is better; called once a trial and
            read only as far as needed. The samples and their order are the same in every call.
        ceiling: the largest score a sample can have: 1 for being right, 0 for −loss.
        delta: 0 for the exact rule alone; else the probability, at most, that the search ends in another soup.
        trials: candidates of the search, among which `delta` is shared out.
    """

    def __init__(self, blocks: Blocks, ceiling: float, delta: float = 0.0, trials: int = 1) -> None:
        if not 0 <= delta < 1:
            raise ConfigError(f"delta={delta} is no error probability; 0 races exactly, 0.05 is usual otherwise.")
        if trials < 1:
            raise ConfigError(f"trials={trials}: say how many candidates the search has.")
        self.blocks, self.ceiling, self.delta, self.trials = blocks, ceiling, delta, trials
        self._to_beat: Tensor | None = None

    def __call__(self, weights: Weights) -> float:
        """Return the score of some weights on all samples."""
        return _mean([value for block in self._read(weights) for value in block])

    def decide(self, weights: Weights, to_reach: float, ties: Ties) -> Trial:
        """Return whether some weights reach a score, from as few samples as the rules allow.

        Raises:
            ConfigError: `to_reach` is not the score of the weights that were kept last, or a score is above the ceiling.
        """
        if math.isinf(to_reach):
            self._to_beat = None
        elif self._to_beat is None or _mean(self._to_beat.tolist()) != to_reach:
            raise ConfigError(
                "A race knows the samples of the soup it kept last; the score to reach is of another one."
            )
        seen: list[float] = []
        bet = None if self._to_beat is None or not self.delta else _Bet(self._to_beat, self.ceiling)
        for block in self._read(weights):
            seen += block
            if self._to_beat is None:
                continue
            count = len(self._to_beat)
            best_case = math.fsum([*seen, *[self.ceiling] * (count - len(seen))]) / count
            hopeless = not reaches(best_case, to_reach, ties)
            if not hopeless and bet is not None:
                hopeless = bet.add(block) >= math.log(self.trials / self.delta)
            if hopeless and len(seen) < count:
                behind = math.fsum(seen) - math.fsum(self._to_beat[: len(seen)].tolist())
                return Trial(to_reach + behind / count, False, len(seen) / count)
        value = _mean(seen)
        kept = reaches(value, to_reach, ties)
        if kept:
            self._to_beat = torch.tensor(seen, dtype=torch.float64)
        return Trial(value, kept)

    def _read(self, weights: Weights) -> Iterator[list[float]]:
        for block in self.blocks(weights):
            values: list[float] = block.double().tolist()
            if values and max(values) > self.ceiling:
                raise ConfigError(
                    f"A sample has the score {max(values)}, above the ceiling of the race, {self.ceiling}."
                )
            yield values


class _Bet:
    """The capital of bets that the candidate will not be kept."""

    def __init__(self, to_beat: Tensor, ceiling: float) -> None:
        self._to_beat = to_beat
        self._bound = float((ceiling - to_beat).max())
        self._logs = torch.zeros(len(_STAKES), dtype=torch.float64)
        self._sum, self._seen = 0.0, 0

    def add(self, block: Sequence[float]) -> float:
        """Return the logarithm of the capital after one more block."""
        end = self._seen + len(block)
        x = torch.tensor(block, dtype=torch.float64) - self._to_beat[self._seen : end]
        before = self._sum + torch.cumsum(x, 0) - x
        left = len(self._to_beat) - torch.arange(self._seen, end, dtype=torch.float64)
        mean = -before / left
        room = self._bound - mean
        # Without room the exact rule decides; a bet that stops stays fair.
        open_ = room > 1e-9
        share = ((x - mean)[open_] / room[open_]).clamp(max=1.0)
        self._logs += torch.log1p(-_STAKES[:, None] * share).sum(dim=1)
        self._sum += float(x.sum())
        self._seen = end
        return float(torch.logsumexp(self._logs, 0)) - math.log(len(_STAKES))


def random_order(count: int, seed: int) -> Tensor:
    """Return a random order of `count` samples, (count,), for racing by confidence."""
    return torch.randperm(count, generator=generator(seed, "race"))


def hardest_first(scores: Tensor) -> Tensor:
    """Return the order (N,) of samples by rising mean score over models, for exact racing.

    Candidates differ from each other on the hard samples; with those first, the exact rule knows soon. Losses order
    better than right or wrong, of which many are equal.

    Args:
        scores: per-sample scores of the candidates on their own, (models, N); larger is better.
    """
    return scores.double().mean(dim=0).argsort(stable=True)


def in_order(batches: Sequence[Batch], order: Tensor, size: int) -> list[Batch]:
    """Return the samples of some batches (inputs, labels) in another order, as batches of `size`."""
    labels = torch.cat([batch[1] for batch in batches])
    if len(order) != len(labels):
        raise ConfigError(f"An order of {len(order)} samples does not fit a split of {len(labels)}.")
    parts = order.split(size)
    whole = [inputs if isinstance(inputs, Tensor) else dict(inputs) for inputs, _ in batches]
    if isinstance(whole[0], Tensor):
        rows = _rows([inputs for inputs in whole if isinstance(inputs, Tensor)], parts)
        return [(inputs, labels[part]) for inputs, part in zip(rows, parts, strict=True)]
    by_name = {
        name: _rows([inputs[name] for inputs in whole if not isinstance(inputs, Tensor)], parts) for name in whole[0]
    }
    return [({name: rows[k] for name, rows in by_name.items()}, labels[part]) for k, part in enumerate(parts)]


def _rows(tensors: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    joined = torch.cat(list(tensors))
    return [joined[part] for part in parts]


def network_samples(
    module: nn.Module,
    batches: Sequence[Batch],
    metric: Literal["accuracy", "loss"],
    device: torch.device | str = "cpu",
    ranks: int = 1,
) -> Blocks:
    """Return the blocks of a race: a network's per-sample scores, one forward pass a block.

    Args:
        module: the weights are loaded into it.
        batches: in the order of the race; the same on every rank.
        metric: "accuracy" gives 1 and 0 (ceiling 1), "loss" minus the cross-entropy (ceiling 0).
        device: where the module is.
        ranks: processes that share the work; a block is as many batches, and every rank takes the same decisions.
    """
    if metric not in ("accuracy", "loss"):
        raise ConfigError(f"metric={metric!r}: a race is over 'accuracy' or 'loss'.")

    def blocks(weights: Weights) -> Iterator[Tensor]:
        module.load_state_dict(weights)
        for begun in range(0, len(batches), ranks):
            part = batches[begun : begun + ranks]
            logits, labels = predict(module, part, device), torch.cat([labels for _, labels in part])
            yield right(logits, labels).double() if metric == "accuracy" else -losses(logits, labels)

    return blocks


def saving(steps: Sequence[Step]) -> float:
    """Return the share of all evaluations (candidates × samples) that the search did without.

    >>> saving([Step("a", 0.9, 0.9, -1.0, True), Step("b", 0.8, 0.7, 0.9, False, evaluated=0.2)])
    0.4
    """
    return 1 - math.fsum(step.evaluated for step in steps) / len(steps)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
