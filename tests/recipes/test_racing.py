"""Racing ends in the soups of full evaluation: always by the exact rule, with the stated probability by confidence."""

import itertools
import math

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as processes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from soups.errors import ConfigError
from soups.evaluation.scores import predict
from soups.evaluation.statistics import best_single, losses, right, selection_effect
from soups.recipes import Candidate, greedy, uniform
from soups.recipes.racing import Race, _Bet, hardest_first, in_order, network_samples, random_order, saving
from soups.recipes.replay import only_tried, replay


class Problem:
    """A pool of linear classifiers, each the true one with noise of its own, and a held-out split."""

    def __init__(self, seed: int, models: int = 8, count: int = 300, spread: float = 0.3) -> None:
        source = torch.Generator().manual_seed(seed)
        self.truth = torch.randn(3, 6, generator=source)
        self.inputs = torch.randn(count, 6, generator=source)
        self.labels = (self.inputs @ self.truth.T + 0.5 * torch.randn(count, 3, generator=source)).argmax(1)
        noise = spread * (0.2 + torch.rand(models, generator=source))[:, None, None]
        self.models = self.truth + noise * torch.randn(models, 3, 6, generator=source)

    def samples(self, weights, metric: str) -> torch.Tensor:
        logits = self.inputs @ weights["w"].T
        return right(logits, self.labels).double() if metric == "accuracy" else -losses(logits, self.labels)

    def pool(self, metric: str) -> list[Candidate]:
        return [
            Candidate(f"m{number}", float(self.samples({"w": w}, metric).mean()), lambda w=w: {"w": w})
            for number, w in enumerate(self.models)
        ]

    def own(self, metric: str) -> torch.Tensor:
        return torch.stack([self.samples({"w": w}, metric) for w in self.models])

    def blocks(self, metric: str, order: torch.Tensor, size: int = 16):
        return lambda weights: (self.samples(weights, metric)[part] for part in order.split(size))


CEILING = {"accuracy": 1.0, "loss": 0.0}


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    metric=st.sampled_from(["accuracy", "loss"]),
    ties=st.sampled_from(["paper", "official"]),
    size=st.integers(1, 60),
    hardest=st.booleans(),
)
def test_the_exact_rule_changes_nothing(seed: int, metric: str, ties: str, size: int, hardest: bool) -> None:
    problem = Problem(seed, count=120)
    order = hardest_first(problem.own("loss")) if hardest else random_order(120, seed)
    race = Race(problem.blocks(metric, order, size), CEILING[metric])
    full = greedy(problem.pool(metric), race.__call__, ties)
    raced = greedy(problem.pool(metric), race, ties)
    assert raced.members == full.members
    assert raced.score == full.score
    assert torch.equal(raced.weights["w"], full.weights["w"])
    for quick, whole in zip(raced.steps, full.steps, strict=True):
        assert (quick.name, quick.kept, quick.to_reach) == (whole.name, whole.kept, whole.to_reach)
        if quick.evaluated == 1:
            assert quick.soup_score == whole.soup_score
        else:
            assert not quick.kept and quick.soup_score <= quick.to_reach
    assert saving(full.steps) == 0 <= saving(raced.steps)


def test_the_exact_rule_stops_where_counting_says() -> None:
    """To reach: 9 of 10. With blocks of one, the candidate is out at its second error; strictly better, at its first."""
    order = torch.tensor([[1.0] * 9 + [0.0], [1.0, 0.0, 1.0, 0.0] + [1.0] * 6])
    read: list[int] = []

    def blocks(weights):
        row = order[int(weights["row"])]
        for number, value in enumerate(row):
            read.append(number)
            yield value[None]

    for ties, expected in (("paper", 4), ("official", 2)):
        race = Race(blocks, 1.0)
        assert race.decide({"row": torch.tensor(0)}, -math.inf, ties).kept
        read.clear()
        trial = race.decide({"row": torch.tensor(1)}, 0.9, ties)
        assert len(read) == expected and trial.evaluated == expected / 10 and not trial.kept
        assert trial.score == pytest.approx(0.9 - (2 if ties == "paper" else 1) / 10)


