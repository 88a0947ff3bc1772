"""Rewarded soups: interpolation, exact policy values, and the whole plan on small policies."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soups.errors import ConfigError, WeightsError
from soups.protocols import build_protocol, execute, in_sequence
from soups.protocols.rewarded_soups import interpolate
from soups.protocols.rewarded_soups.plan import RewardedStudy
from soups.protocols.rewarded_soups.run import RewardedSoups
from soups.stores.pool import Pool
from soups.tasks.policies import choices, policy_values
from tests.devices import ACCELERATOR
from tests.launch.conftest import compose_settings
from tests.protocols.test_warm import rated
from tests.tiny_text import write_bert


@given(share=st.floats(0, 1), seed=st.integers(0, 50))
def test_interpolation_is_the_formula(share: float, seed: int) -> None:
    first, second = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    found = interpolate([{"w": first}, {"w": second}], [share, 1 - share])["w"]
    assert torch.equal(found, (share * first.double() + (1 - share) * second.double()).float())
    assert torch.equal(interpolate([{"w": first}, {"w": first}], [share, 1 - share])["w"], first)


def test_interpolation_mistakes() -> None:
    with pytest.raises(ConfigError, match="as many shares with the sum 1"):
        interpolate([{"w": torch.zeros(1)}, {"w": torch.zeros(1)}], [0.5, 0.6])
    with pytest.raises(WeightsError, match="model 2"):
        interpolate([{"w": torch.zeros(1)}, {"w": torch.zeros(2)}], [0.5, 0.5])
    with pytest.raises(ConfigError, match="the ends left out"):
        RewardedStudy(shares=[0.0, 0.5]).check()


def test_policy_values_are_what_sampling_gives() -> None:
    scores, rewards = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    reward, divergence = policy_values(scores, rewards)
    shares = scores.softmax(1)
    drawn = torch.multinomial(shares, 100000, replacement=True, generator=torch.Generator().manual_seed(1))
    assert float(reward) == pytest.approx(float(rewards.gather(1, drawn).mean()), abs=0.01)
    ratio = (shares * 5).log().gather(1, drawn)
    assert float(divergence) == pytest.approx(float(ratio.mean()), abs=0.01)


def test_choices_are_distinct_and_seeded() -> None:
    sets = choices(20, 50, 4, 0)
    assert sets.shape == (50, 4) and all(len(set(row)) == 4 for row in sets.tolist())
    assert torch.equal(sets, choices(20, 50, 4, 0)) and not torch.equal(sets, choices(20, 50, 4, 1))


def test_the_whole_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("soups.tasks.preferences.rated_texts", rated)
    settings = compose_settings([
        "+protocol=rewarded_soups", f"model.name={write_bert(tmp_path / 'bert', layers=2)}", "model.freeze_embeddings=false",
        "model.freeze_layers=1", "tracking=off", "loader.size=12", "loader.batch_size=16", "protocol.texts=200",
        "protocol.test_texts=100", "protocol.study.shares=[0.5]", "protocol.study.multi_objective=[0.5]",
        "protocol.study.choices=320", "protocol.test_choices=1000", "protocol.study.kl=0", "trainer.max_epochs=4",
        "optimizer.lr=5e-3", f"trainer.accelerator={ACCELERATOR}", "trainer.threads=1", f"pool.path={tmp_path}/pool",
        f"paths.output={tmp_path}/out",
    ])  # fmt: skip
    program = build_protocol(settings)
    assert isinstance(program, RewardedSoups)
    pool, plan, found = Pool(tmp_path / "pool"), program.plan(), program.nodes
    assert execute(plan, pool, in_sequence(pool, program.operations())) == {}
    first, second = (node.inputs[0] for node in found.ends)
    ends = [pool.weights(node.fingerprint) for node in (first, second)]
    middle = pool.weights(found.soups[0.5, 0.5].inputs[0].fingerprint)
    for name, tensor in middle.items():
        assert torch.equal(tensor, ((ends[0][name].double() + ends[1][name].double()) / 2).float())
        assert "encoder.layer.0." not in name, "the lower layer is frozen"
    page = program.page(plan, pool)
    rows = {row[0]: row for row in page.parts[0].rows}  # type: ignore[union-attr]
    # Each policy raises its own reward above the start's, and above what the other one reaches.
    assert rows["λ = 1"][2] > rows["start"][2] + 0.3 and rows["λ = 1"][2] > rows["λ = 0"][2]
    assert rows["λ = 0"][3] > rows["start"][3] + 0.3 and rows["λ = 0"][3] > rows["λ = 1"][3]
    assert rows["λ = 0.5"][4] == pytest.approx((rows["λ = 1"][2] + rows["λ = 0"][2]) / 2)
    assert "interpolated models are on or above the straight line" in page.summary
