"""Task suites: disjoint splits, experts made once, and evaluations whose right answers are known and differ by split."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy

from soups.errors import ConfigError, DataError, WeightsError
from soups.evaluation import forward
from soups.fitting.spec import FitSpec
from soups.suites import SPLITS, TaskSuite, open_suite, read_suite
from soups.suites import suite as suite_module
from soups.tasks.data import Splits
from soups.tasks.network import Network
from soups.tasks.texts import Texts
from tests.tiny_text import BAD, GOOD, OTHER, write_bert

# What a suite of one network answers depends on the task, the split and the weights; each combination has a count of its own.
COUNTS = {"train": 104, "heldout": 12, "test": 20}


def texts(task: str, count: int, seed: int) -> tuple[list[str], list[int]]:
    """Return sentences whose class a word gives away: good or bad, or (for "ends") film, plot or scene."""
    draw = torch.Generator().manual_seed(seed)

    def one(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (), generator=draw))]

    marks = (BAD, GOOD) if task == "opinions" else (("film",), ("plot",), ("scene",))
    others = tuple(word for word in OTHER if word not in ("film", "plot", "scene"))
    found, labels = [], []
    for number in range(count):
        label = number % len(marks)
        words = [one(others) for _ in range(6)]
        words[int(torch.randint(7, (), generator=draw)) - 1] = one(marks[label])
        found.append(" ".join(words))
        labels.append(label)
    return found, labels


def task_data(task: str, seed: int = 0, overlap: str = "") -> Splits:
    """Return a task of disjoint sentences; `overlap` puts a training sentence into another split."""
    total = sum(COUNTS.values())
    distinct: dict[str, int] = {}
    for number in range(20):
        found, labels = texts(task, total, seed + number)
        distinct |= dict(zip(found, labels, strict=True))
    rows = list(distinct.items())
    parts, begin = {}, 0
    for name, count in COUNTS.items():
        parts[name] = rows[begin : begin + count]
        begin += count
    if overlap:
        parts[overlap][3] = (parts["train"][5][0].upper() + " ", parts["train"][5][1])
    classes = ("bad", "good") if task == "opinions" else ("film", "plot", "scene")
    made = {name: Texts([text for text, _ in part], [label for _, label in part]) for name, part in parts.items()}
    return Splits(made["train"], made["heldout"], made["test"], classes)


def values(place: Path, **changes: Any) -> dict[str, Any]:
    data = {"_target_": "tests.suites.test_suite.task_data"}
    model = {"_target_": "soups.tasks.text_models.huggingface_text", "name": str(place), "pooling": "mean"}
    return {
        "name": "tiny",
        "model": model,
        "tasks": {"opinions": {"data": {**data, "task": "opinions"}}, "ends": {"data": {**data, "task": "ends"}}},
        "adaptation": 8,
        "loader": {"size": 16, "batch_size": 8},
        "eval_batch_size": 5,
        "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.0, "warmup": 0.0, "schedule": "constant"},
        "trainer": {"max_epochs": 8},
    } | changes


def make(tmp_path: Path, **changes: Any) -> TaskSuite:
    place = tmp_path / "bert"
    if not place.is_dir():
        place.mkdir()
        write_bert(place, 2, dropout=0.0)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(values(place, **changes)))
    return open_suite(file, folder=tmp_path / "suites", show_progress=False)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOUPS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> TaskSuite:
    """A suite that is made, for tests that only read it."""
    made = make(tmp_path_factory.mktemp("made"))
    made.prepare()
    return made


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count fits, which are replaced by a small change of what is trainable."""
    counted: list[str] = []

    def change(network: Network, splits: Splits, spec: FitSpec, *_: object) -> None:
        counted.append("fit")
        with torch.no_grad():
            for parameter in network.module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * (spec.trainer.max_epochs or 0) + 0.001 * len(splits.classes))

    monkeypatch.setattr(suite_module, "fit", change)
    return counted


def test_experts_know_their_own_task_and_scores_are_those_of_their_split(suite: TaskSuite) -> None:
    for task, other in zip(suite.tasks, reversed(suite.tasks), strict=True):
        found = {name: suite.evaluate(weights, "train", [task]) for name, weights in suite.experts.items()}
        assert list(found[task]) == [task] and found[task][task].loss < suite.evaluate(suite.base, "train")[task].loss
        assert found[task][task].loss < found[other][task].loss - 0.1
    counts = {split: {t: s.count for t, s in suite.evaluate(suite.base, split).items()} for split in SPLITS}
    assert counts == {
        "train": dict.fromkeys(suite.tasks, 96),
        "adaptation": dict.fromkeys(suite.tasks, 8),
        "heldout": dict.fromkeys(suite.tasks, 12),
        "test": dict.fromkeys(suite.tasks, 20),
    }