def test_hardest_first_saves_more_than_chance() -> None:
    problems = [Problem(seed, models=12, count=1000) for seed in range(6)]

    def mean_saving(order_of) -> float:
        shares = []
        for seed, problem in enumerate(problems):
            race = Race(problem.blocks("accuracy", order_of(seed, problem), 20), 1.0)
            shares.append(saving(greedy(problem.pool("accuracy"), race).steps))
        return sum(shares) / len(shares)

    by_chance = mean_saving(lambda seed, problem: random_order(1000, seed))
    by_hardness = mean_saving(lambda seed, problem: hardest_first(problem.own("loss")))
    assert 0 < by_chance < by_hardness
    assert by_hardness > 0.2


def test_capital_is_fair_on_the_edge_of_being_kept() -> None:
    """Over all orders of five samples with a sum of zero, the mean capital is 1 after every step."""
    x = [1.0, -1.0, 0.0, 1.0, -1.0]
    to_beat = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    totals = torch.zeros(4, dtype=torch.float64)
    orders = list(itertools.permutations(range(5)))
    for order in orders:
        bet = _Bet(to_beat[list(order)], 1.0)
        for step in range(4):
            number = order[step]
            totals[step] += math.exp(bet.add([x[number] + float(to_beat[number])])) / len(orders)
    # Where the remaining mean cannot be exceeded the bet stops, which keeps it fair.
    assert torch.allclose(totals, torch.ones(4, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_racing_by_confidence_is_seldom_wrong_and_saves(metric: str) -> None:
    """Candidates exactly as good as the one to beat, so that each would be kept: the worst case for the error."""
    delta, wrong, runs = 0.2, 0, 250
    source = torch.Generator().manual_seed(5)
    for run in range(runs):
        to_beat = torch.zeros(400, dtype=torch.float64)
        if metric == "accuracy":
            to_beat[:300] = 1
            candidate = to_beat.clone()
            candidate[260:340] = 1 - candidate[260:340]  # 40 lost, 40 gained
        else:
            to_beat = -torch.rand(400, generator=source, dtype=torch.float64).pow(3)
            candidate = to_beat[torch.randperm(400, generator=source)]
        order = random_order(400, run)
        table = {0: to_beat[order], 1: candidate[order]}
        race = Race(lambda weights, table=table: table[int(weights["row"])].split(20), CEILING[metric], delta, 1)
        first = race.decide({"row": torch.tensor(0)}, -math.inf, "paper")
        wrong += race.decide({"row": torch.tensor(1)}, first.score, "paper").evaluated < 1
    # At most delta on average; three standard deviations of that many runs above it.
    assert wrong / runs <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)
    assert wrong > 0, "a bound that is never reached would be needlessly wide"


def test_confidence_drops_what_is_clearly_worse_much_earlier() -> None:
    problem = Problem(3, models=6, count=4000)
    bad = torch.randn(10, 3, 6, generator=torch.Generator().manual_seed(0))
    problem.models = torch.cat([problem.models, problem.truth + 6 * bad])
    order = random_order(4000, 0)
    exact = greedy(problem.pool("accuracy"), Race(problem.blocks("accuracy", order, 40), 1.0))
    quick = greedy(problem.pool("accuracy"), Race(problem.blocks("accuracy", order, 40), 1.0, 0.05, 16))
    assert quick.members == exact.members
    assert saving(quick.steps) > saving(exact.steps) + 0.1


def test_mistakes() -> None:
    blocks = Problem(0).blocks("accuracy", torch.arange(300))
    with pytest.raises(ConfigError, match=r"delta=1\.5"):
        Race(blocks, 1.0, 1.5)
    with pytest.raises(ConfigError, match="trials=0"):
        Race(blocks, 1.0, 0.1, 0)
    with pytest.raises(ConfigError, match=r"above the ceiling of the race, 0\.5"):
        Race(blocks, 0.5)({"w": Problem(0).truth})
    with pytest.raises(ConfigError, match="of another one"):
        Race(blocks, 1.0).decide({"w": Problem(0).truth}, 0.5, "paper")
    with pytest.raises(ConfigError, match="does not fit a split of 4"):
        in_order([(torch.zeros(4, 1), torch.zeros(4))], torch.arange(3), 2)
    with pytest.raises(ConfigError, match="over 'accuracy' or 'loss'"):
        network_samples(nn.Identity(), [], "auc")  # type: ignore[arg-type]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def race_of(problem: Problem, metric: str, ranks: int) -> tuple[Race, list[Candidate]]:
    module = network()
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    pool = []
    batches = list(zip(problem.inputs.split(64), problem.labels.split(64), strict=True))
    own = []
    for number in range(6):
        source = torch.Generator().manual_seed(number)
        weights = {
            name: t + 0.3 * torch.randn(t.shape, generator=source) if t.is_floating_point() and t.ndim == 2 else t
            for name, t in start.items()
        }
        module.load_state_dict(weights)
        own.append(-losses(predict(module, batches), problem.labels))
        value = float(right(predict(module, batches), problem.labels).double().mean())
        pool.append(Candidate(f"m{number}", value, lambda weights=weights: weights))
    order = hardest_first(torch.stack(own))
    blocks = network_samples(module, in_order(batches, order, 10), metric, ranks=ranks)  # type: ignore[arg-type]
    return Race(blocks, CEILING[metric]), pool


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_a_network_races_to_the_soup_of_plain_scores(metric: str) -> None:
    problem = Problem(1)
    race, pool = race_of(problem, metric, 1)
    module = network()
    whole = [(problem.inputs, problem.labels)]

    def plain(weights) -> float:
        module.load_state_dict(weights)
        logits = predict(module, whole)
        return float(right(logits, problem.labels).double().mean()) if metric == "accuracy" else -float(
            losses(logits, problem.labels).mean()
        )  # fmt: skip

    raced, full = greedy(pool, race), greedy(pool, plain)
    assert raced.members == full.members and raced.score == pytest.approx(full.score, rel=1e-6)
    assert saving(raced.steps) > 0
    assert uniform(pool, race).score == pytest.approx(uniform(pool, plain).score, rel=1e-6), "a race is a score too"


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    race, pool = race_of(Problem(1), "accuracy", world)
    soup = greedy(pool, race)
    torch.save((soup.members, soup.score, [step.evaluated for step in soup.steps], soup.weights), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_race_together_to_the_same_bits(tmp_path) -> None:
    processes.start_processes(_rank, args=(2, str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    race, pool = race_of(Problem(1), "accuracy", 1)
    alone = greedy(pool, race)
    for members, score, shares, weights in (first, second):
        assert members == alone.members and score == alone.score
        assert all(torch.equal(weights[name], tensor) for name, tensor in alone.weights.items())
        assert shares == first[2] and min(shares) < 1, "both ranks stop at the same block"


def test_replayed_greedy_is_greedy() -> None:
    """On all samples the replay chooses the soup that greedy builds from weights; on part of them, greedy of that part."""
    problem = Problem(2)
    own, names = problem.own("accuracy"), [f"m{k}" for k in range(8)]
    asked: list[int] = []

    def evaluate(coefficients) -> torch.Tensor:
        asked.append(len(coefficients))
        mean = sum(value * problem.models[int(name[1:])] for name, value in coefficients.items())
        return problem.samples({"w": mean}, "accuracy")

    select = replay(greedy, names, own, evaluate)
    everything = torch.arange(300)
    soup = greedy(problem.pool("accuracy"), lambda weights: float(problem.samples(weights, "accuracy").mean()))
    assert torch.equal(select(everything), problem.samples(soup.weights, "accuracy"))
    before = len(asked)
    select(everything)
    assert len(asked) == before and min(asked) > 1, "each average is evaluated once, single models never"
    part = everything[::3]
    pool = [
        Candidate(n, float(o[part].mean()), lambda w=w: {"w": w})
        for n, o, w in zip(names, own, problem.models, strict=True)
    ]
    on_part = greedy(pool, lambda weights: float(problem.samples(weights, "accuracy")[part].mean()))
    assert torch.equal(select(part), problem.samples(on_part.weights, "accuracy"))


def test_knowing_only_the_tried_soups_bars_the_others() -> None:
    problem = Problem(2)
    own, names = problem.own("accuracy"), [f"m{k}" for k in range(8)]
    select = replay(greedy, names, own, only_tried({frozenset({"m0", "m1"}): torch.ones(300)}))
    chosen = select(torch.arange(300))
    best = own[int(own.mean(1).argmax())]
    assert torch.equal(chosen, best.double()) or bool((chosen == 1).all())
    barred = replay(greedy, names, own, only_tried({frozenset({"no", "body"}): torch.ones(300)}))
    effect = selection_effect(barred, 300, rounds=40)
    assert effect == selection_effect(best_single(own), 300, rounds=40), "with every soup barred, greedy is best single"
    with pytest.raises(ConfigError, match="do not fit the scores"):
        replay(greedy, names[:3], own, only_tried({frozenset(names): torch.ones(300)}))
