"""Every example runs as it stands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from soups.stores import open_store
from tests.merging.llama import write_family

ROOT = Path(__file__).parents[1]
CONFIGURATIONS = sorted((ROOT / "examples/merge").glob("*.yaml"))


def run(*command: str | Path, folder: Path) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "150",
        "WANDB_MODE": "disabled",
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_family(folder)
    return folder


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda path: path.stem)
def test_merge_configurations(configuration: Path, models: Path) -> None:
    out = models / f"out-{configuration.stem}"
    run("-m", "soups.cli", "merge", configuration, out, folder=models)
    layers = 6 if configuration.stem == "stack" else 4
    with open_store(out) as store, open_store(models / "m1") as one:
        assert sum("q_proj" in key for key in store) == layers
        assert all(str(store.meta(key).dtype) == "torch.bfloat16" for key in store)
        key = "model.layers.0.mlp.up_proj.weight"
        assert store.read(key).equal(one.read(key).bfloat16()) == (configuration.stem == "stack")


def test_each_example_is_listed() -> None:
    text = (ROOT / "examples/README.md").read_text()
    here = {path.name for path in (ROOT / "examples").iterdir()} | {f"merge/{path.name}" for path in CONFIGURATIONS}
    for name in here - {"README.md", "merge", "__pycache__"}:
        assert f"]({name}" in text, name
    assert len(CONFIGURATIONS) >= 5


@pytest.mark.slow
def test_the_lightning_script(tmp_path: Path) -> None:
    shown = run(ROOT / "examples/lightning_ema.py", folder=tmp_path)
    found = {name: float(value) for name, value in re.findall(r"^(\S+): (\d\.\d+)$", shown, flags=re.MULTILINE)}
    assert set(found) == {"accuracy", "accuracy_ema"} and min(found.values()) > 0.9
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_hydra_project(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples/hydra_project", tmp_path / "project")
    shown = run("train.py", "+soup=greedy", "sweep.size=2", folder=tmp_path / "project")
    assert "greedy" in shown and "2 to fine-tune" in shown
    assert list((tmp_path / "project").rglob("soup.safetensors"))