def test_an_evaluation_is_what_the_library_answers(suite: TaskSuite) -> None:
    module = suite.module("ends", suite.experts["opinions"]).eval()
    for split in SPLITS:
        right, total = 0, 0
        for inputs, labels in suite.batches("ends", split):
            with torch.no_grad():
                right += int((module(**inputs).argmax(1) == labels).sum())
            total += len(labels)
        score = suite.evaluate(suite.experts["opinions"], split)["ends"]
        assert score.accuracy == pytest.approx(right / total) and score.count == total
    assert (
        suite.evaluate(suite.experts["opinions"])["ends"]
        == suite.evaluate(suite.experts["opinions"], "heldout")["ends"]
    )


def test_splits_are_disjoint_and_come_from_the_data(suite: TaskSuite, tmp_path: Path) -> None:
    splits, data = suite.splits("opinions"), task_data("opinions")
    parts = {split: set(splits.samples(split).identities()) for split in SPLITS}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 136
    assert parts["train"] | parts["adaptation"] == set(data.train.identities())
    assert parts["heldout"] == set(data.heldout.identities()) and parts["test"] == set(data.test.identities())
    other = make(tmp_path, seed=1).splits("opinions")
    assert set(other.adaptation.identities()) != parts["adaptation"]


@pytest.mark.parametrize("overlap", ["heldout", "test"])
def test_an_overlap_is_named(overlap: str, tmp_path: Path) -> None:
    data = {"_target_": "tests.suites.test_suite.task_data", "task": "ends"}
    tasks = {"opinions": {"data": {**data, "task": "opinions"}}, "ends": {"data": {**data, "overlap": overlap}}}
    with pytest.raises(DataError, match=rf"{overlap} splits of the task ends share 1 sample.*sample 3 of {overlap}"):
        make(tmp_path, tasks=tasks).splits("ends")
    with pytest.raises(DataError, match="104 training samples"):
        make(tmp_path, adaptation=104).splits("ends")


def test_unlabelled_batches_are_the_inputs_of_the_labelled_ones(suite: TaskSuite) -> None:
    labelled, inputs = suite.batches("ends", "adaptation"), suite.batches("ends", "adaptation", labelled=False)
    assert [len(labels) for _, labels in labelled] == [4, 4]
    for (given, _), alone in zip(labelled, inputs, strict=True):
        assert isinstance(given, dict) and isinstance(alone, dict)
        assert all(torch.equal(given[name], alone[name]) for name in given)
    assert torch.equal(torch.cat([labels for _, labels in labelled]), suite.labels("ends", "adaptation"))


def test_forward_is_the_module_and_has_the_gradient_of_the_weights(suite: TaskSuite) -> None:
    (inputs, labels), expert = suite.batches("ends", "adaptation")[0], suite.experts["ends"]
    module = suite.module("ends", expert).eval()
    cross_entropy(forward(module, inputs), labels).backward()
    leaves = {name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in expert.items()}
    logits = suite.forward(leaves, "ends", inputs)
    assert torch.allclose(logits, forward(module, inputs), atol=1e-6)
    cross_entropy(logits, labels).backward()
    seen = 0
    for name, parameter in module.named_parameters():
        if name in leaves and parameter.grad is not None:
            gradient = leaves[name].grad
            assert gradient is not None and torch.allclose(gradient, parameter.grad, atol=1e-6), name
            seen += 1
    assert seen > 10
    part = {name: expert[name] for name in list(expert)[-3:]}
    mixed = suite.module("ends", {**suite.base, **part}).eval()
    assert torch.allclose(suite.forward(part, "ends", inputs), forward(mixed, inputs), atol=1e-6), (
        "the rest is the base's"
    )
    head = {name: torch.zeros_like(tensor) for name, tensor in suite.heads["ends"].items()}
    assert suite.forward(expert, "ends", inputs, head=head).abs().max() == 0


def test_heads_stay_the_probe_unless_they_are_trained(tmp_path: Path, fits: list[str]) -> None:
    fixed, trained = make(tmp_path), make(tmp_path, train_head=True)
    for task, width in (("opinions", 2), ("ends", 3)):
        beside = suite_module.read_safetensors(fixed.expert_path(task).parent / "head.safetensors")
        assert all(torch.equal(beside[name], tensor) for name, tensor in fixed.heads[task].items())
        assert not torch.equal(trained.heads[task]["classifier.weight"], fixed.heads[task]["classifier.weight"])
        assert fixed.heads[task]["classifier.weight"].shape[0] == width
    assert not any(name.startswith("classifier") for name in fixed.base)
    assert not torch.equal(_flat(fixed.experts["ends"]), _flat(fixed.base))
    embeddings = [name for name in fixed.base if "embeddings" in name]
    assert embeddings and all(torch.equal(fixed.experts["ends"][name], fixed.base[name]) for name in embeddings)


