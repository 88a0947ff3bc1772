"""Fits, sweeps and soups on one GPU. The other tests of this folder run there with `SOUPS_TEST_ACCELERATOR=gpu`."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soups.launch.settings import open_pool
from soups.stores import read_safetensors
from soups.stores.pool import Ingredient, Pool
from soups.weights import mean
from tests.launch.conftest import SWEEP, compose_settings, fine_tune

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def test_a_sweep_gives_what_the_cpu_gives_up_to_rounding_also_under_nccl(
    train_py: Callable[..., subprocess.CompletedProcess], tmp_path: Path
) -> None:
    ways = {
        "cpu": ["trainer.accelerator=cpu"],
        "gpu": ["trainer.accelerator=gpu"],
        "again": ["trainer.accelerator=gpu"],
        "nccl": ["trainer.accelerator=gpu", "trainer.strategy=ddp"],
        "two at once": ["trainer.accelerator=gpu", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    }
    found: dict[str, dict[str, Ingredient]] = {}
    soups: dict[str, dict[str, torch.Tensor]] = {}
    for way, more in ways.items():
        place = tmp_path / way.replace(" ", "-")
        done = train_py(*SWEEP, *more, f"pool.path={place}/pool", f"paths.output={place}/outputs")
        assert done.returncode == 0, done.stdout
        pool = Pool(place / "pool")
        found[way] = {record.fingerprint: record for record in pool.ingredients()}
        (folder,) = (place / "outputs/soups").iterdir()
        soups[way] = read_safetensors(folder / "soup.safetensors")
        members = json.loads((folder / "report.json").read_text())["members"]
        wanted = mean([pool.weights(name) for name in members])
        assert all(torch.equal(soups[way][name], tensor) for name, tensor in wanted.items())
    assert {record.layout["accelerator"] for record in found["gpu"].values()} == {"CUDAAccelerator"}
    assert {record.layout["strategy"] for record in found["nccl"].values()} == {"DDPStrategy"}
    for way in ways:
        # The start's bits are in an ingredient's name, and a GPU's are others; what was drawn for it is the same.
        cpu = {drawn(record): Pool(tmp_path / "cpu/pool").weights(name) for name, record in found["cpu"].items()}
        pool = Pool(tmp_path / way.replace(" ", "-") / "pool")
        assert {drawn(record) for record in found[way].values()} == cpu.keys()
        for name, record in found[way].items():
            weights = pool.weights(name)
            for key, tensor in cpu[drawn(record)].items():
                assert torch.allclose(weights[key].float(), tensor.float(), rtol=1e-2, atol=2e-3), (way, key)
            if way in ("again", "two at once"):
                assert record.weights == found["gpu"][name].weights, "the same bits in every process"
    for way in ("again", "two at once"):
        assert all(torch.equal(soups[way][name], tensor) for name, tensor in soups["gpu"].items())


def drawn(record: Ingredient) -> str:
    return json.dumps([record.config[key] for key in ("optimizer", "seed", "augment", "task")], sort_keys=True)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_leaves_an_average_in_float32(precision: str, overrides: list[str]) -> None:
    settings = compose_settings([
        *overrides, "trainer.accelerator=gpu", f"trainer.precision={precision}", "callbacks=[ema]",
        "ingredient.weights=ema",
    ])  # fmt: skip
    record = fine_tune(settings)
    weights = open_pool(settings).weights(record.fingerprint, verify=True)
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}
    plain = compose_settings([*overrides, "trainer.accelerator=cpu", "callbacks=[ema]", "ingredient.weights=ema"])
    exact = open_pool(plain).weights(fine_tune(plain).fingerprint)
    for name, tensor in exact.items():
        # a step moves a weight by at most the rate, 1e-3; in float16 the first ones are skipped until the scale fits
        assert torch.allclose(weights[name].float(), tensor.float(), rtol=0, atol=2e-2), name


def test_fits_in_one_process_leave_no_memory_behind(overrides: list[str]) -> None:
    import gc

    used = []
    for seed in range(3):
        settings = compose_settings([*overrides, "trainer.accelerator=gpu", f"seed={seed}", "callbacks=[ema,lawa]"])
        fine_tune(settings)
        gc.collect()
        used.append(torch.cuda.memory_allocated())
    assert used[2] <= used[0] + (1 << 20), used
