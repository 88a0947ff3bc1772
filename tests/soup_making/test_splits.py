"""A task in which held-out, test and OOD each have another, known answer: no number can come from the wrong split.

The network is one linear layer that reads a class from the brightness of three pixels, so that the weights of a model say
which images it gets right. Model "good on held-out" is right on every held-out image and wrong on every test image; model
"good on test" the other way round; both are half right under shift.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soups.fitting import read_configuration
from soups.fitting.run import run_of
from soups.reporting import SoupReport
from soups.soup_making.evaluator import HELDOUT, SoupEvaluator
from soups.soup_making.ingredients import open_ingredients
from soups.soup_making.options import SoupOptions
from soups.soup_making.soup import make_soup
from soups.stores import write_safetensors
from soups.tasks.data import Splits
from soups.tasks.images import ImageInput, TensorImages
from soups.tasks.network import Network
from tests.launch.conftest import compose_settings

COUNT = 40


def images(channel: int, count: int = COUNT) -> TensorImages:
    """Images of one colour; the class is whether it is bright. A model is right where it reads this channel."""
    labels = torch.arange(count) % 2
    pixels = torch.full((count, 3, 4, 4), 128, dtype=torch.uint8)
    pixels[:, channel] = torch.where(labels == 1, 255, 0).to(torch.uint8)[:, None, None]
    return TensorImages(pixels, labels)


def known_splits() -> Splits:
    """Held-out images are red, test images green, and shifted ones blue."""
    return Splits(images(0), images(0), images(1), ("dark", "bright"), {"blue": images(2)})


class Reads(nn.Module):
    """Logits from the mean of each channel: weight (2, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, affine=False)
        self.head = nn.Linear(3, 2, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(inputs).mean(dim=(2, 3)))


