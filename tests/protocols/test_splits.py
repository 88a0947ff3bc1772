"""Protocols read each split for its own purpose. In the splits made here every split has another known answer."""

from pathlib import Path

import pytest
import torch

from soups.protocols import Output, Work, build_protocol, execute, in_sequence
from soups.protocols.branch_train_merge.page import branch_page
from soups.protocols.branch_train_merge.run import BranchTrainMerge
from soups.protocols.cold_fusion import Policy, Repository
from soups.protocols.recycling.page import accuracies
from soups.protocols.recycling.run import LoFi
from soups.protocols.warm.average import average, best_first
from soups.stores import write_safetensors
from soups.stores.pool import Pool
from soups.tasks import language_modelling
from soups.tasks.data import Splits
from soups.tasks.language_modelling import Corpus
from soups.tasks.texts import Texts
from tests.launch.conftest import compose_settings
from tests.protocols import test_branch_train_merge as branch
from tests.tiny_text import sentences, write_bert

HERE = "tests.protocols.test_splits"


def turned(texts: list[str], labels: list[int], share: float) -> Texts:
    """Return the texts with the labels of the first share of them turned round."""
    count = round(share * len(texts))
    return Texts(texts, [1 - label if number < count else label for number, label in enumerate(labels)])


def four_answers(seed: int = 0) -> Splits:
    """Return splits whose held-out, test and OOD texts are the same; only labels differ: none, all or half are wrong."""
    rows = sentences(120, seed=seed)
    texts, labels = [text for text, _ in rows], [int(label == "pos") for _, label in rows]
    same = texts[60:100]
    own = labels[60:100]
    return Splits(
        Texts(texts[:60], labels[:60]), turned(same, own, 0), turned(same, own, 1), ("neg", "pos"),
        {"other": turned(same, own, 0.5)},
    )  # fmt: skip


def lo_fi(place: Path) -> LoFi:
    settings = compose_settings([
        "+protocol=lo_fi", "model=huggingface_text", f"model.name={write_bert(place / 'bert')}", "model.pooling=mean",
        "loader.size=16", "loader.batch_size=8", "optimizer.lr=3e-2", "trainer.accelerator=cpu", "trainer.threads=1",
        "tracking=off", f"pool.path={place}/pool", f"paths.output={place}/out", "trainer.max_epochs=4", "protocol.nodes=2",
    ])  # fmt: skip
    program = build_protocol({**settings, "data": {"_target_": f"{HERE}.four_answers"}})
    assert isinstance(program, LoFi)
    return program


def test_the_table_of_a_target_has_each_split_in_its_own_column(tmp_path: Path) -> None:
    program = lo_fi(tmp_path)
    pool = Pool(tmp_path / "pool")
    assert execute(program.plan(), pool, in_sequence(pool, program.operations())) == {}
    rows = accuracies(program.comparison, pool)
    for name, row in rows.items():
        assert row["test"] == pytest.approx(1 - row["heldout"]), name
        assert row["other"] != row["heldout"] and row["other"] != row["test"], name
    assert rows["synchronous (DDP)"]["heldout"] != 0.5, "a split in the wrong column would show"
    page = program.page(program.plan(), pool)
    table = page.parts[0]
    assert table.columns[:4] == ["model", "heldout, %", "test, %", "other, %"]
    for line in table.rows:
        assert line[1:4] == pytest.approx([100 * rows[line[0]][split] for split in ("heldout", "test", "other")])
    points = page.parts[1].groups["synchronous (DDP)"][0]
    assert (points.x, points.y) == pytest.approx(
        tuple(100 * rows["synchronous (DDP)"][s] for s in ("heldout", "other"))
    )


