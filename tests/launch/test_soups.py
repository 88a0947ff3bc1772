"""Every recipe on a tiny pool, and pools of checkpoints that were made elsewhere."""

import json
import shutil
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
from hydra.errors import MissingConfigException
from torch import Tensor
from torch.optim.swa_utils import update_bn

from soups.errors import ConfigError, StorageError, WeightsError
from soups.evaluation import predict, score
from soups.fitting.configuration import read_configuration
from soups.launch.settings import Settings, open_pool
from soups.merging import make_method
from soups.merging import merge as merge_models
from soups.recipes import RECIPES, candidates, greedy
from soups.reporting import Page, SoupReport
from soups.soup_making.options import SoupOptions
from soups.stores import read_safetensors, write_safetensors
from soups.stores.pool import Pool
from soups.tasks.data import ShuffledBatches
from tests.devices import ACCELERATOR
from tests.launch.conftest import compose_settings, fine_tune, heldout_batches, run_with, soup_of


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this file's pool of three ingredients is; made once."""
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture
def base(overrides: list[str], shared: Path, tmp_path: Path) -> list[str]:
    """Overrides of the tiny task with three ingredients, and outputs of this test's own."""
    own = [text for text in overrides if not text.startswith("pool.path")] + [f"pool.path={shared}/pool"]
    if not (shared / "done").exists():
        for seed in range(3):
            fine_tune(compose_settings([*own, f"seed={seed}", "optimizer.lr=2e-3"]))
        (shared / "done").touch()
    return own


def cooked(base: list[str], *more: str) -> tuple[SoupReport, Path, Settings]:
    settings = compose_settings([*base, *more])
    report, folder = soup_of(settings)
    return report, folder, settings


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("greedy_removal", []), ("greedy_weights", ["soup.rounds=2"]), ("top_k", ["soup.k=2"]), ("diwa", []),
        ("learned", ["soup.per=tensor", "soup.epochs=2"]), ("wise_ft", ["soup.points=3", "soup.start=probe"]),
        ("bcwi", ["soup.form=fisher", "soup.points=3"]), ("interpolation", ["soup.points=3"]),
        ("greedy", ["soup.racing=0"]),
    ],
)  # fmt: skip
def test_every_recipe_by_configuration(recipe: str, options: list[str], base: list[str]) -> None:
    report, folder, settings = cooked(base, f"+soup={recipe}", *options)
    names = [row.name for row in report.rows]
    for expected in ("linear probe", "shared start", "best single", "uniform soup", "greedy soup", "logit ensemble"):
        assert expected in names
    assert report.recipe == recipe and report.soup in names
    assert sum(report.coefficients.values()) == pytest.approx(1)
    page = Page.load(folder)
    assert page.parts[0].title == "Accuracy of every model" and (folder / "report.html").is_file()
    row = report.row(report.soup)
    low, high = row.interval["test"]
    assert 0 <= low <= row.accuracy["test"] <= high <= 1
    assert {(change.name, change.split) for change in report.differences} >= {
        (report.soup, "test"),
        (report.soup, "OOD"),
    }
    soup = read_safetensors(folder / "soup.safetensors")
    pool = open_pool(settings)
    if recipe == "learned":
        short = {record.short: record.fingerprint for record in pool.ingredients()}
        models = {name: pool.weights(short[name]) for name in report.coefficients}
        for name, shares in report.by_tensor.items():
            mixed = sum(share * models[key][name].double() for key, share in shares.items())
            assert torch.allclose(soup[name].double(), mixed, atol=1e-6), name
        assert any(part.title == "Shares by tensor" for part in page.parts)
    elif recipe in ("wise_ft", "bcwi", "interpolation"):
        assert [point.position for point in report.path] == [0.0, 0.5, 1.0]
        assert set(report.path[0].accuracy) == set(report.splits)
        assert (folder / "path.png").is_file() and any(part.title == "Along the path" for part in page.parts)
        ends = {"wise_ft": "linear probe", "bcwi": "best single"}
        if recipe in ends:
            assert report.path[0].accuracy == pytest.approx(report.row(ends[recipe]).accuracy)
    else:
        members = [pool.weights(name) for name in report.members]
        shares = [report.coefficients[pool.ingredient(name).short] for name in report.members]
        for name, tensor in soup.items():
            if tensor.is_floating_point():
                exact = sum(s * model[name].double() for s, model in zip(shares, members, strict=True))
                assert torch.allclose(tensor.double(), exact, atol=1e-7), name
    again, same = soup_of(settings)
    assert again == report and same == folder, "a finished soup is found"