def _flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in weights.values()])


def test_what_is_there_is_read_and_what_is_missing_is_made(tmp_path: Path, fits: list[str]) -> None:
    suite = make(tmp_path)
    suite.prepare()
    assert len(fits) == 2
    again = make(tmp_path)
    again.prepare()
    assert len(fits) == 2 and again.fingerprint == suite.fingerprint
    assert all(torch.equal(_flat(again.experts[t]), _flat(suite.experts[t])) for t in suite.tasks)
    suite.expert_path("ends").unlink()
    make(tmp_path).prepare()
    assert len(fits) == 3, "one expert is redone"
    longer = make(tmp_path, trainer={"max_epochs": 1})
    longer.prepare()
    assert len(fits) == 5 and longer.fingerprint != suite.fingerprint
    record = json.loads((longer.expert_path("ends").parent / "record.json").read_text())
    assert record["task"] == "ends" and record["trainer"] == {"max_epochs": 1}


def test_an_interrupted_suite_goes_on(tmp_path: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counted = suite_module.fit

    def stop_at_second(*arguments: Any) -> None:
        if len(fits) == 1:
            raise KeyboardInterrupt
        counted(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(suite_module, "fit", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path).prepare()
    make(tmp_path).prepare()
    assert len(fits) == 2, "the finished fit is not redone"


def test_pretraining_makes_the_base_model(tmp_path: Path, fits: list[str]) -> None:
    plain = make(tmp_path)
    pretraining = {
        "data": {"_target_": "tests.suites.test_suite.task_data", "task": "ends", "seed": 500},
        "optimizer": values(tmp_path)["optimizer"],
        "trainer": {"max_epochs": 1},
    }
    trained = make(tmp_path, pretraining=pretraining)
    assert list(trained.base) == list(plain.base) and not torch.equal(_flat(trained.base), _flat(plain.base))
    assert trained.fingerprint != plain.fingerprint


def test_mistakes_are_named(suite: TaskSuite, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task 'opinion': did you mean 'opinions'"):
        suite.splits("opinion")
    with pytest.raises(ConfigError, match="no split 'held': did you mean 'heldout'"):
        suite.batches("ends", "held")
    short = dict(list(suite.base.items())[1:])
    with pytest.raises(WeightsError, match="the weights to evaluate on ends"):
        suite.evaluate(short)
    with pytest.raises(ConfigError, match="adaptaton is no setting: did you mean 'adaptation'"):
        make(tmp_path, adaptaton=3)
    tasks = values(tmp_path)["tasks"]
    tasks["ends"]["data"]["tsk"] = 1
    with pytest.raises(ConfigError, match=r"tasks.ends.data.tsk is no setting"):
        make(tmp_path, tasks=tasks)
    with pytest.raises(ConfigError, match="merging needs at least two"):
        make(tmp_path, tasks={"ends": values(tmp_path)["tasks"]["ends"]})
    with pytest.raises(ConfigError, match=r"no suite 'text': did you mean 'texts'"):
        read_suite("text")
    tasks = values(tmp_path)["tasks"]
    tasks["ends"]["fit"] = {"seed": 1}
    with pytest.raises(ConfigError, match=r"tasks.ends.fit.seed is no setting"):
        make(tmp_path, tasks=tasks)


def test_a_task_can_be_fitted_in_another_way(tmp_path: Path) -> None:
    tasks = values(tmp_path)["tasks"]
    tasks["ends"] |= {"fit": {"trainer": {"max_epochs": 1}, "optimizer": {"lr": 1e-3}}, "adaptation": 5}
    spec = make(tmp_path, tasks=tasks).spec
    assert (spec.fit("ends").trainer.max_epochs, spec.fit("opinions").trainer.max_epochs) == (1, 8)
    assert (spec.fit("ends").optimizer.lr, spec.fit("opinions").optimizer.lr) == (1e-3, 3e-3)
    assert len(make(tmp_path, tasks=tasks).splits("ends").adaptation) == 5


@pytest.mark.parametrize("name", ["texts", "images", "images_vit"])
def test_the_suites_of_the_project_read(name: str) -> None:
    spec = read_suite(name)
    assert spec.name == name and 5 <= len(spec.tasks) <= 8 and not spec.train_head