def known_network(num_classes: int, pretrained: bool = True) -> Network:
    del num_classes, pretrained
    return Network(Reads(), ImageInput((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), "head")


def weights(red: float, green: float, blue: float) -> dict[str, Tensor]:
    """A model that is right on a colour where its number is positive, and wrong where it is negative."""
    state = Reads().state_dict()
    state["head.weight"] = torch.tensor([[-red, -green, -blue], [red, green, blue]], dtype=torch.float32)
    return state


@pytest.fixture
def known(tmp_path: Path) -> list[str]:
    folder = tmp_path / "models"
    folder.mkdir()
    write_safetensors(folder / "heldout.safetensors", weights(1, -1, 1))
    write_safetensors(folder / "test.safetensors", weights(-0.5, 1, -1))
    here = "tests.soup_making.test_splits"
    return [
        "pool=folder", f"pool.path={folder}", "+soup=greedy", f"data={{_target_: {here}.known_splits}}",
        f"model={{_target_: {here}.known_network}}", f"paths.output={tmp_path}/out", "tracking=off",
    ]  # fmt: skip


def configured(known: list[str], **soup: Any) -> dict[str, Any]:
    plain = [text for text in known if not text.startswith(("data=", "model="))]
    settings = compose_settings(plain)
    here = "tests.soup_making.test_splits"
    settings["data"], settings["model"] = {"_target_": f"{here}.known_splits"}, {"_target_": f"{here}.known_network"}
    settings["loader"]["size"] = 4
    settings["task"]["channels_last"] = False
    settings["soup"] |= soup
    return settings


def made(known: list[str], **soup: Any) -> SoupReport:
    return make_soup(run_of(read_configuration(configured(known, **soup))))[0]


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_each_number_is_of_its_own_split(known: list[str], metric: str) -> None:
    report = made(known, metric=metric)
    heldout, test = report.row("heldout"), report.row("test")
    assert heldout.accuracy == {"heldout": 1.0, "test": 0.0, "blue": 1.0}
    assert test.accuracy == {"heldout": 0.0, "test": 1.0, "blue": 0.0}
    best = report.row("best single")
    assert best.note == "heldout" and best.accuracy == heldout.accuracy, "the better one on held-out, by either metric"
    assert heldout.loss["heldout"] < test.loss["heldout"] and heldout.loss["test"] > test.loss["test"]
    # The uniform soup has the weights (0.25, 0, 0): right on red, undecided on green and blue.
    uniform = report.row("uniform soup")
    assert uniform.accuracy["heldout"] == 1.0
    assert report.splits == {"heldout": COUNT, "test": COUNT, "blue": COUNT}
    mean = report.row("mean of ingredients")
    assert mean.accuracy == {"heldout": 0.5, "test": 0.5, "blue": 0.5}
    assert report.mode == ("max" if metric == "accuracy" else "min")


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_paired_test_is_on_the_test_split(known: list[str], metric: str) -> None:
    report = made(known, metric=metric)
    found = {(one.name, one.split): one.value for one in report.differences}
    # On held-out the two are equal (0); on test the uniform soup ties at 0.5 by its argmax, the best single has 0.
    uniform, best = report.row("uniform soup").accuracy, report.row("best single").accuracy
    assert found["uniform soup", "test"] == pytest.approx(uniform["test"] - best["test"])
    assert found["uniform soup", "test"] > 0.4 and uniform["heldout"] - best["heldout"] == 0
    assert found["uniform soup", "OOD"] == pytest.approx(uniform["blue"] - best["blue"])


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("greedy", {}), ("greedy", {"racing": 0}), ("greedy", {"racing": 0.05}), ("greedy_removal", {}),
        ("greedy_weights", {}), ("top_k", {"k": 1}), ("diwa", {}), ("interpolation", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_every_search_prefers_the_better_one_in_both_directions(
    known: list[str], recipe: str, options: dict[str, Any], metric: str
) -> None:
    """The held-out split alone decides: the model that is right there comes first, or gets the greater share."""
    settings = compose_settings([text.replace("+soup=greedy", f"+soup={recipe}") for text in known[:3]])
    whole = configured([text.replace("+soup=greedy", f"+soup={recipe}") for text in known], metric=metric, **options)
    assert settings["soup"]["recipe"] == recipe
    report, _ = make_soup(run_of(read_configuration(whole)))
    names = {record: row.name for record, row in zip(report.ingredients, report.rows, strict=False)}
    assert names
    first = report.steps[0] if report.steps else None
    if first is not None:
        assert first.name == "heldout" and (first.own_score == 1.0 if metric == "accuracy" else first.own_score < 0.7)
    soup = report.row(report.soup)
    best = report.row("best single")
    better = soup.accuracy["heldout"] >= best.accuracy["heldout"]
    assert better if metric == "accuracy" else soup.loss["heldout"] <= best.loss["heldout"] + 1e-6


def test_ingredients_keep_their_own_batchnorm_statistics(known: list[str]) -> None:
    settings = configured(known, batchnorm="reestimate", batchnorm_batches=2)
    run = run_of(read_configuration(settings))
    pool = open_ingredients(run)
    evaluator = SoupEvaluator(run, SoupOptions.read(settings["soup"]), pool)
    ingredients = evaluator.measured(pool.ingredients())
    candidates = evaluator.candidates(ingredients)
    for candidate, record in zip(candidates, ingredients, strict=True):
        own = candidate.load()
        assert evaluator.repaired(own) is own, "an ingredient is scored as it was trained"
        assert evaluator.score(own) == record.heldout()
    average = {name: (candidates[0].load()[name] + candidates[1].load()[name]) / 2 for name in candidates[0].load()}
    average["norm.num_batches_tracked"] = candidates[0].load()["norm.num_batches_tracked"]
    repaired = evaluator.repaired(average)
    # The training images are red at 0 or 255 and else 128: after normalisation to ±1 their variance is 1, 0 and 0.
    assert repaired["norm.running_var"][0] == pytest.approx(1.0, abs=0.02) and repaired["norm.running_var"][1] < 1e-3
    assert torch.equal(average["norm.running_var"], torch.ones(3)), "the average itself is left as it was"


def test_the_heldout_score_is_of_the_heldout_split(known: list[str]) -> None:
    run = run_of(read_configuration(configured(known)))
    pool = open_ingredients(run)
    evaluator = SoupEvaluator(run, SoupOptions.read(configured(known)["soup"]), pool)
    assert evaluator.score(weights(1, -1, 1)) == 1.0 and evaluator.score(weights(-1, 1, 1)) == 0.0
    assert evaluator.logits(weights(1, -1, 1), "test").argmax(1).ne(run.splits.test.labels).all()
    assert evaluator.labels(HELDOUT).tolist() == run.splits.heldout.labels.tolist()
