"""Preferences: the Bradley-Terry loss, the probe of a reward, honest pairs, and files whose mistakes are named by line."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from soups.errors import ConfigError, DataError
from soups.evaluation import forward, predict
from soups.launch.settings import open_pool
from soups.seeding import generator
from soups.tasks.images import TensorImages
from soups.tasks.preferences import CLASSES, Pairs, pair_files, pair_up, preferences
from soups.tasks.probe import head_inputs, linear_probe
from soups.tasks.rated_texts import RatedText
from soups.tasks.reward_models import reward_model
from soups.tasks.texts import Texts
from tests.devices import ACCELERATOR
from tests.launch.conftest import compose_settings, fine_tune
from tests.tiny_text import sentences, write_bert


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setenv("SOUPS_CACHE", str(tmp_path / "cache"))


def made_pairs(count: int, seed: int = 0) -> Pairs:
    """Good against bad sentences, in either order."""
    rows = sentences(2 * count, seed)
    bad, good = [text for text, _ in rows[0::2]], [text for text, _ in rows[1::2]]
    second = torch.rand(count, generator=generator(seed, "which")) < 0.5
    shown = [(one, two) if turn else (two, one) for one, two, turn in zip(bad, good, second.tolist(), strict=True)]
    return Pairs([one for one, _ in shown], [two for _, two in shown], second.long())


def test_cross_entropy_over_two_rewards_is_bradley_terry(tmp_path: Path) -> None:
    network = reward_model(str(write_bert(tmp_path)))
    network.module.eval()
    pairs = made_pairs(6)
    batch, labels = network.input.dataset(pairs, 16)[[(0, i) for i in range(6)]]
    assert batch["input_ids"].ndim == 3 and batch["input_ids"].shape[:2] == (6, 2)
    logits = forward(network.module, batch)
    loss = functional.cross_entropy(logits, labels)
    alone = {
        name: predict(network.module, [network.input.dataset(Texts(texts, [0] * 6), 16)[[(0, i) for i in range(6)]]])[
            :, 0
        ]
        for name, texts in (("first", pairs.first), ("second", pairs.second))
    }
    sign = 1 - 2 * labels
    expected = -functional.logsigmoid(sign * (alone["first"] - alone["second"])).mean()
    assert torch.allclose(loss, expected, atol=1e-6)


def test_the_probe_of_a_reward_is_logistic_regression_on_differences(tmp_path: Path) -> None:
    network = reward_model(str(write_bert(tmp_path, layers=2)))
    train, heldout = made_pairs(150), made_pairs(60, seed=1)
    batches = [[network.input.dataset(pairs, 16)[[(0, i) for i in range(len(pairs))]]] for pairs in (train, heldout)]
    features, _ = head_inputs(network, batches[0], torch.device("cpu"))
    probe = linear_probe(network, *batches, len(CLASSES))
    assert features.shape == (150, 16)
    logits = predict(network.module, batches[1])
    accuracy = float((logits.argmax(1) == heldout.labels).float().mean())
    assert accuracy == pytest.approx(probe.heldout_accuracy) and accuracy > 0.7
    difference = predict(network.module, batches[0])
    expected = torch.from_numpy(features) @ network.linear().weight[0].detach()
    assert torch.allclose(difference[:, 0] - difference[:, 1], expected, atol=1e-3 * float(expected.abs().max()))
    assert network.linear().bias.tolist() == [0.0]


def rated(count: int) -> list[RatedText]:
    """Texts of which every rater but one gives the same score."""
    return [RatedText(str(number), f"text {number}", ((number % 9) - 4,) * 9 + (0,)) for number in range(count)]


def test_pairs_are_honest() -> None:
    texts = rated(400)
    means = {one.text: one.mean for one in texts}
    clean = pair_up(texts, 100, 0.5, False, 0.0, 0, "test")
    assert torch.equal(clean.labels, clean.truth) and len(set(clean.first + clean.second)) == 200
    for first, second, label in zip(clean.first, clean.second, clean.labels.tolist(), strict=True):
        assert abs(means[first] - means[second]) >= 0.5 and label == int(means[second] > means[first])
    assert 30 < int(clean.labels.sum()) < 70, "either place can hold the preferred text"
    noisy = pair_up(texts, 100, 0.5, True, 0.25, 0, "test")
    assert int(noisy.swapped.sum()) == 25
    unswapped = torch.where(noisy.swapped, 1 - noisy.labels, noisy.labels)
    assert 0 < int((unswapped != noisy.truth).sum()) < 25, "one rater in ten errs"
    assert pair_up(texts, 100, 0.5, True, 0.25, 0, "test").digest() == noisy.digest()
    assert pair_up(texts, 100, 0.5, True, 0.25, 1, "test").digest() != noisy.digest()
    with pytest.raises(DataError, match="500 pairs are asked for, but its 400 texts give only"):
        pair_up(texts, 500, 0.5, False, 0.0, 0, "test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"chosen": "a", "rejected": "a"}', "line 2: the chosen and the rejected text are the same"),
        ('{"chosen": "a"}', "line 2: there is no 'rejected'"),
        ('{"chosen": ["a"], "rejected": "b"}', "line 2: 'chosen' is \\['a'\\]; it must be some words"),
        ('{"chosen": "a", "rejected": " "}', "line 2: 'rejected' is ' '"),
        ('{"chosen": "a", "rejected": "b"', "line 2: this is no JSON"),
    ],
)
def test_mistakes_in_pair_files(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"chosen": "good", "rejected": "bad"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        pair_files(str(path), str(path), str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"pairs\.csv is empty"),
        ("chosen,rejected\n", r"pairs\.csv holds no pairs"),
        ("chosen,rejekted\ngood,bad\n", r"line 2: there is no 'rejected': did you mean 'rejekted'"),
        ("chosen,rejected\ngood,bad\ngood\n", r"line 3: there is no 'rejected'"),
        ("chosen,rejected\ngood,bad\ngood,bad,dull\n", r"line 3: more fields than the 2 columns"),
        ('chosen,rejected\ngood,bad\n"fine,dull\n', r"line 3: unexpected end of data"),
        ("chosen,rejected\ngood,bad\nfine,\n", r"line 3: 'rejected' is ''; it must be some words"),
    ],
)
def test_mistakes_in_tables_of_pairs(content: str, message: str, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.csv", tmp_path / "pairs.csv"
    whole.write_text("chosen,rejected\ngood,bad\n")
    path.write_text(content)
    for files in ((path, whole, whole), (whole, path, whole), (whole, whole, path)):
        with pytest.raises(DataError, match=message):
            pair_files(*map(str, files))


def test_other_data_are_refused(tmp_path: Path) -> None:
    network = reward_model(str(write_bert(tmp_path)))
    images = TensorImages(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="reads pairs of texts, but the data are TensorImages"):
        network.input.dataset(images, 8)
    with pytest.raises(ConfigError, match="the data have 3 classes"):
        reward_model(str(tmp_path), 3)


def test_a_reward_model_is_fine_tuned_by_the_main_job(tmp_path: Path) -> None:
    """From a file of preferences to an ingredient that transformers loads as a reward model."""
    for name, seed in (("train", 0), ("heldout", 1)):
        pairs = made_pairs(80, seed)
        rows = [
            {"chosen": (one, two)[label], "rejected": (one, two)[1 - label]}
            for one, two, label in zip(pairs.first, pairs.second, pairs.labels.tolist(), strict=True)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = compose_settings([
        "data=pair_files", f"data.train={tmp_path}/train.jsonl", f"data.heldout={tmp_path}/heldout.jsonl",
        f"data.test={tmp_path}/heldout.jsonl", "model=minilm_reward", f"model.name={write_bert(tmp_path / 'bert')}",
        "model.freeze_embeddings=false", "loader.size=12", "loader.batch_size=8", "augment=null", "start.epochs=0",
        "trainer.max_epochs=4", "optimizer.lr=3e-3", f"trainer.accelerator={ACCELERATOR}", "trainer.threads=1", "tracking=off",
        f"pool.path={tmp_path}/pool", f"paths.output={tmp_path}/out",
    ])  # fmt: skip
    record = fine_tune(settings)
    assert record.heldout() > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "bert", num_labels=1, ignore_mismatched_sizes=True
    )
    assert model.load_state_dict(open_pool(settings).weights(record.fingerprint)).missing_keys == []


def test_a_text_in_several_pairs_has_other_partners_and_raters() -> None:
    rated = [RatedText(f"{n}_1", f"text {n}", (n % 5 - 2, n % 5 - 2, n % 5 - 1)) for n in range(40)]
    once = pair_up(rated, 12, 0.5, True, 0.25, 3, "made")
    again = pair_up(rated, 12, 0.5, True, 0.25, 3, "made", uses=3)
    assert (once.first, once.second, once.labels.tolist()) == (again.first, again.second, again.labels.tolist())
    many = pair_up(rated, 45, 0.5, False, 0.0, 3, "made", uses=3)
    pairs = [frozenset(pair) for pair in zip(many.first, many.second, strict=True)]
    assert len(set(pairs)) == 45, "no pair twice"
    uses = Counter(text for pair in pairs for text in pair)
    assert max(uses.values()) == 3
    means = {one.text: one.mean for one in rated}
    for first, second, label in zip(many.first, many.second, many.labels.tolist(), strict=True):
        assert abs(means[first] - means[second]) >= 0.5 and label == int(means[second] > means[first])
    with pytest.raises(DataError, match="give only"):
        pair_up(rated, 45, 0.5, False, 0.0, 3, "made", uses=2)
    with pytest.raises(DataError, match="pairs_per_text=0 must be at least 1"):
        preferences(pairs_per_text=0)


@pytest.mark.slow
def test_real_preferences() -> None:
    one = preferences(train=200, heldout=100, test=50, swapped=0.25)
    control = preferences(train=200, heldout=100, test=50, part="control", rater="all")
    texts = [
        {*pairs.first, *pairs.second}
        for splits in (one, control)
        for pairs in (splits.train, splits.heldout)  # type: ignore[attr-defined]
    ]
    test = {*one.test.first, *one.test.second}  # type: ignore[attr-defined]
    assert all(not first & second for i, first in enumerate([*texts, test]) for second in [*texts, test][i + 1 :])
    assert int(one.train.swapped.sum()) == 50  # type: ignore[attr-defined]
    natural = (one.train.labels != one.train.truth) != one.train.swapped  # type: ignore[attr-defined]
    assert 0.01 < float(natural.float().mean()) < 0.12, "one rater's own noise"
    assert torch.equal(control.train.labels, control.train.truth)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="did you mean 'control'"):
        preferences(part="controll")
