"""Somebody's own train.py: our wheel beside it, nothing changed in it, and it ends in a soup."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import lightning.pytorch as pl
import pytest
import torch

from soups.errors import ConfigError
from soups.launch.own_program.interception import Fit, fits_go_to
from soups.launch.own_program.options import check_options
from soups.launch.own_program.task import ProgramTask
from soups.reporting import SoupReport
from soups.stores import read_safetensors
from soups.stores.pool import Pool
from tests.launch.conftest import ROOT

Run = Callable[..., subprocess.CompletedProcess]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the repository and installed in a folder of its own."""
    base = tmp_path_factory.mktemp("wheel")
    kept = ("soups", "callbacks", "hydra_plugins", "conf")
    for name in kept:
        shutil.copytree(ROOT / name, base / "source" / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, base / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", str(base / "source"), "--no-deps", "--no-build-isolation", "-w", str(base)]
    for command in (
        build,
        [*pip, "install", "--no-deps", "--no-index", "-f", str(base), "-t", str(base / "site"), "soups"],
    ):
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    return base / "site"


@pytest.fixture(scope="module")
def project(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project of `tests/launch/project`, in a folder of its own."""
    folder = tmp_path_factory.mktemp("theirs") / "project"
    shutil.copytree(ROOT / "tests/launch/project", folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def run(installed: Path, project: Path) -> Run:
    def python_train(*arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "150"}  # and not the repository
        command = [sys.executable, "train.py", *arguments]
        return subprocess.run(
            command, cwd=project, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            timeout=300,
        )  # fmt: skip

    return python_train


@slow
def test_the_wheel_has_the_configuration_and_no_more(installed: Path) -> None:
    conf = installed / "soups" / "conf"
    for group in ("soup", "callbacks", "hydra/launcher"):
        wanted, found = (
            {str(path.relative_to(root / group)): path.read_text() for path in (root / group).rglob("*.yaml")}
            for root in (ROOT / "conf", conf)
        )
        assert found == wanted and wanted, group
    assert {path.name for path in conf.iterdir()} == {"soup", "callbacks", "hydra"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "soups").rglob("*.py")}
    modules |= {
        f"soups/{path.relative_to(ROOT)}" for path in (ROOT / "callbacks").rglob("*.py")
    }  # soups/callbacks is a link
    assert {str(path.relative_to(installed)) for path in (installed / "soups").rglob("*.py")} == modules
    assert not (installed / "conf").exists() and not (installed / "tests").exists()


@slow
def test_a_program_that_knows_nothing_of_soups_ends_in_one(run: Run, project: Path, installed: Path) -> None:
    command = ["+soup=greedy", "callbacks=[default,ema,lawa]"]
    done = run(*command)
    assert done.returncode == 0, done.stdout
    assert (
        "0 of 3 ingredients found, 3 to fine-tune" in done.stdout
        and "selected by val/acc, larger is better" in done.stdout
    )

    pool = Pool(project / "pools" / "train")
    records = pool.ingredients()
    assert len(records) == 3
    (start,) = {record.start for record in records}
    assert pool.start(start) is not None and all(record.weights != start for record in records)
    assert set(records[0].determinants["config"]["callbacks"]) == {"checkpoint", "ema", "lawa"}, (
        "both folders of callbacks"
    )

    (folder,) = (project / "outputs" / "soups").glob("greedy-*")
    files = {
        "report.json",
        "page.json",
        "report.html",
        "results.csv",
        "soup.safetensors",
        "scatter.png",
        "greedy_path.png",
    }
    assert {path.name for path in folder.iterdir()} == files
    report = json.loads((folder / "report.json").read_text())
    rows = {row["name"]: row["metrics"] for row in report["rows"]}
    own = [record.heldout("val/acc") for record in records]
    assert rows["best single"]["heldout"]["val/acc"] == max(own)
    assert rows["mean of ingredients"]["heldout"]["val/acc"] == pytest.approx(sum(own) / 3)
    assert rows["greedy soup"]["heldout"]["val/acc"] >= max(own) > 0.8 > rows["start"]["heldout"]["val/acc"]
    assert rows["greedy soup"]["test"]["test/acc"] > 0.8
    assert all(set(record.metrics) == {"heldout"} and "test/acc" not in record.metrics["heldout"] for record in records)
    assert all(record.history[-1]["epoch"] == 1 and 0 < record.history[-1]["val/acc"] <= 1 for record in records)
    # val/best is the best so far, so that it is no metric of a model.
    assert not any("val/best" in values for row in rows.values() for values in row.values())
    assert (
        "remember the models that were validated before" in " ".join(done.stdout.split()) and "val/best" in done.stdout
    )
    assert not list(project.glob("**/start")) and not list(project.glob("**/rehearsal")), (
        "nothing but the ingredients' folders"
    )
    soup = read_safetensors(folder / "soup.safetensors")
    members = [pool.weights(name, verify=True) for name in report["members"]]
    for name, tensor in soup.items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, torch.stack([member[name].double() for member in members]).mean(0).float()), name

    again = subprocess.run(
        [sys.executable, "-m", "soups.cli", "report", str(folder)], cwd=project, text=True, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert SoupReport.load(folder).metric == "val/acc" and "greedy soup" in (folder / "report.html").read_text().lower()

    # Its BatchNorm layer was trained: the warning names it, and what to do in a program of one's own.
    warning = report["warnings"][0]
    assert "layer 'net.1'" in warning and "torch.optim.swa_utils.update_bn(loader, model)" in warning
    assert "BatchNorm's running statistics differ" in " ".join(done.stdout.split())

    # Another recipe over the same pool, with the program's own start.
    again = run("+soup=wise_ft", "soup.points=3", command[1])
    assert again.returncode == 0 and "3 of 3 ingredients found, 0 to fine-tune" in again.stdout, again.stdout
    assert "WiSE-FT soup of 3 ingredients: selected by val/acc" in again.stdout, again.stdout
    assert [record.created for record in pool.ingredients()] == [record.created for record in records]

    # A metric that remembers the best so far would choose wrongly, and is found out.
    # Nothing says which of its values are better, and nobody guesses.
    unsaid = run(*command, "+ingredient.monitor=val/best")
    assert unsaid.returncode == 1 and "++ingredient.mode=min" in unsaid.stdout, unsaid.stdout
    wrong = run(*command, "+ingredient.monitor=val/best", "+ingredient.mode=max")
    assert wrong.returncode == 1 and "Traceback" not in wrong.stdout, wrong.stdout
    assert "val/best" in wrong.stdout and "best-so-far" in " ".join(wrong.stdout.split())


@slow
def test_two_processes_and_an_average(run: Run, project: Path) -> None:
    """Lightning repeats the command line in its second process; that must be the fit, not the sweep."""
    more = ["+trainer.devices=2", "+trainer.strategy=ddp", "callbacks=[default,ema]", "+ingredient.weights=ema"]
    done = run("+soup=uniform", "sweep.size=1", "+pool.path=pools/two", *more)
    assert done.returncode == 0, done.stdout
    (record,) = Pool(project / "pools" / "two").ingredients()
    assert record.layout["world_size"] == 2
    average = Pool(project / "pools" / "two").weights(record.fingerprint)
    path = max(project.glob("multirun/*/*/0/checkpoints/*.ckpt"))  # of the last sweep: folders are named by the time
    raw = torch.load(path, weights_only=True)["state_dict"]
    assert not torch.equal(average["net.0.weight"], raw["net.0.weight"])


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"batchnorm": "reestimate"}, (), r"soup\.batchnorm=reestimate would do nothing.*update_bn"),
        ({"metric": "loss"}, (), r"soup\.metric=loss would do nothing.*ingredient\.monitor"),
        ({"metric": "accuracy"}, ("soup.metric",), r"soup\.metric=accuracy would do nothing"),
        ({"racing": 0.05}, (), r"soup\.racing=0\.05 would do nothing"),
        ({"barrier": True}, (), r"soup\.barrier=True would do nothing"),
        ({"landscape": True}, (), r"soup\.landscape=True would do nothing"),
        ({"tie": "paper"}, (), r"soup\.tie is no option of the recipe greedy: did you mean 'ties'"),
        ({"recipe": "learned"}, (), r"soup\.recipe=learned is not for programs of your own"),
        ({"foreign": "keep"}, (), r"soup\.foreign=keep"),
    ],
)
def test_options_that_do_nothing_are_refused_by_name(options: dict, given: tuple, message: str) -> None:
    defaults = {"recipe": "greedy", "metric": "accuracy", "foreign": "refuse", "exclude": [], "batchnorm": "average", "racing": None,
                "barrier": False, "landscape": False, "grid": 9, "batchnorm_batches": 32, "ties": "official"}  # fmt: skip
    check_options(defaults)
    with pytest.raises(ConfigError, match=message):
        check_options({**defaults, **options}, given)


class Tiny(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)


def quiet_trainer(**options) -> pl.Trainer:
    return pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", **options)


def test_a_fit_is_taken_over_and_given_back() -> None:
    original = pl.Trainer.fit
    seen: list[Fit] = []
    trainer, module, loader = quiet_trainer(), Tiny(), object()
    with fits_go_to(seen.append):
        trainer.fit(module, loader, val_dataloaders=loader)
    assert pl.Trainer.fit is original
    (fit,) = seen
    assert fit.trainer is trainer and fit.module is module and fit.processes == 1
    assert fit.arguments == {"train_dataloaders": loader, "val_dataloaders": loader}
    weights = fit.initial_weights()
    module.layer.weight.data.zero_()
    assert weights["layer.weight"].abs().sum() > 0, "a copy"
    with pytest.raises(RuntimeError), fits_go_to(lambda fit: (_ for _ in ()).throw(RuntimeError("stop"))):
        trainer.fit(module)
    assert pl.Trainer.fit is original
    with fits_go_to(seen.append):
        trainer.fit(module, ckpt_path="last.ckpt")
    with pytest.raises(ConfigError, match=r"ckpt_path='last\.ckpt'"):
        seen[1].check()


def test_a_program_travels_to_other_processes() -> None:
    def function(config) -> int:
        return config + 1

    program = ProgramTask.of(function)
    assert cloudpickle.loads(cloudpickle.dumps(program)).function(1) == 2
    assert program.name.endswith("function") and program.module == __name__
