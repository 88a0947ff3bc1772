"""WARM: who is averaged, the average of existing reward models, the whole plan on small models, and features by layer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from soups.errors import ConfigError, WeightsError
from soups.launch.protocol import run_node
from soups.protocols import build_protocol, execute, in_sequence, perform
from soups.protocols.warm import average
from soups.protocols.warm.average import best_first
from soups.protocols.warm.features import layerwise
from soups.protocols.warm.plan import WarmStudy
from soups.protocols.warm.rewards import Rewards
from soups.protocols.warm.run import Warm, WarmConfiguration
from soups.seeding import generator
from soups.stores import open_store, write_safetensors
from soups.stores.pool import Pool
from soups.tasks.rated_texts import RatedText
from tests.devices import ACCELERATOR
from tests.launch.conftest import compose_settings
from tests.tiny_text import sentences, write_bert


def reward_model(folder: Path, seed: int, labels: int = 1) -> Path:
    """A tiny reward model, moved a little from a start that depends on nothing."""
    write_bert(folder, labels=labels)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(seed, number)))
    model.save_pretrained(folder)
    return folder


def test_existing_reward_models_are_averaged_into_one_that_trl_loads(tmp_path: Path) -> None:
    folders = [reward_model(tmp_path / str(seed), seed) for seed in range(3)]
    out = average(folders, tmp_path / "warm")
    # What TRL's trainers do with a reward model's path.
    model = AutoModelForSequenceClassification.from_pretrained(str(out), num_labels=1)
    members = [AutoModelForSequenceClassification.from_pretrained(folder).state_dict() for folder in folders]
    for name, tensor in model.state_dict().items():
        expected = torch.stack([member[name].double() for member in members]).mean(0)
        assert torch.allclose(tensor.double(), expected, atol=1e-7), name
    inputs = AutoTokenizer.from_pretrained(str(out))("the film was good", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 1)
    chosen = average(folders, scores=[0.5, 0.9, 0.7], keep=2)
    assert isinstance(chosen, Mapping)
    expected = (members[1]["classifier.weight"].double() + members[2]["classifier.weight"].double()) / 2
    assert torch.allclose(chosen["classifier.weight"].double(), expected, atol=1e-7)


def test_adapters_are_merged_before_they_are_averaged(tmp_path: Path) -> None:
    base = reward_model(tmp_path / "base", 0)
    name, products = "bert.encoder.layer.0.attention.self.query", []
    for seed in range(2):
        parts = [torch.randn(2, 16, generator=generator(seed, "A")), torch.randn(16, 2, generator=generator(seed, "B"))]
        (tmp_path / f"lora{seed}").mkdir()
        write_safetensors(
            tmp_path / f"lora{seed}" / "adapter_model.safetensors",
            {f"base_model.model.{name}.lora_{side}.weight": part for side, part in zip("AB", parts, strict=True)},
        )
        (tmp_path / f"lora{seed}" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
        products.append(2 * parts[1] @ parts[0])
    out = average([(base, tmp_path / "lora0"), (base, tmp_path / "lora1")], tmp_path / "warm")
    model = AutoModelForSequenceClassification.from_pretrained(str(out), num_labels=1)
    start = AutoModelForSequenceClassification.from_pretrained(base).state_dict()
    found = model.state_dict()
    assert torch.allclose(found[f"{name}.weight"], start[f"{name}.weight"] + sum(products) / 2, atol=1e-5)
    assert torch.equal(found["classifier.weight"], start["classifier.weight"])


def test_what_is_no_set_of_reward_models(tmp_path: Path) -> None:
    one, two = reward_model(tmp_path / "one", 0), reward_model(tmp_path / "two", 1, labels=2)
    with pytest.raises(WeightsError, match="two has 2 labels; a reward model has one"):
        average([one, two])
    other = reward_model(tmp_path / "other", 2)
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(WeightsError, match=r"other comes with another tokenizer than .*one: its token ids mean other"):
        average([one, other])
    larger = open_store(one).load()
    name = next(name for name in larger if name.endswith("word_embeddings.weight"))
    larger[name] = torch.cat([larger[name], larger[name][:1]])
    write_safetensors(tmp_path / "larger.safetensors", larger)
    with pytest.raises(
        WeightsError, match=r"1 mis-shaped \('\S+word_embeddings.weight': expected \(26, 16\), found \(27, 16\)"
    ):
        average([one, tmp_path / "larger.safetensors"])
    with pytest.raises(ConfigError, match="at least two reward models"):
        average([one])
    with pytest.raises(ConfigError, match="needs one held-out score for each of the 2"):
        average([one, one], keep=1)
    with pytest.raises(ConfigError, match="averages from 1 to 2 members here, not 3"):
        best_first([0.1, 0.2], 3)
    with pytest.raises(ConfigError, match=r"protocol\.study\.rates needs at least one value"):
        WarmStudy(rates=[]).check()


def test_the_median_and_the_mean_of_rewards() -> None:
    members = [Rewards({"test": torch.tensor([float(n), 1.0])}, torch.tensor([[float(n), 2.0]])) for n in (0, 1, 5)]
    assert Rewards.together(members).texts["test"].tolist() == [2.0, 1.0]
    assert Rewards.together(members, "median").texts["test"].tolist() == [1.0, 1.0]
    labels = torch.tensor([1])
    assert [one.agreement(labels, torch.tensor([True])) for one in members] == [1.0, 1.0, 0.0]
    assert members[0].agreement(labels, torch.tensor([False])) is None


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_feature_counts_by_p_in_the_ensemble_and_by_its_power_in_the_average(layers: int) -> None:
    chances = [0.25, 0.5, 0.75, 1.0]
    measured = layerwise(layers, chances, members=200)
    for chance, together, averaged in zip(chances, measured["ensemble"], measured["average"], strict=True):
        assert together == pytest.approx(chance, abs=0.03)
        assert averaged == pytest.approx(chance**layers, abs=0.05)


def rated(domain: str) -> tuple[RatedText, ...]:
    """Made ratings: good sentences around 2, bad ones around −2, a few raters in doubt."""
    rows = dict(sentences(900, seed=len(domain)))
    sign = {"pos": 1, "neg": -1}
    return tuple(
        RatedText(f"{number}_1", text, (*(sign[label] * (1 + (number + k) % 3) for k in range(9)), 0))
        for number, (text, label) in enumerate(rows.items())
    )


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Warm:
    monkeypatch.setenv("SOUPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("soups.tasks.preferences.rated_texts", rated)
    settings = compose_settings([
        "+protocol=warm", f"model.name={write_bert(tmp_path / 'bert')}", "model.freeze_embeddings=false", "model.freeze_layers=0", "model.cache_frozen=false",
        "tracking=off",
        "data.train=40", "data.pairs_per_text=1", "data.heldout=24", "data.test=20", "loader.size=12", "loader.batch_size=8",
        "protocol.study.members=3", "protocol.study.keep=2", "protocol.study.points=2", "protocol.candidates=40",
        "protocol.ood_texts=20", "protocol.sizes=[1,4]", "protocol.trajectory.pairs=24", "protocol.control.pairs=24",
        "protocol.study.rates=[1e-20,2e-3]", "protocol.study.layers=[2]", f"trainer.accelerator={ACCELERATOR}", "trainer.threads=1",
        "optimizer.lr=1e-3", f"pool.path={tmp_path}/pool", f"paths.output={tmp_path}/out",
    ])  # fmt: skip
    built = build_protocol(settings)
    assert isinstance(built, Warm)
    return built


def test_the_whole_plan(program: Warm, tmp_path: Path) -> None:
    pool, plan, found = Pool(tmp_path / "pool"), program.plan(), program.nodes
    assert execute(plan, pool, in_sequence(pool, program.operations())) == {}
    assert plan.waves(pool) == [], "nothing is done twice"
    points = pool.weights(found.trajectory.fingerprint)
    assert {name.partition("/")[0] for name in points} == {"0", "1"}
    assert any(not torch.equal(points[f"0/{name[2:]}"], tensor) for name, tensor in points.items() if name[0] == "1")
    for group in found.groups:
        weights = [pool.weights(node.fingerprint) for node in group.members]
        head = pool.weights(group.head.fingerprint)
        # A member that hardly learns stays where it starts: at its point of the trajectory, with the shared head.
        still = weights[0]
        for name, tensor in still.items():
            start = head.get(name, points.get(f"0/{name}"))
            assert torch.allclose(tensor, start, atol=1e-6), name
        assert not torch.equal(weights[1]["classifier.weight"], head["classifier.weight"])
        accuracies = [pool.ingredient(node.fingerprint).heldout() for node in group.members]
        kept = best_first(accuracies, 2)
        warm = pool.weights(group.warm.fingerprint)
        for name, tensor in warm.items():
            expected = (weights[kept[0]][name].double() + weights[kept[1]][name].double()) / 2
            assert torch.allclose(tensor.double(), expected, atol=1e-7), name
        page = program.page(plan, pool)
        rows = {(row[0], row[1]): row for row in page.parts[0].rows}  # type: ignore[union-attr]
        title = f"{group.share:.0%}"
        assert rows[title, "best single"][2] == 100 * max(accuracies)
        singles = [rows[title, f"member {number}"][3] for number in (1, 2, 3)]
        assert rows[title, "mean of members"][3] == pytest.approx(sum(singles) / 3)
    assert "With 25% of the labels swapped, WARM orders" in page.summary
    program.export(plan, pool, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "reward_model_25", num_labels=1)
    assert torch.equal(model.state_dict()["classifier.weight"], warm["classifier.weight"])
    assert json.loads((tmp_path / "out/reward_model_25/config.json").read_text())["architectures"] is not None


def test_what_decides_a_node(program: Warm) -> None:
    """The number kept changes averages and their scores alone; swapped labels leave the trajectory as it is."""
    plan = program.plan()

    def other(**study: Any) -> Warm:
        settings = program.configuration.plain()
        settings["protocol"]["study"] |= study
        return Warm(WarmConfiguration.model_validate(settings))

    changed = [node.operation for name, node in other(keep=3).plan().nodes.items() if name not in plan.nodes]
    assert sorted(changed) == ["rewards", "rewards", "warm", "warm"]
    kept = {node.operation for name, node in other(swapped=[0.1]).plan().nodes.items() if name in plan.nodes}
    assert kept == {"trajectory", "control", "features", "rewards"}
    settings = program.configuration.plain()
    settings["protocol"]["sizes"] = [64]
    with pytest.raises(ConfigError, match=r"needs numbers up to protocol\.candidates=40"):
        Warm(WarmConfiguration.model_validate(settings))


@pytest.mark.slow
def test_a_member_on_two_processes_is_the_member_on_one(tmp_path: Path) -> None:
    """Real ratings; the fit runs as a program of its own under DDP, in the same pool layout and with the same name."""
    base = [
        "+protocol=warm", f"model.name={write_bert(tmp_path / 'bert', labels=1)}", "model.freeze_layers=0", "model.cache_frozen=false", "tracking=off",
        "data.train=32", "data.pairs_per_text=1", "data.heldout=16", "data.test=10", "loader.size=12", "loader.batch_size=8",
        "protocol.study={members: 1, keep: 1, swapped: [0.25], rates: [1e-3], dropouts: [0.0], points: 0, layers: []}",
        "protocol.candidates=20", "protocol.ood_texts=10", "protocol.sizes=[1]", f"trainer.accelerator={ACCELERATOR}",
        "trainer.threads=1", f"paths.output={tmp_path}/out",
    ]  # fmt: skip
    found: dict[int, dict[str, torch.Tensor]] = {}
    for devices in (1, 2):
        more = [f"trainer.devices={devices}", f"pool.path={tmp_path}/{devices}"]
        more += ["trainer.strategy=ddp"] if devices == 2 else []
        settings = compose_settings([*base, *more])
        program, pool = build_protocol(settings), Pool(tmp_path / str(devices))
        assert isinstance(program, Warm)
        group = program.nodes.groups[0]
        perform(group.head, pool, program.operations())
        run_node(settings, group.members[0].fingerprint)
        found[devices] = pool.weights(group.members[0].fingerprint)
        head = pool.weights(group.head.fingerprint)
    start = {**AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").state_dict(), **head}

    def distance(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> float:
        return float(sum((one[name] - two[name]).double().square().sum() for name in found[1])) ** 0.5

    # AdamW turns rounding into steps where gradients are near zero, so the two agree up to a small part of the way.
    assert distance(found[1], start) > 0.02
    assert distance(found[1], found[2]) < 0.05 * distance(found[1], start)
