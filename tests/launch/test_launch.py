"""The pieces of the main job in this process: fingerprints, the shared start, what may be averaged, progress."""

import io
import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torchvision import models as torchvision_models
from transformers import ViTConfig, ViTForImageClassification

from soups.errors import ConfigError, WeightsError
from soups.fitting import spec as fitting
from soups.fitting.configuration import Devices, read_configuration
from soups.fitting.environment import device_count
from soups.fitting.schema import build
from soups.launch.progress import SweepProgress
from soups.launch.settings import Settings, open_pool
from soups.soup_making.options import SoupOptions
from soups.stores import read_safetensors
from soups.stores.pool import Failure, Ingredient, Pool
from tests.launch.conftest import chosen, compose_settings, fine_tune, run_with, soup_of


def changed(settings: Settings, key: str, value: object) -> Settings:
    copy = json.loads(json.dumps(settings))
    section = copy
    *path, leaf = key.split(".")
    for part in path:
        section = section[part]
    section[leaf] = value
    return copy


def fingerprint(settings: Settings) -> str:
    return fitting.fingerprint(read_configuration(settings).fit.on(split="split", base_model="start"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.lr", 1e-3), ("optimizer.weight_decay", 0.5), ("seed", 1), ("task.label_smoothing", 0.2),
        ("augment.magnitude", 3), ("trainer.max_epochs", 7), ("trainer.precision", "bf16-mixed"),
        ("loader.batch_size", 16), ("loader.size", 48), ("model.name", "test_vit"),
    ],
)  # fmt: skip
def test_what_decides_the_weights_is_in_the_fingerprint(settings: Settings, key: str, value: object) -> None:
    assert fingerprint(changed(settings, key, value)) != fingerprint(settings)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.devices", 2), ("trainer.strategy", "ddp"), ("trainer.accelerator", "gpu"), ("loader.workers", 4),
        ("tracking.mode", "online"), ("pool.path", "elsewhere"), ("paths.output", "elsewhere"),
        ("loader.eval_batch_size", 7), ("trainer.threads", 3), ("soup.ties", "official"),
    ],
)  # fmt: skip
def test_where_it_runs_is_not(settings: Settings, key: str, value: object) -> None:
    assert fingerprint(changed(settings, key, value)) == fingerprint(settings)


