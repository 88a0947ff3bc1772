"""A task that trains in a second: three digits as image files, a network of half a million weights, no pretraining."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image
from sklearn.datasets import load_digits

from soups.fitting.configuration import LoaderLayout, read_configuration
from soups.fitting.ingredient import fine_tune as fine_tune_run
from soups.fitting.run import Run, run_of
from soups.fitting.task import evaluation_batches
from soups.launch.settings import Settings, open_pool, resolve
from soups.reporting import SoupReport
from soups.soup_making.ingredients import choose_ingredients
from soups.soup_making.options import SoupOptions
from soups.soup_making.soup import make_soup
from soups.stores.pool import Ingredient, Pool
from soups.tasks.network import Network
from tests.devices import ACCELERATOR

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root/<class>/<image>.png: digits 0, 1 and 2, 40 each, 16×16 pixels."""
    root = tmp_path_factory.mktemp("digits")
    bunch = load_digits()
    for label in range(3):
        (root / str(label)).mkdir()
        for number, picture in enumerate(bunch.images[bunch.target == label][:40]):
            Image.fromarray((picture * 15).astype(np.uint8)).resize((16, 16)).save(
                root / str(label) / f"{number:02}.png"
            )
    return root


@pytest.fixture
def overrides(digit_files: Path, tmp_path: Path) -> list[str]:
    """Overrides of the tiny task; pool and outputs in this test's folder."""
    return [
        "data=image_folder", f"data.root={digit_files}", "data.corruptions=[noise]",
        "model=timm", "model.name=test_efficientnet", "model.pretrained=false",
        "loader.size=32", "loader.batch_size=8", "start.epochs=1", "start.optimizer.lr=1e-3",
        "trainer.max_epochs=1", f"trainer.accelerator={ACCELERATOR}", "trainer.threads=1", "tracking=off",
        f"pool.path={tmp_path}/pool", f"paths.output={tmp_path}/outputs",
    ]  # fmt: skip


@pytest.fixture
def settings(overrides: list[str]) -> Settings:
    """The tiny task's settings, with those of the greedy soup."""
    return compose_settings([*overrides, "+soup=greedy"])


def compose_settings(overrides: list[str]) -> Settings:
    """Compose and resolve the repository's configuration."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return resolve(compose("train", overrides))


def run_with(settings: Settings) -> Run:
    """The run of some settings, checked."""
    return run_of(read_configuration(settings))


def fine_tune(settings: Settings) -> Ingredient:
    """Fine-tune in this process, without a display."""
    return fine_tune_run(run_with(settings), show_progress=False)


def soup_of(settings: Settings) -> tuple[SoupReport, Path]:
    """Make the soup of some settings."""
    return make_soup(run_with(settings))


def chosen(settings: Settings, pool: Pool | None = None) -> list[Ingredient]:
    """The ingredients that the settings' soup is made of."""
    options = SoupOptions.read(settings["soup"])
    return choose_ingredients(run_with(settings), options, pool or open_pool(settings)).ingredients


def heldout_batches(settings: Settings, network: Network) -> list:
    """The held-out split of some settings."""
    loader = LoaderLayout(eval_batch_size=settings["loader"]["eval_batch_size"])
    return evaluation_batches(run_with(settings).splits.heldout, network, settings["loader"]["size"], loader)


def read_run(folder: Path, *options: str) -> str:
    """Return the records of a run that wandb kept offline, as JSON, read back by wandb itself."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", *options, "--json", str(folder)]
    return subprocess.run(command, text=True, capture_output=True, check=True, stdin=subprocess.DEVNULL).stdout


@pytest.fixture
def train_py(overrides: list[str]) -> Callable[..., subprocess.CompletedProcess]:
    """Run `python train.py` on the tiny task, as a user would; returns the finished process with its output."""

    def run(*arguments: str, **options) -> subprocess.CompletedProcess:
        flags = [argument for argument in arguments if argument.startswith("-")]  # argparse wants them first
        rest = [argument for argument in arguments if not argument.startswith("-")]
        command = [sys.executable, str(ROOT / "train.py"), *flags, *overrides, *rest]
        environment = {**os.environ, "COLUMNS": "140", "PYTHONPATH": str(ROOT), **options.pop("env", {})}
        return subprocess.run(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            timeout=400, **options,
        )  # fmt: skip

    return run


# The sweep of the end-to-end tests: four members that differ in what a user would vary.
SWEEP = [
    "+soup=greedy", "sweep.size=4", "sweep.space.trainer.max_epochs=null",
    "sweep.space.augment.magnitude='range(0,3)'",
]  # fmt: skip
