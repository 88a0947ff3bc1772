"""Merges on a GPU against the same merges on the CPU, for every row of `settings.py`."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from soups.cli import app
from soups.errors import WeightsError
from soups.merging import make_method, merge
from soups.merging.methods.svd import svd
from soups.stores import read_safetensors, write_safetensors
from tests.merging import models
from tests.merging.settings import ROWS

pytestmark = pytest.mark.gpu
every = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}{row.parameters or ''}")


def run(row, base, experts, **options):
    return merge(make_method(row.name, **row.parameters), experts, base=base if row.base else None, **options)


# Methods that choose elements by comparing numbers that were rounded on the way: in bfloat16, where many are equal or cancel,
# the last bit decides for a few.
CHOOSE = ("dare_ties", "sce", "arcee_fusion")
# Methods that sum float32 numbers over rows: CUDA's sums depend in the last bit on how many rows there are.
SUM = ("filter_wise", "flatten")


def differences(left, right):
    """Return differences in units of a tensor's largest element."""
    return torch.cat([
        ((left[name].double() - right[name].double()).abs() / (right[name].double().abs().max() + 1e-12)).reshape(-1)
        for name in models.SHAPES
    ])  # fmt: skip


def error(left, right):
    return float(differences(left, right).max())


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_result_is_the_cpus(row, dtype):
    base, experts = models.family(row.models, dtype)
    found, wanted = run(row, base, experts, device="cuda"), run(row, base, experts)
    assert list(found) == list(wanted) and found["head.weight"] is found["embed.weight"]
    assert all(found[name].dtype == wanted[name].dtype and not found[name].is_cuda for name in wanted)
    limit = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    if dtype == torch.bfloat16 and row.name in CHOOSE:
        assert float((differences(found, wanted) > limit).double().mean()) < 2e-3
    else:
        assert error(found, wanted) < limit


@every
def test_bits_depend_on_neither_budget_nor_threads(row):
    base, experts = models.family(row.models)
    whole = run(row, base, experts, device="cuda", budget=1 << 40, threads=1)
    streamed = run(row, base, experts, device="cuda", budget=1, threads=3)
    if any(part in f"{row.name}{row.parameters}" for part in SUM):
        assert error(streamed, whole) < 1e-6
    else:
        assert all(torch.equal(streamed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (200, 200)], ids=str)
@pytest.mark.parametrize("rank", [0, 3, None], ids=["zero", "low", "full"])
def test_singular_vectors_are_orthonormal_and_give_the_matrix_back(shape, rank):
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=draw)
    if rank is not None:
        matrix = torch.randn(shape[0], rank, generator=draw) @ torch.randn(rank, shape[1], generator=draw)
    u, s, vt = (part.cpu() for part in svd(matrix.cuda()))
    exact = torch.linalg.svdvals(matrix.double())
    scale = float(exact[0]) or 1.0
    eye = torch.eye(min(shape))
    assert u.dtype == torch.float32 and float(((u * s) @ vt - matrix).abs().max()) < 1e-6 * scale
    assert float((s - exact).abs().max()) < 1e-6 * scale
    assert float((u.T @ u - eye).abs().max()) < 1e-5 and float((vt @ vt.T - eye).abs().max()) < 1e-5


def test_several_workers_may_be_the_first_to_need_linear_algebra():
    """torch loads its CUDA library for that at the first call, and fails if two threads make it: hence a process of its own."""
    program = (
        "import torch; from soups.merging import merge;"
        "base = {str(n): torch.randn(64, 64) for n in range(32)};"
        "experts = [{n: t + torch.randn(64, 64) for n, t in base.items()} for _ in range(2)];"
        "merge('iso_c', experts, base=base, device='cuda', threads=8)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_line_takes_a_device(tmp_path):
    base, experts = models.family(2)
    for name, weights in zip("bxy", (base, *experts), strict=True):
        write_safetensors(tmp_path / f"{name}.safetensors", weights)
    (tmp_path / "merge.yml").write_text(
        f"merge_method: ties\nbase_model: {tmp_path}/b.safetensors\nparameters: {{density: 0.3, weight: 0.5}}\nmodels:\n"
        + "".join(f"- model: {tmp_path}/{name}.safetensors\n" for name in "xy")
    )
    for place in ("cpu", "cuda"):
        done = CliRunner().invoke(
            app, ["merge", str(tmp_path / "merge.yml"), str(tmp_path / place), "--device", place, "--quiet"]
        )
        assert done.exit_code == 0, done.output
    found, wanted = (read_safetensors(next((tmp_path / place).glob("*.safetensors"))) for place in ("cuda", "cpu"))
    assert error(found, wanted) < 2e-5


def test_what_is_not_finite_is_named_there_too():
    _, experts = models.family(2)
    experts[1]["matrix"] = experts[1]["matrix"].clone()
    experts[1]["matrix"][3, 7] = float("nan")
    with pytest.raises(WeightsError, match="'matrix' holds non-finite values"):
        merge("linear", experts, device="cuda")


def test_the_device_is_as_it_was_afterwards():
    base, experts = models.family(2)
    for name in ("ties", "tsv"):
        merge(name, experts, base=base, device="cuda")
    gc.collect()
    before = torch.cuda.memory_allocated()
    for name in ("ties", "della", "tsv", "karcher"):
        merge(name, experts, base=None if name == "karcher" else base, device="cuda")
    gc.collect()
    assert torch.cuda.memory_allocated() == before