def test_the_start_is_made_once_and_shared(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with(settings)
    start, weights, probe = run.base_model.record, run.base_model.weights, run.probe.record
    assert start.notes["linear_probe"] == probe.fingerprint and start.weights != probe.weights
    monkeypatch.setattr("soups.fitting.base_model.train", lambda *a, **k: pytest.fail("trained twice"))
    monkeypatch.setattr("soups.fitting.base_model.linear_probe", lambda *a, **k: pytest.fail("probed twice"))
    for key, value in (("optimizer.lr", 1e-3), ("seed", 9), ("task.label_smoothing", 0.3), ("trainer.devices", 2)):
        found = run_with(changed(settings, key, value)).base_model
        again, same = found.record, found.weights
        assert again == start
        assert all(torch.equal(same[name], weights[name]) for name in weights)


def test_fine_tuning_starts_at_the_start_and_freezes_batchnorm(settings: Settings) -> None:
    start = run_with(settings).base_model.weights
    still = fine_tune(changed(settings, "optimizer.lr", 1e-20))
    pool = open_pool(settings)
    weights = pool.weights(still.fingerprint)
    assert all(torch.allclose(weights[name].float(), start[name].float(), rtol=0, atol=1e-6) for name in start)
    moved = fine_tune(settings)
    weights = pool.weights(moved.fingerprint)
    running = [name for name in start if "running" in name]
    assert running and all(torch.equal(weights[name], start[name]) for name in running)
    assert any(not torch.equal(weights[name], start[name]) for name in start if name not in running)
    assert fine_tune(settings) == moved


def test_foreign_ingredients_are_refused_by_name_or_skipped(settings: Settings) -> None:
    pool = open_pool(settings)
    mine = fine_tune(settings)
    weights = pool.weights(mine.fingerprint)
    other = mine.model_copy(update={"fingerprint": "b" * 64, "start": "elsewhere"})
    pool.add(other, weights)
    bigger = mine.model_copy(update={"fingerprint": "c" * 64})
    pool.add(bigger, {**weights, "extra.weight": torch.zeros(3)})
    split = mine.model_copy(
        update={"fingerprint": "d" * 64, "split": "other", "config": changed(mine.config, "data.split_seed", 5)}
    )
    pool.add(split, weights)
    with pytest.raises(WeightsError) as caught:
        chosen(settings, pool)
    text = str(caught.value)
    assert text.startswith("3 of the 4 ingredients")
    assert "bbbbbbbb: another start" in text
    assert "cccccccc: another architecture (1 unexpected ('extra.weight'))" in text
    assert "dddddddd: another split (data.split_seed: 5 there, 0 here)" in text
    skipping = changed(settings, "soup.foreign", "skip")
    assert [record.fingerprint for record in chosen(skipping, pool)] == [mine.fingerprint]
    excluding = changed(settings, "soup.exclude", ["bbbb", "c" * 64, "dddddddd"])
    assert [record.fingerprint for record in chosen(excluding, pool)] == [mine.fingerprint]
    report, folder = soup_of(skipping)
    assert report.members == [mine.fingerprint] and (folder / "soup.safetensors").is_file()


def test_cooking_mistakes(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"soup\.recipe=gredy: did you mean 'greedy'"):
        soup_of(changed(settings, "soup.recipe", "gredy"))
    with pytest.raises(ConfigError, match="holds no ingredients to average"):
        soup_of(settings)


def test_settings_mistakes(settings: Settings, overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.name=adam must be adamw or sgd"):
        read_configuration(changed(settings, "optimizer.name", "adam"))
    with pytest.raises(ConfigError, match=r"loader\.size=many must be a positive whole number"):
        read_configuration(changed(settings, "loader.size", "many"))
    with pytest.raises(ConfigError, match=r"data\.rot is no setting of .*did you mean 'root'"):
        build({**settings["data"], "rot": 1}, "data")
    with pytest.raises(ConfigError, match="cannot be imported"):
        build({"_target_": "soups.nowhere.f"}, "data")
    with pytest.raises(ConfigError, match=r"trainer\.devices=some must be"):
        device_count(Devices(devices="some"))
    with pytest.raises(ConfigError, match=r"data\.root has no value: give it on the command line"):
        compose_settings([*[text for text in overrides if not text.startswith("data.root")]])


def test_every_configuration_composes() -> None:
    conf = Path(__file__).parents[2] / "conf"
    groups = {
        "model": ["model.name=x"],
        "data": ["data.root=x", "data.train=x", "data.leave_out=x", "data.heldout=x", "data.test=x"],
        "optimizer": [],
        "tracking": [],
        "trainer": [],
    }
    for group, fill in groups.items():
        for path in (conf / group).glob("*.yaml"):
            fitting = [text for text in fill if text.split("=")[0].split(".")[1] + ": ???" in path.read_text()]
            assert compose_settings([f"{group}={path.stem}", *fitting])
    for path in (conf / "soup").glob("*.yaml"):
        if path.stem != "base":
            settings = compose_settings([f"+soup={path.stem}"])
            SoupOptions.read(settings["soup"])
            soup = settings["soup"]
            assert soup["recipe"] == path.stem or (soup["recipe"], soup["method"]) == ("merge", path.stem)
            assert soup["metric"] == "accuracy"


def test_progress_is_read_from_the_pool(tmp_path: Path) -> None:
    """Any launcher: the display learns of runs only through files in the pool."""
    pool = Pool(tmp_path / "pool")
    pool.check_writable()
    names = ["a" * 64, "b" * 64]
    display = SweepProgress(pool, names, {names[0]: "lr=1", names[1]: "lr=2"}, found=3)
    display.console = Console(file=io.StringIO(), force_terminal=True, width=120)

    def work() -> None:
        folder = tmp_path / "pool" / "progress"
        folder.mkdir(exist_ok=True)
        (folder / f"{names[0]}.json").write_text('{"step": 5, "total": 10}')
        time.sleep(1.2)
        record = Ingredient(fingerprint=names[0], determinants={}, metrics={"heldout": {"accuracy": 0.75}})
        pool.add(record, {"w": torch.zeros(2)})

    with display.running():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        time.sleep(0.8)
    text = display.console.file.getvalue()  # type: ignore[attr-defined]
    assert "aaaaaaaa  held-out 75.00%  lr=1" in text and "[4/5]" in text and "4/5" in text and "left" in text


def test_a_log_file_gets_the_time_left_and_failures_at_once(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "pool")
    names = [letter * 64 for letter in "abcd"]
    pool.fail(
        Failure(fingerprint=names[3], error="of an earlier run", determinants={}, created="2020-01-01T00:00:00+00:00")
    )
    display = SweepProgress(pool, names, {name: f"betas=[0.9,{name[0]}]" for name in names}, found=0)
    display.console = Console(file=io.StringIO(), force_terminal=False, width=200)

    def lines() -> list[str]:
        return display.console.file.getvalue().splitlines()  # type: ignore[attr-defined]

    def until(count: int) -> None:
        deadline = time.monotonic() + 10
        while len(lines()) < count and time.monotonic() < deadline:
            time.sleep(0.05)

    with display.running():
        time.sleep(0.2)
        pool.add(
            Ingredient(fingerprint=names[0], determinants={}, metrics={"heldout": {"accuracy": 0.5}}),
            {"w": torch.zeros(2)},
        )
        until(1)
        pool.fail(Failure(fingerprint=names[1], error="it diverged\nat step 3", determinants={}))
        until(2)
        pool.add(
            Ingredient(fingerprint=names[2], determinants={}, metrics={"heldout": {"accuracy": 0.6}}),
            {"w": torch.ones(2)},
        )
        until(3)
    first, second, third = lines()[:3]
    assert first.startswith("[1/4] aaaaaaaa  held-out 50.00%  betas=[0.9,a]") and re.search(r"about \d+ s left$", first)
    assert second == "failed bbbbbbbb  betas=[0.9,b]  it diverged"
    assert third.startswith("[2/4] cccccccc") and "left" in third
    assert "of an earlier run" not in "".join(lines())


def test_an_ingredient_can_be_an_average_of_its_run(settings: Settings, overrides: list[str]) -> None:
    longer = [*overrides, "+soup=greedy", "trainer.max_epochs=2", "callbacks=[ema,lawa]", "callbacks.ema.half_life=5st"]
    raw = fine_tune(compose_settings(longer))
    ema = fine_tune(compose_settings([*longer, "ingredient.weights=ema"]))
    pool = open_pool(settings)
    assert raw.fingerprint != ema.fingerprint
    first, second = pool.weights(raw.fingerprint), pool.weights(ema.fingerprint)
    start = run_with(settings).base_model.weights
    name = next(name for name, tensor in first.items() if name.endswith("conv_stem.weight"))
    # The average lies between the start and the end of the same run, and is not its end.
    assert not torch.equal(first[name], second[name])
    assert (second[name] - start[name]).norm() < (first[name] - start[name]).norm()
    plain = fine_tune(compose_settings([*overrides, "trainer.max_epochs=2"]))
    assert plain.weights == raw.weights, "watching a run does not change it"
    with pytest.raises(ConfigError, match=r"ingredient\.weights=emma, .* did you mean 'ema'"):
        fine_tune(compose_settings([*longer, "ingredient.weights=emma"]))


@pytest.mark.parametrize("library", ["torchvision", "huggingface"])
def test_other_libraries_by_configuration(library: str, overrides: list[str], tmp_path: Path) -> None:
    """From tiny local files to a soup, by `model=…` alone; timm is what every other test here uses."""
    if library == "torchvision":
        donor = torchvision_models.get_model("mobilenet_v3_small", num_classes=5)
        torch.save(donor.state_dict(), tmp_path / "donor.pth")
        choice = ["model=torchvision", "model.name=mobilenet_v3_small", f"model.pretrained={tmp_path}/donor.pth"]
    else:
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
        choice = ["model=huggingface", f"model.name={tmp_path}/vit"]
    base = [text for text in overrides if not text.startswith("model")]
    settings = compose_settings([*base, *choice, "+soup=uniform"])
    for seed in (0, 1):
        fine_tune(changed(settings, "seed", seed))
    report, folder = soup_of(settings)
    assert len(report.members) == 2
    weights = [open_pool(settings).weights(name) for name in report.members]
    soup = read_safetensors(folder / "soup.safetensors")
    for name, tensor in soup.items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, ((weights[0][name].double() + weights[1][name].double()) / 2).to(tensor.dtype))
