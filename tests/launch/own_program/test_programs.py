"""Whole programs, nothing in which knows of soups, run as their authors run them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from soups.reporting import SoupReport
from soups.stores.pool import Pool
from tests.launch.conftest import ROOT, read_run

PROGRAMS = Path(__file__).parent / "programs"
Run = Callable[..., str]
pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def python_train(program: str, *arguments: str, code: int = 0) -> str:
        folder = tmp_path / program
        if not folder.exists():
            shutil.copytree(PROGRAMS / program, folder, ignore=shutil.ignore_patterns("__pycache__"))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
        done = subprocess.run(
            [sys.executable, "train.py", *arguments], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False, timeout=500,
        )  # fmt: skip
        assert done.returncode == code, done.stdout
        assert "Traceback" not in done.stdout, done.stdout
        return " ".join(done.stdout.split())

    return python_train


def test_a_program_from_the_template(run: Run, tmp_path: Path) -> None:
    text = run("template", "+soup=greedy", "sweep.size=2", "logger=wandb", "callbacks=[default,ema,lawa]")
    folder = tmp_path / "template"
    assert "selected by val/acc, larger is better" in text and "2 to fine-tune" in text
    records = Pool(folder / "pools" / "train").ingredients()
    assert len(records) == 2 and all("failed after the fit" not in record.notes for record in records)
    assert {record.split for record in records} == {records[0].split} and len(records[0].history) == 2

    (soup,) = (folder / "outputs" / "soups").iterdir()
    report = SoupReport.load(soup)
    assert report.row("best single").value("heldout", "val/acc") == max(r.heldout("val/acc") for r in records)
    assert report.splits["heldout"] == 400 and report.row("greedy soup").value("test", "test/acc") is not None
    assert "val/acc_best" not in (soup / "results.csv").read_text().splitlines()[0]
    assert any("val/acc_best" in warning and "remember" in warning for warning in report.warnings)

    # One run an ingredient, in one group, and nothing of the rehearsal.
    runs = sorted(folder.glob("multirun/*/*/*/wandb/offline-run-*"))
    assert len(runs) == 2 == len(list(folder.rglob("offline-run-*")))
    content = [json.loads(line) for path in runs for line in read_run(path).splitlines()]
    started = [one["run"] for one in content if one.get("type") == "run"]
    assert {one["run_group"] for one in started} == {"train"} and len({one["run_id"] for one in started}) == 2
    assert not [path for path in folder.rglob("*") if path.name in ("start", "rehearsal") and "pools" not in path.parts]


def test_a_potential_of_the_older_package_in_its_jobs_folder(run: Run, tmp_path: Path) -> None:
    text = run("potential", "+soup=greedy", "sweep.size=2")
    folder = tmp_path / "potential"
    assert "selected by val/rmse, smaller is better" in text and "strict=False" in text and "_extra_state" in text
    pool = Pool(folder / "pools" / "train")  # beside the program, and in no job's folder
    first = {record.fingerprint: record.heldout("val/rmse") for record in pool.ingredients()}
    (soup,) = (folder / "outputs" / "soups").iterdir()
    report = SoupReport.load(soup)
    assert len(first) == 2 and report.row("best single").value("heldout", "val/rmse") == min(first.values())
    assert (report.row("greedy soup").value("heldout", "val/rmse") or 9) <= min(first.values())

    # Other data are other ingredients and another soup; and back again the first ones are found.
    other = run("potential", "+soup=greedy", "sweep.size=2", "data.seed=7")
    assert "0 of 2 ingredients found" in other and len(pool.ingredients()) == 4
    back = run("potential", "+soup=greedy", "sweep.size=2")
    assert "2 of 2 ingredients found" in back and str(soup) in back.replace(" ", "")
    everything = run("potential", "+soup=uniform", "sweep.size=0", code=1)
    assert "2 of the 4 ingredients" in everything and "validated on other data (their contents differ)" in everything


def test_several_fits_and_none(run: Run, tmp_path: Path) -> None:
    named = ["+ingredient.monitor=val/rmse", "+ingredient.mode=min", "+soup=uniform", "sweep.size=1"]
    two = run("potential", *named, "warm_up=true", "+pool.path=pools/two")
    assert "calls trainer.fit 2 times on one module; the ingredients are the weights after the last" in two
    (record,) = Pool(tmp_path / "potential" / "pools" / "two").ingredients()
    assert len(record.history) == 3, "of the fit that counts"
    another = run("potential", *named, "warm_up=another", "+pool.path=pools/another", code=1)
    assert "fits several modules (Energy, then Energy)" in another and "++ingredient.fit=1, 2" in another
    assert not Pool(tmp_path / "potential" / "pools" / "another").ingredients(), "no soup of the warm-up"
    own = run("potential", *named, "warm_up=loop", code=1)
    assert "takes a step of Adam before it calls Trainer.fit" in own