def test_the_posterior_is_of_the_development_text_and_the_scores_are_of_the_test_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Domain a is trained and tested on one language; its development text is in the other one."""
    one, two = branch.language(("ab", "abba", "b"), 0), branch.language(("xyz", "zyx", "yy"), 1)
    encode = language_modelling.encode

    def corpus(domain: str, characters: int | None = None) -> Corpus:
        train = encode(one if domain == "a" else two)
        other = encode(two)
        return Corpus(train[:6000], other[:2000], train[6000:8000])

    monkeypatch.setattr("soups.protocols.branch_train_merge.run.corpus", corpus)
    settings = compose_settings(branch.overrides(tmp_path, "protocol.seed_shares=[0.0]", "protocol.steps=80"))
    program = build_protocol(settings)
    assert isinstance(program, BranchTrainMerge)
    pool = Pool(tmp_path / "pool")
    assert execute(program.plan(), pool, in_sequence(pool, program.operations())) == {}
    (found,) = program.nodes.branches
    ensemble = found.ensemble["a"]
    weights = pool.weights(ensemble.input("posterior").fingerprint)["weights"]
    assert weights[1] > 0.9, "the development text of a is in b's language"
    losses = program.losses(pool)
    # The mixture by that posterior is b's expert, which does not know the language that a is tested on.
    assert losses["0% seed: ensemble by posterior"]["a"] > losses["0% seed: own expert"]["a"] + 0.3
    assert losses["0% seed: own expert"]["a"] < 2.5 < losses["0% seed: average by posterior"]["a"]


def test_the_best_of_branch_train_merge_has_the_lowest_perplexity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page compares losses, where smaller is better."""
    monkeypatch.setattr(language_modelling, "DOMAINS", {"a": lambda: "ab" * 9000, "b": lambda: "xy" * 9000})
    program = build_protocol(compose_settings(branch.overrides(tmp_path, "protocol.seed_shares=[0.0]")))
    assert isinstance(program, BranchTrainMerge)
    pool, plan = Pool(tmp_path / "pool"), program.plan()
    value = {"dense": 3.0, "score 0% seed: uniform average": 0.5}

    def known(work: Work) -> Output:
        loss = value.get(work.node.label.removeprefix("score "), value.get(work.node.label, 1.0))
        return Output(metrics={domain: {"loss": loss} for domain in ("a", "b")})

    def nothing(work: Work) -> Output:
        return Output({"weights": torch.ones(2)})

    operations = {
        "lm.score": known,
        "lm.ensemble": known,
        **dict.fromkeys(("lm.train", "lm.mean", "lm.posterior"), nothing),
    }
    assert execute(plan, pool, in_sequence(pool, operations)) == {}
    page = branch_page(program.nodes, ["a", "b"], plan, pool)
    assert page.summary.startswith("Lowest mean test perplexity: 0% seed: uniform average (1.65")
    table = page.parts[0]
    assert [table.rows[number][0] for number in table.highlight] == ["0% seed: uniform average"]


def test_members_are_ranked_by_a_score_and_a_loss_counts_negative(tmp_path: Path) -> None:
    losses = [0.9, 0.2, 0.5]
    assert best_first([-loss for loss in losses], 2) == [1, 2]
    models = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, model in enumerate(models):
        write_safetensors(model, {"w": torch.tensor([float(number)])})
    kept = average(models, scores=[-loss for loss in losses], keep=1)
    assert isinstance(kept, dict) and kept["w"].tolist() == [1.0]


def test_fusers_with_a_loss_refuse_what_raises_it(tmp_path: Path) -> None:
    """`score` is larger where it is better; a loss is given as its negative."""
    repository = Repository.create(
        tmp_path / "repository", {"w": torch.zeros(2)}, Policy(quorum=1, max_norm=None, tolerance=0.5)
    )
    repository.push({"w": torch.tensor([1.0, 0.0])}, 0, "better")
    repository.push({"w": torch.tensor([-3.0, 0.0])}, 0, "worse")

    def loss(weights) -> float:
        return float((weights["w"] - torch.tensor([2.0, 0.0])).square().sum())

    record = repository.fuse(score=lambda weights: -loss(weights))
    assert record is not None
    outcome = {verdict.contributor: verdict.accepted for verdict in record.verdicts}
    assert outcome == {"better": True, "worse": False}
    assert loss(repository.pull()[1]) < loss(repository.pull(0)[1])
