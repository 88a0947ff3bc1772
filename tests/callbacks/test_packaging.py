"""The documented import, the configuration files, and the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from soups.averaging import load_averaged
from soups.callbacks import EMA, LAWA
from soups.commands.averages import app
from soups.stores import read_safetensors

ROOT = Path(__file__).resolve().parents[2]


def test_import_beside_a_projects_own_callbacks(tmp_path):
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks/__init__.py").write_text("MINE = True\n")
    program = (
        "import callbacks; from soups.callbacks import EMA, Mixout; import soups.callbacks as again;"
        "assert callbacks.MINE and EMA(decay=0.9).settings.name == 'ema' and EMA is again.EMA; print(EMA.__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "soups.callbacks.ema"


def test_one_class_whichever_way_it_is_imported():
    program = "import callbacks, soups.callbacks; assert callbacks.EMA is soups.callbacks.EMA"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "chosen", [["ema"], ["ema", "lawa"], ["ema", "swa", "lawa", "posthoc_ema", "trajectory", "mixout"]]
)
def test_a_list_of_configuration_files_composes_and_trains(tmp_path, toy, chosen):
    hydra = pytest.importorskip("hydra")
    from omegaconf import OmegaConf

    (tmp_path / "main.yaml").write_text(f"defaults:\n  - callbacks: {chosen}\n  - _self_\n")
    (tmp_path / "callbacks").symlink_to(ROOT / "conf/callbacks")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = hydra.compose("main")
    assert list(config.callbacks) == chosen
    made = hydra.utils.instantiate(OmegaConf.to_container(config.callbacks))
    module = toy.Toy(lr=0.001)
    trainer = toy.trainer(tmp_path, *made.values())
    trainer.fit(module)
    assert "val/loss_ema" in trainer.callback_metrics


def test_every_configuration_file_names_its_class_and_key():
    files = sorted((ROOT / "conf/callbacks").glob("*.yaml"))
    assert {path.stem for path in files} == {"ema", "swa", "lawa", "posthoc_ema", "trajectory", "mixout"}
    for path in files:
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# ") and lines[1] == f"{path.stem}:"


def test_command_line(tmp_path, toy):
    trainer = toy.trainer(tmp_path, EMA(decay=0.9), LAWA(k=2))
    trainer.fit(toy.Toy())
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    listed = CliRunner().invoke(app, ["averages", str(path)])
    assert listed.exit_code == 0 and all(word in listed.stdout for word in ("raw", "ema", "lawa", "18"))
    target = tmp_path / "model.safetensors"
    done = CliRunner().invoke(app, ["export", str(path), "--which", "lawa", "--to", str(target)])
    assert done.exit_code == 0 and target.name in done.stdout
    wanted = load_averaged(path, "lawa")
    found = read_safetensors(target)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
