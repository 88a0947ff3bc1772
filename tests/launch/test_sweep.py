"""The main job from the command line: found again, killed and resumed bit for bit, on every launcher, and with mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

from soups.reporting import SoupReport, flatten
from soups.stores import read_safetensors, write_safetensors
from soups.stores.pool import Pool
from soups.tracking.workspace import metrics_of, sections
from tests.devices import ACCELERATOR
from tests.launch.conftest import ROOT, SWEEP, read_run

pytestmark = pytest.mark.slow
two_devices = pytest.mark.skipif(ACCELERATOR == "gpu", reason="two processes need two GPUs")

Run = Callable[..., subprocess.CompletedProcess]


def soup_folder(base: Path) -> Path:
    folders = list((base / "outputs" / "soups").iterdir())
    assert len(folders) == 1
    return folders[0]


def soup_hash(base: Path) -> str:
    return json.loads((soup_folder(base) / "report.json").read_text())["lineage"]["soup"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `finished_sweep` keeps its pool and outputs; made once for this file."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def finished_sweep(finished: Path, train_py: Run) -> Path:
    if not (finished / "log").exists():
        done = train_py(*SWEEP, f"pool.path={finished}/pool", f"paths.output={finished}/outputs")
        assert done.returncode == 0, done.stdout
        (finished / "log").write_text(done.stdout)
    return finished


def test_the_job_ends_in_a_soup_that_loads(finished_sweep: Path) -> None:
    text = (finished_sweep / "log").read_text()
    folder = soup_folder(finished_sweep)
    for expected in (
        "linear probe",
        "shared start",
        "mean of ingredients",
        "best single",
        "uniform soup",
        "greedy soup",
    ):
        assert expected in text
    assert "logit ensemble" in text and "[4/4]" in text and str(folder) in text
    names = {"soup.safetensors", "report.json", "results.csv", "config.json", "scatter.png", "greedy_path.png",
             "page.json", "report.html"}  # fmt: skip
    assert {path.name for path in folder.iterdir()} == names

    report = json.loads((folder / "report.json").read_text())
    pool = Pool(finished_sweep / "pool")
    assert len(pool.ingredients()) == 4 and len(report["ingredients"]) == 4
    rows = {row["name"]: row for row in report["rows"]}
    accuracies = [pool.ingredient(name).heldout() for name in report["ingredients"]]
    assert rows["best single"]["accuracy"]["heldout"] == max(accuracies)
    assert rows["mean of ingredients"]["accuracy"]["heldout"] == pytest.approx(sum(accuracies) / 4)
    assert rows["greedy soup"]["accuracy"]["heldout"] >= max(accuracies)

    # The soup is the float64 mean of its members, and timm loads it in the documented line.
    members = [pool.weights(name, verify=True) for name in report["members"]]
    soup = read_safetensors(folder / "soup.safetensors")
    for name, tensor in soup.items():
        if tensor.is_floating_point():
            exact = torch.stack([member[name].double() for member in members]).mean(0)
            assert torch.equal(tensor, exact.float()), name
    model = timm.create_model("test_efficientnet", num_classes=3, checkpoint_path=str(folder / "soup.safetensors"))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in soup.items())


def test_the_same_command_finds_everything(finished_sweep: Path, train_py: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_sweep.rglob("*.safetensors")}
    done = train_py(*SWEEP, f"pool.path={finished_sweep}/pool", f"paths.output={finished_sweep}/outputs")
    assert done.returncode == 0 and "4 of 4 ingredients found, 0 to fine-tune" in done.stdout
    assert "greedy soup" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in finished_sweep.rglob("*.safetensors")} == before


def test_selection_never_sees_the_test_split(finished_sweep: Path, settings, digit_files: Path) -> None:
    """Ingredient records hold held-out numbers only: there is no test number that selection could read."""
    for record in Pool(finished_sweep / "pool").ingredients():
        assert set(record.metrics) == {"heldout"}


@pytest.mark.parametrize("moment", ["before the first ingredient", "between ingredients", "while cooking"])
def test_kill_and_resume_is_bit_identical(
    moment: str, finished_sweep: Path, overrides: list[str], tmp_path: Path, train_py: Run
) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *overrides, *SWEEP]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pool = Pool(tmp_path / "pool")
    progress = tmp_path / "pool" / "progress"

    def reached() -> bool:
        if moment == "before the first ingredient":
            return progress.exists()
        if moment == "between ingredients":
            return len(pool.ingredients()) >= 2
        return len(pool.ingredients()) == 4 and any((tmp_path / "pool" / "predictions").glob("*"))

    deadline = time.monotonic() + 200
    while not reached():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {record.fingerprint: record.created for record in pool.ingredients()}
    assert not (tmp_path / "outputs" / "soups").exists() or not list((tmp_path / "outputs" / "soups").glob("[!.]*"))

    done = train_py(*SWEEP)
    assert done.returncode == 0, done.stdout
    assert f"{len(kept)} of 4 ingredients found" in done.stdout
    after = {record.fingerprint: record for record in pool.ingredients()}
    assert all(after[name].created == created for name, created in kept.items()), "finished ingredients are not redone"
    expected = {record.fingerprint: record.weights for record in Pool(finished_sweep / "pool").ingredients()}
    assert {name: record.weights for name, record in after.items()} == expected
    assert soup_hash(tmp_path) == soup_hash(finished_sweep)


def test_joblib_makes_the_same_ingredients_and_soup(finished_sweep: Path, train_py: Run, tmp_path: Path) -> None:
    done = train_py(*SWEEP, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert done.returncode == 0, done.stdout
    expected = {record.fingerprint: record.weights for record in Pool(finished_sweep / "pool").ingredients()}
    assert {record.fingerprint: record.weights for record in Pool(tmp_path / "pool").ingredients()} == expected
    assert soup_hash(tmp_path) == soup_hash(finished_sweep)


@two_devices
def test_two_processes_over_the_same_pool_cook_the_same_soup(
    finished_sweep: Path, train_py: Run, tmp_path: Path
) -> None:
    shutil.copytree(finished_sweep / "pool", tmp_path / "pool")
    shutil.rmtree(tmp_path / "pool" / "predictions")
    done = train_py(*SWEEP, "trainer.devices=2", "trainer.strategy=ddp")
    assert done.returncode == 0, done.stdout
    assert "4 of 4 ingredients found" in done.stdout
    assert soup_hash(tmp_path) == soup_hash(finished_sweep)
    first, second = ((soup_folder(base) / "results.csv").read_text() for base in (tmp_path, finished_sweep))
    assert first == second, "every number of the table is the same on two processes"


@two_devices
def test_two_processes_train_the_whole_job(finished_sweep: Path, train_py: Run, tmp_path: Path) -> None:
    done = train_py(*SWEEP, "sweep.size=2", "trainer.devices=2", "trainer.strategy=ddp")
    assert done.returncode == 0, done.stdout
    single = {record.fingerprint: record for record in Pool(finished_sweep / "pool").ingredients()}
    pool = Pool(tmp_path / "pool")
    assert len(pool.ingredients()) == 2
    assert len({record.layout["process"] for record in pool.ingredients()}) == 1, (
        "one fit after another in the same two"
    )
    for record in pool.ingredients():
        # The batch is global and randomness is by sample, so two processes train the same model up to rounding.
        assert record.layout["world_size"] == 2
        assert record.metrics["heldout"]["count"] == single[record.fingerprint].metrics["heldout"]["count"]
        one, two = pool.weights(record.fingerprint), Pool(finished_sweep / "pool").weights(record.fingerprint)
        for name, tensor in one.items():
            assert torch.allclose(tensor.float(), two[name].float(), rtol=1e-2, atol=1e-3), name


def test_a_single_run_and_a_multirun_join_the_pool(train_py: Run, tmp_path: Path) -> None:
    done = train_py()
    assert done.returncode == 0 and "is finished: held-out accuracy" in done.stdout, done.stdout
    again = train_py()
    assert "was in the pool already" in again.stdout
    done = train_py("-m", "optimizer.lr=1e-4,2e-4", "seed=0,1")
    assert done.returncode == 0, done.stdout
    assert len(Pool(tmp_path / "pool").ingredients()) == 4, "one of the four is the single run's"
    done = train_py("+soup=uniform", "sweep.size=0")
    assert done.returncode == 0, done.stdout
    assert "The uniform soup averages 4 of 4 ingredients" in done.stdout


def no_traceback(done: subprocess.CompletedProcess, *expected: str, code: int = 1) -> None:
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    flat = " ".join(done.stdout.split())
    for text in expected:
        assert text in flat, done.stdout


def test_mistakes_are_told_without_a_traceback(train_py: Run, tmp_path: Path) -> None:
    no_traceback(train_py("optimzer.lr=1e-4"), "optimzer is no setting: did you mean 'optimizer'")
    no_traceback(train_py("+soup=greedy", "optimizer.lrr=1e-4"), "lrr")
    no_traceback(
        train_py("+soup=greedy", "+sweep.space.optimizer.lrr='interval(0.1,0.2)'"),
        "optimizer.lrr is no setting: did you mean 'lr'",
    )
    no_traceback(train_py("+soup=greedy", "sweep.space.seed='range(0'"), "override")
    no_traceback(train_py("+soup=greedy", "data.root=/nowhere"), "data.root=/nowhere is not a folder")
    no_traceback(train_py("optimizer.lr=-1"), "optimizer.lr=-1 must be a positive number")
    no_traceback(train_py("model.name=resnet81"), "timm has no model 'resnet81'")
    no_traceback(train_py("tracking.mode=onlin"), "tracking.mode=onlin", "did you mean 'online'")
    no_traceback(train_py("+soup=greedy", "sweep.size=0"), "holds no ingredients to average")
    assert Pool(tmp_path / "pool").ingredients() == []


def test_some_failed(train_py: Run, tmp_path: Path, digit_files: Path) -> None:
    """A learning rate that diverges fails its ingredient; the rest is cooked, and the exit code says so."""
    arguments = ["-m", "+soup=greedy", "sweep.method=grid", "sweep.space=null", "optimizer.lr=1e-4,1e30", "seed=0,1"]
    done = train_py(*arguments)
    no_traceback(done, "2 ingredients failed and are not in the soup", "non-finite", "lr=1e+30", code=3)
    assert "greedy soup of 2 ingredients" in done.stdout.lower()
    failures = list((tmp_path / "pool" / "failures").iterdir())
    assert len(failures) == 2
    done = train_py("+soup=greedy", "optimizer.lr=1e30", "sweep.size=2", f"pool.path={tmp_path}/other")
    no_traceback(done, "All 2 ingredients failed, so there is no soup", "non-finite")


def test_damaged_ingredients_and_foreign_ones(finished_sweep: Path, train_py: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_sweep / "pool", tmp_path / "pool")
    pool = Pool(tmp_path / "pool")
    victim = pool.ingredients()[0]
    path = tmp_path / "pool" / "ingredients" / victim.fingerprint / "weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    no_traceback(train_py(*SWEEP), f"{victim.fingerprint}/weights.safetensors has 1000 bytes", "Remove the folder")

    weights = read_safetensors(finished_sweep / "pool" / "ingredients" / victim.fingerprint / "weights.safetensors")
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    next(tensor for tensor in weights.values() if tensor.is_floating_point()).fill_(float("nan"))
    write_safetensors(path, weights, {"fingerprint": victim.fingerprint})
    assert path.stat().st_size == len(whole)
    no_traceback(train_py(*SWEEP), "non-finite values", victim.fingerprint)
    path.write_bytes(whole)

    done = train_py("+soup=greedy", "sweep.size=0", "start.optimizer.lr=5e-4")
    no_traceback(done, "4 of the 4 ingredients", "another start", "start.optimizer: ", "soup.exclude")
    done = train_py("+soup=greedy", "sweep.size=1", "start.optimizer.lr=5e-4", "soup.foreign=skip")
    assert done.returncode == 0 and "Greedy soup of 1 ingredients" in done.stdout, done.stdout


def test_an_unreadable_image_is_named_and_nothing_is_lost(train_py: Run, tmp_path: Path, digit_files: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(digit_files, root)
    broken = root / "1" / "07.png"
    broken.write_bytes(broken.read_bytes()[:40])
    no_traceback(train_py(f"data.root={root}"), f"Cannot read the image {broken}")


def test_a_disk_that_fills_up_names_the_pool_and_loses_nothing(train_py: Run, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: it, too, fails a write in the middle."""
    code = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = train_py()
    assert done.returncode == 0, done.stdout
    pool = Pool(tmp_path / "pool")
    kept = pool.ingredients()
    command = [sys.executable, "-c", code, str(ROOT / "train.py"), *done.args[2:], "seed=5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    full = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert full.returncode == 1 and "Traceback" not in full.stderr, full.stderr
    assert "Cannot write" in full.stderr and str(tmp_path / "pool") in full.stderr, full.stderr
    assert pool.ingredients() == kept
    assert not [path for path in (tmp_path / "pool" / "ingredients").iterdir() if path.name.startswith(".")]


def test_a_file_where_the_pool_should_be(train_py: Run, tmp_path: Path) -> None:
    (tmp_path / "pool").write_text("mine")
    no_traceback(train_py(), "Cannot read the pool", "a part of the path is a file, not a folder: choose another place")
    assert (tmp_path / "pool").read_text() == "mine"


def test_wandb_keeps_a_run_for_each_ingredient_and_one_for_the_soup(train_py: Run, tmp_path: Path) -> None:
    done = train_py(*SWEEP, "sweep.size=2", "tracking=wandb")
    assert done.returncode == 0 and "is finished, but" not in done.stdout, done.stdout
    runs = sorted((tmp_path / "outputs" / "wandb").glob("offline-run-*"))
    assert len(runs) == 3
    pool = Pool(tmp_path / "pool")
    records = {record.fingerprint[:16]: record for record in pool.ingredients()}
    report = SoupReport.load(next((tmp_path / "outputs" / "soups").glob("*/")))
    drawn: set[str] = set()
    for run in runs:
        found = json.loads(read_run(run, "--summary"))
        identity = run.name.partition("-")[2].split("-", 2)[2]
        summary, config = found["summary"], found["config"]
        raw = [json.loads(line) for line in read_run(run).splitlines()]
        about = next(record["run"] for record in raw if record["type"] == "run")
        assert about["run_group"] == "pool", "the pool's name"
        drawn |= set(summary) | {f"config:{key}" for key in flatten(config)}
        drawn |= {key for record in raw if record["type"] == "history" for key in record["history"]["item"]}
        if identity in records:
            record = records.pop(identity)
            assert summary["heldout/accuracy"] == pytest.approx(record.heldout(), abs=1e-9)
            assert summary["seconds/fit"] == pytest.approx(record.durations["fit"])
            assert about["job_type"] == "ingredient"
        else:
            soup, best = report.row("greedy soup"), report.row("best single")
            assert summary["test/accuracy"] == pytest.approx(soup.accuracy["test"])
            assert summary["gain/ood"] == pytest.approx(soup.ood - best.ood)
            assert summary["greedy soup/test"] == summary["test/accuracy"] and config["lineage"]["soup"]
            assert about["job_type"] == "soup"
    assert records == {}, "every ingredient has a run"
    media = tmp_path / "outputs" / "wandb"
    assert len(list(media.rglob("media/images/**/*.png"))) == 2 and len(list(media.rglob("media/html/*.html"))) == 1
    tables = [json.loads(path.read_text()) for path in media.rglob("media/table/**/*.json")]
    ingredients = next(table for table in tables if "in the soup" in table["columns"])
    assert sorted(row[0] for row in ingredients["data"]) == sorted(record.short for record in pool.ingredients())
    pytest.importorskip("wandb_workspaces")
    for title, panels in sections().items():
        assert metrics_of(panels) <= drawn, f"panels of {title!r} draw what no run has"