def test_a_merge_method_with_candidates_ends_in_the_same_report(base: list[str]) -> None:
    report, folder, settings = cooked(
        base, "+soup=ties", "soup.parameters.scale=[0.5,1.0]", "soup.parameters.density=0.5"
    )
    trials = report.details["trials"]
    assert [trial["parameters"] for trial in trials] == [{"density": 0.5, "scale": scale} for scale in (0.5, 1.0)]
    best = max(trials, key=lambda trial: trial["score"])  # the first of equal ones
    assert report.details["method"] == "ties" and report.details["parameters"] == best["parameters"]
    row = report.row("merge soup")
    assert report.soup == "merge soup" and row.accuracy["heldout"] == pytest.approx(best["score"])
    assert row.note == f"ties of 3, density 0.5, scale {best['parameters']['scale']}"
    pool = open_pool(settings)
    start = run_with(settings).base_model.weights
    expected = merge_models(
        make_method("ties", **best["parameters"]), [pool.weights(name) for name in report.members], base=start
    )
    soup = read_safetensors(folder / "soup.safetensors")
    assert all(torch.equal(soup[name], expected[name]) for name in soup)
    assert soup_of(settings)[1] == folder
    with pytest.raises(ConfigError, match="did you mean 'density'"):
        cooked(base, "+soup=merge", "+soup.parameters.densty=0.1")
    with pytest.raises(ConfigError, match="did you mean 'ties'"):
        cooked(base, "+soup=merge", "soup.method=tise")


def test_racing_gives_the_same_greedy_soup(base: list[str]) -> None:
    raced, folder, _ = cooked(base, "+soup=greedy", "soup.racing=0")
    full, other, _ = cooked(base, "+soup=greedy")
    assert raced.members == full.members and folder != other
    assert raced.lineage["soup"] == full.lineage["soup"]
    assert not any("greedy" in effect.name for effect in raced.optimism)
    assert {effect.name for effect in full.optimism} == {"best single", "greedy soup"}


class Wrapped(lightning.LightningModule):
    """A network inside a LightningModule, beside a loss with weights of its own."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.criterion = torch.nn.CrossEntropyLoss(weight=torch.ones(3))
        self.model = network


@pytest.fixture
def elsewhere(base: list[str], tmp_path: Path) -> Path:
    """The pool's three ingredients as others would have saved them."""
    folder = tmp_path / "ckpts"
    (folder / "runs" / "v0").mkdir(parents=True)
    pool = open_pool(compose_settings([*base, "+soup=greedy"]))
    first, second, third = [pool.weights(record.fingerprint) for record in pool.ingredients()]
    lightning_names = {f"model.{name}": tensor for name, tensor in first.items()} | {"criterion.weight": torch.ones(3)}
    checkpoint = {
        "state_dict": lightning_names,
        "epoch": 3,
        "pytorch-lightning_version": "2.6.0",
        "optimizer_states": [],
    }
    torch.save(checkpoint, folder / "runs" / "v0" / "epoch=3.ckpt")
    torch.save({"state_dict": second, "metric": 0.5, "arch": "test_efficientnet"}, folder / "last.pth.tar")
    (folder / "hf").mkdir()
    write_safetensors(folder / "hf" / "model.safetensors", third)
    (folder / "hf" / "config.json").write_text(json.dumps({"id2label": {"0": "0", "1": "1", "2": "2"}}))
    (folder / "notes.txt").write_text("no checkpoint")
    return folder


def from_folder(base: list[str], folder: Path | str, *more: str) -> list[str]:
    rest = [text for text in base if not text.startswith("pool.path")]
    return [*rest, "+soup=greedy", "pool=folder", f"pool.path={folder}", *more]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_folder_of_checkpoints_gives_the_pools_own_soup(base: list[str], elsewhere: Path, tmp_path: Path) -> None:
    before = snapshot(elsewhere)
    own, _, _ = cooked(base, "+soup=greedy")
    report, _, settings = cooked(from_folder(base, elsewhere))
    assert report.lineage["soup"] == own.lineage["soup"], "the same members and bits, whatever they were saved as"
    assert sorted(row.name for row in report.rows if row.kind == "ingredient") == ["hf", "last", "runs/v0/epoch=3"]
    assert report.row("best single").accuracy == pytest.approx(own.row("best single").accuracy)
    assert not any(row.kind == "start" for row in report.rows), "nobody knows the start"
    assert snapshot(elsewhere) == before, "nothing is written beside them"
    found = Pool(settings["pool"]["cache"])
    assert list((Path(found.url) / "predictions").glob("*")), "scored once, kept under outputs"
    some = f"[{elsewhere}/hf,{elsewhere}/last.pth.tar]"
    assert len(cooked(from_folder(base, some))[0].ingredients) == 2
    line, _, _ = cooked([
        *[t for t in from_folder(base, elsewhere) if t != "+soup=greedy"], "+soup=wise_ft", "soup.points=2",
        f"soup.start={elsewhere}/hf",
    ])  # fmt: skip
    assert [row.name for row in line.rows if row.kind == "start"] == ["hf"] or line.path
    with pytest.raises(ConfigError, match=r"wise_ft needs the model that fine-tuning started from"):
        cooked([*[t for t in from_folder(base, elsewhere) if t != "+soup=greedy"], "+soup=wise_ft"])


