"""Which poisoned contributions move the base, under which policy. One attacker among five contributors.

The honest updates lie in [0.9, 1.1] in every coordinate, so an attack has failed when the fused update lies there too
(median, trimmed mean, screening), or within what one honest-sized update can do (clipping).
"""

from pathlib import Path

import pytest
import torch

from soups.protocols.cold_fusion import Policy, Repository, Round, replay
from soups.protocols.cold_fusion.objects import dump_record, put_weights
from soups.protocols.cold_fusion.records import Contribution
from soups.seeding import generator
from soups.stores.shared import SharedFolder

SIZE, HONEST = 400, 4


def honest(number: int) -> torch.Tensor:
    return 0.9 + 0.2 * torch.rand(SIZE, generator=generator(0, "honest", number))


def attack(name: str) -> torch.Tensor:
    if name == "backdoor":  # model replacement: a wanted change, scaled so that it survives the averaging
        return 50 * torch.randn(SIZE, generator=generator(0, "backdoor"))
    if name == "sign-flipped":
        return -honest(99)
    return torch.full((SIZE,), float("nan"))


def run(place: Path, name: str, **policy) -> tuple[torch.Tensor, Round]:
    repository = Repository.create(place, {"w": torch.zeros(SIZE)}, Policy(quorum=HONEST, **policy))
    for number in range(HONEST):
        repository.push({"w": honest(number)}, 0, f"honest {number}")
    # An attacker does not go through our push, which checks.
    weights, nbytes = put_weights(SharedFolder(str(place)), {"w": attack(name)})
    record = Contribution(
        id=f"{name}-attacker", contributor="attacker", base=repository.current().hash, weights=weights, nbytes=nbytes
    )
    repository.folder.create(f"pushed/{record.id}.json", dump_record(record))
    fused = repository.fuse()
    assert fused is not None and all(result.same for result in replay(repository))
    return repository.pull()[1]["w"], fused


def inside(update: torch.Tensor) -> bool:
    return bool((update >= 0.9).all() and (update <= 1.1).all())


CASES = [
    # policy, and the attacks it stops
    ({"method": "linear", "max_norm": None}, {"NaN"}),
    ({"method": "linear", "max_norm": 4.0}, {"NaN", "backdoor"}),
    ({"method": "median", "max_norm": None}, {"NaN", "backdoor", "sign-flipped"}),
    ({"method": "trimmed_mean", "parameters": {"trim": 0.2}, "max_norm": None}, {"NaN", "backdoor", "sign-flipped"}),
]


@pytest.mark.parametrize("name", ["NaN", "backdoor", "sign-flipped"])
@pytest.mark.parametrize(("policy", "stops"), CASES, ids=["mean", "screened mean", "median", "trimmed mean"])
def test_what_stops_what(policy: dict, stops: set[str], name: str, tmp_path: Path) -> None:
    update, record = run(tmp_path / "repo", name, **policy)
    assert inside(update) == (name in stops)
    verdict = next(verdict for verdict in record.verdicts if verdict.contributor == "attacker")
    refused = name == "NaN" or (name == "backdoor" and policy["max_norm"] is not None)
    assert verdict.accepted != refused
    if refused:
        expected = torch.stack([honest(number).double() for number in range(HONEST)]).mean(0).float()
        same = torch.equal(update, expected) if policy["method"] == "linear" else inside(update)
        assert same, "the others are fused as if it had never come"
    if name == "backdoor" and refused:
        assert "times the median; 4 is the most" in verdict.reason


@pytest.mark.parametrize("name", ["backdoor", "sign-flipped"])
def test_clipping_bounds_what_one_contributor_can_do(name: str, tmp_path: Path) -> None:
    """|θ − honest mean of five| ≤ 2 c ‖median‖ / 5 in L2: the attacker weighs at most as much as an honest one."""
    update, record = run(tmp_path / "repo", name, method="linear", max_norm=None, clip=1.0)
    norms = sorted(float(honest(number).double().norm()) for number in range(HONEST))
    verdict = next(verdict for verdict in record.verdicts if verdict.contributor == "attacker")
    bound = 2 * norms[-1] / 5 * 1.0001
    mean = torch.stack([honest(number) for number in range(HONEST)]).mean(0)
    assert float((update - mean).norm()) <= bound
    if name == "backdoor":
        assert (
            verdict.scale == pytest.approx(norms[2] / float(attack(name).double().norm()), rel=1e-6)
            or verdict.scale < 0.1
        )
    assert not inside(update), "it is bounded, not removed: for that use the median"


def test_in_a_round_of_two_the_larger_does_not_speak_for_itself(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "repo", {"w": torch.zeros(SIZE)}, Policy(quorum=1, max_norm=4.0))
    repository.push({"w": honest(0)}, 0, "honest")
    repository.push({"w": attack("backdoor")}, 0, "attacker")
    record = repository.fuse()
    assert record is not None and [v.contributor for v in record.accepted] == ["honest"]
    # Alone in its round, it is measured by the round before.
    repository.push({"w": repository.pull()[1]["w"] + attack("backdoor")}, 1, "attacker")
    assert repository.fuse() is None and len(repository.pending()) == 1


def test_the_held_out_check_refuses_what_scores_worse(tmp_path: Path) -> None:
    """A sign-flipped update has the usual norm; a held-out score sees it, and the mean is then the honest one."""
    policy = Policy(quorum=HONEST, tolerance=0.05)
    repository = Repository.create(tmp_path / "repo", {"w": torch.zeros(SIZE)}, policy)
    for number in range(HONEST):
        repository.push({"w": honest(number)}, 0, f"honest {number}")
    repository.push({"w": attack("sign-flipped")}, 0, "attacker")
    target = torch.ones(SIZE)
    record = repository.fuse(score=lambda weights: -float((weights["w"] - target).abs().mean()))
    assert record is not None
    (refused,) = [verdict for verdict in record.verdicts if not verdict.accepted]
    assert refused.contributor == "attacker" and "held-out score -1.998, the base has -1" in refused.reason
    assert inside(repository.pull()[1]["w"]) and all(result.same for result in replay(repository))