def test_equal_weights_count_once(base: list[str], elsewhere: Path) -> None:
    shutil.copy(elsewhere / "hf" / "model.safetensors", elsewhere / "copy.safetensors")
    report, folder, _ = cooked(from_folder(base, elsewhere))
    assert len(report.ingredients) == 3
    assert "hf has the same weights as copy: it counts once." in report.warnings
    assert Page.load(folder).warnings == report.warnings


def test_what_does_not_fit_is_named(base: list[str], elsewhere: Path, tmp_path: Path) -> None:
    before = snapshot(elsewhere)
    other = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(3, 3), "conv.bias": torch.zeros(3)}, other)
    shutil.copy(other, elsewhere / "other.pth")
    with pytest.raises(WeightsError) as caught:
        cooked(from_folder(base, elsewhere))
    text = str(caught.value)
    assert "1 of the 4 checkpoints" in text and "other.pth does not fit the model" in text and "missing" in text
    report, _, _ = cooked(from_folder(base, elsewhere, "soup.foreign=skip"))
    assert len(report.ingredients) == 3 and any("other left out" in warning for warning in report.warnings)
    assert len(cooked(from_folder(base, elsewhere, "soup.exclude=[other]"))[0].ingredients) == 3
    (elsewhere / "other.pth").write_bytes((elsewhere / "last.pth.tar").read_bytes()[:5000])
    with pytest.raises(StorageError, match=r"other\.pth"):
        cooked(from_folder(base, elsewhere))
    (elsewhere / "other.pth").unlink()
    assert snapshot(elsewhere) == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="holds no checkpoints"):
        cooked(from_folder(base, tmp_path / "empty"))
    with pytest.raises(ConfigError, match="never added to"):
        read_configuration(compose_settings([text for text in from_folder(base, elsewhere) if text != "+soup=greedy"]))


def test_another_order_of_the_classes(base: list[str], elsewhere: Path) -> None:
    (elsewhere / "hf" / "config.json").write_text(json.dumps({"id2label": {"0": "2", "1": "1", "2": "0"}}))
    with pytest.raises(WeightsError, match=r"hf has 2, 1, 0, the data have 0, 1, 2"):
        cooked(from_folder(base, elsewhere))
    assert len(cooked(from_folder(base, elsewhere, "soup.foreign=skip"))[0].ingredients) == 2


def test_ten_held_out_images_are_warned_of(overrides: list[str]) -> None:
    few = [*overrides, "data.heldout=0.08", "+soup=greedy"]
    for seed in range(2):
        fine_tune(compose_settings([*few, f"seed={seed}"]))
    report, _, _ = cooked(few)
    assert report.splits["heldout"] == 9
    assert any("held-out split has 9 samples" in warning for warning in report.warnings)
    assert report.optimism == [], "too few to choose again on half of them"


def with_other_statistics(settings: Settings, folder: Path) -> list[dict[str, Tensor]]:
    """Save the pool's best two ingredients, the second with every activation scaled by layers of its own: one function."""
    folder.mkdir()
    pool = open_pool(settings)
    models = [pool.weights(record.fingerprint) for record in pool.ingredients()[:2]]
    norms = [name.removesuffix(".running_mean") for name in models[1] if name.endswith("running_mean")]
    for norm in norms:
        models[1][f"{norm}.running_var"] *= 25
        models[1][f"{norm}.running_mean"] *= 5
        models[1][f"{norm}.weight"] *= 5
    for number, weights in enumerate(models):
        write_safetensors(folder / f"model{number}.safetensors", weights)
    return models


def test_batchnorm_statistics_of_a_soup_are_averaged_with_a_warning_or_measured(
    base: list[str], tmp_path: Path
) -> None:
    settings = compose_settings([*base, "+soup=greedy"])
    models = with_other_statistics(settings, tmp_path / "ckpts")
    average = {name: torch.stack([m[name].double() for m in models]).mean(0).float() for name in models[0]}
    folder = from_folder(base, tmp_path / "ckpts", "soup.metric=loss")
    plain, place, _ = cooked(folder)
    (warning,) = [text for text in plain.warnings if "BatchNorm" in text]
    name = next(name for name in average if name.endswith("running_mean"))
    uniform = [text for text in folder if text != "+soup=greedy"]
    found = read_safetensors(cooked([*uniform, "+soup=uniform"])[1] / "soup.safetensors")
    assert torch.allclose(found[name], average[name])

    measured, _, used = cooked([*folder, "soup.batchnorm=reestimate", "soup.batchnorm_batches=3"])
    _, other, _ = cooked([*uniform, "+soup=uniform", "soup.batchnorm=reestimate", "soup.batchnorm_batches=3"])
    # The same by PyTorch's own function.
    splits = run_with(used).splits
    network = run_with(used).network
    network.module.load_state_dict({**average, **{k: v for k, v in models[0].items() if not v.is_floating_point()}})
    dataset = network.input.dataset(splits.train, 32)
    batches = [dataset[keys][0] for keys in list(ShuffledBatches(len(splits.train), 8, 0))[:3]]
    update_bn(batches, network.module)
    near = 1e-4 if ACCELERATOR == "cpu" else 5e-3  # convolutions on a GPU are in TF32
    found, expected = read_safetensors(other / "soup.safetensors"), network.module.state_dict()
    for key in expected:
        assert torch.allclose(found[key].float(), expected[key].float(), rtol=near, atol=near / 100), key
    logits = predict(network.module, heldout_batches(used, network))
    exact = score(logits, splits.heldout.labels)
    assert measured.row("uniform soup").loss["heldout"] == pytest.approx(exact.loss, rel=near)
    assert measured.steps[1].soup_score == pytest.approx(exact.loss, rel=near), "candidates are scored with them too"
    assert f"{plain.row('uniform soup').accuracy['heldout']:.1%}; with measured ones" in warning
    assert not any("BatchNorm" in text for text in measured.warnings)
    best = plain.row("best single").loss
    assert measured.row("best single").loss == best, "ingredients keep their own"
    assert measured.row("uniform soup").loss["heldout"] != plain.row("uniform soup").loss["heldout"]
    raced = cooked([*folder, "soup.batchnorm=reestimate", "soup.batchnorm_batches=3", "soup.racing=0"])[0]
    assert raced.members == measured.members and raced.lineage["soup"] == measured.lineage["soup"]
    assert cooked(folder)[1] == place
    for wrong in ("soup.batchnorm=measure", "soup.batchnorm_batches=0"):
        with pytest.raises(ConfigError, match=wrong):
            SoupOptions.read(compose_settings([*folder, wrong])["soup"])
    like = run_with(used).network.module.state_dict()
    with pytest.warns(UserWarning, match="BatchNorm's running statistics differ"):
        candidates(tmp_path / "ckpts", like, lambda weights: 0.0)


def test_unknown_options_are_named(base: list[str]) -> None:
    settings = compose_settings([*base, "+soup=uniform", "+soup.tie=paper"])
    with pytest.raises(ConfigError, match=r"soup\.tie is no option of the recipe uniform"):
        SoupOptions.read(settings["soup"])
    with pytest.raises(MissingConfigException):  # what all recipes have in common is no choice of its own
        compose_settings([*base, "+soup=base"])
    with pytest.raises(ConfigError, match=r"soup\.selection=all"):
        SoupOptions.read(compose_settings([*base, "+soup=diwa", "soup.selection=all"])["soup"])


def test_plain_functions_on_the_same_folder(base: list[str], elsewhere: Path) -> None:
    """Without Hydra, a pool or a Trainer: files, a network, a score."""
    settings = compose_settings([*base, "+soup=greedy"])
    like = open_pool(settings).weights(open_pool(settings).ingredients()[0].fingerprint)
    target = sum(tensor.double().sum() for tensor in like.values() if tensor.is_floating_point())

    def score(weights: dict[str, Tensor]) -> float:
        total = sum(tensor.double().sum() for tensor in weights.values() if tensor.is_floating_point())
        return -abs(float(total - target))

    shutil.copy(elsewhere / "last.pth.tar", elsewhere / "again.pth.tar")
    with pytest.warns(UserWarning, match="last has the same weights as again"):
        pool = candidates(elsewhere, like, score)
    assert sorted(one.name for one in pool) == ["again", "hf", "runs/v0/epoch=3"]
    soup = greedy(pool, score)
    assert soup.members[0] == "runs/v0/epoch=3" and soup.score == pytest.approx(0, abs=1e-6)
    with pool[0].store() as store:
        assert store.keys() == list(like)


def test_every_recipe_is_tested_here() -> None:
    tested = {mark[0] for mark in test_every_recipe_by_configuration.pytestmark[0].args[1]}
    assert tested | {"uniform", "merge"} == set(RECIPES)
