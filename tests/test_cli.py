"""The command line, as its users see it."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from soups.cli import app
from soups.stores import open_store, write_safetensors

ROOT = Path(__file__).parent.parent


@pytest.fixture
def models(tmp_path):
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        weights = {f"layers.{i}.w": torch.randn(4, 6, generator=generator) for i in range(3)}
        write_safetensors(tmp_path / f"{number}.safetensors", {**weights, "norm": torch.ones(3)}, {"made": "by hand"})
    (tmp_path / "merge.yml").write_text(
        f"models:\n- model: {tmp_path}/1.safetensors\n- model: {tmp_path}/2.safetensors\n"
        f"base_model: {tmp_path}/0.safetensors\nmerge_method: ties\nparameters: {{weight: 1, density: 0.5}}\n"
    )
    return tmp_path


def soups(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_merge(models):
    result = soups("merge", models / "merge.yml", models / "out")
    assert "read in" in result.output
    with open_store(models / "out") as store:
        assert sorted(store.keys()) == ["layers.0.w", "layers.1.w", "layers.2.w", "norm"]
    again = soups("merge", models / "merge.yml", models / "out", code=1)
    assert "already" in again.output and "Traceback" not in again.output
    soups("merge", models / "merge.yml", models / "out", "--overwrite", "--quiet", "--out-shard-size", "200")
    assert len(list((models / "out").glob("*.safetensors"))) == 2
    soups("merge", models / "merge.yml", models / "o2", "--allow-crimes", "--lazy-unpickle", "--lora-merge-cache", "x")


def test_a_merge_reports_on_a_page(models):
    soups("merge", models / "merge.yml", models / "out", "--report", models / "report.html", "--quiet")
    text = (models / "report.html").read_text()
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text)[1])
    curves, far, angle = data["figures"]
    assert list(curves["series"]) == ["0.safetensors", "1.safetensors", "2.safetensors"] and len(curves["x"]) == 4
    with open_store(models / "out") as out, open_store(models / "0.safetensors") as base:
        for number in range(3):
            a, b = out.read(f"layers.{number}.w"), base.read(f"layers.{number}.w")
            assert curves["series"]["0.safetensors"][number] == pytest.approx(
                float((a - b).norm() / b.norm()), rel=1e-5
            )
        moved = sum(float((out.read(key) - base.read(key)).square().sum()) for key in out) ** 0.5
    assert far["row_labels"] == ["start", "1.safetensors", "2.safetensors", "merged"]
    assert far["values"][0][3] == pytest.approx(moved, rel=1e-5) and angle["values"][2][2] == 1
    assert "ties of 2 models" in text and "merge_method: ties" in text


def test_a_dry_run_prints_the_plan_and_writes_nothing(models):
    before = sorted(models.iterdir())
    result = soups("merge", models / "merge.yml", models / "out", "--dry-run")
    assert "4  " in result.output and "to read  900 B" in result.output and "to write 300 B" in result.output
    assert sorted(models.iterdir()) == before


def test_errors_name_the_line_and_have_no_traceback(models):
    text = (models / "merge.yml").read_text()
    (models / "bad.yml").write_text(text.replace("merge_method: ties", "merge_method: tise"))
    result = soups("merge", models / "bad.yml", models / "out", code=1)
    assert "bad.yml, line 5: merge_method 'tise' is unknown; did you mean 'ties'" in result.output
    (models / "odd.yml").write_text(text + "colour: blue\n")
    assert "unknown key 'colour'" in soups("merge", models / "odd.yml", models / "out").output
    soups("merge", models / "odd.yml", models / "out2", "--strict", code=1)
    assert "is no size" in soups("merge", models / "merge.yml", models / "o", "--out-shard-size", "big", code=1).output
    assert "Give the output's folder" in soups("merge", models / "merge.yml", code=1).output


def test_inspect(models):
    result = soups("inspect", models / "0.safetensors")
    assert "75 parameters in 4 tensors (4 float32)" in result.output
    assert "layers.2" in result.output and "made: by hand" in result.output
    listed = json.loads(soups("inspect", models / "0.safetensors", "--tensors", "--json").output)
    assert listed["rows"]["layers.1.w"]["shape"] == [4, 6]
    kept = {"averages": {"ema": {"kind": "EMA", "count": 1, "weights": {"w": torch.ones(2)}}}}
    torch.save({"state_dict": {"w": torch.ones(2)}, "weight_averages": kept}, models / "a.ckpt")
    assert "weight_averages.averages.ema" in soups("inspect", models / "a.ckpt").output
    soups("inspect", models / "a.ckpt", "--state", "average:ema")
    assert "no checkpoint at" in soups("inspect", models / "nothing", code=1).output


def test_diff(models):
    assert "4 layers are equal" in soups("diff", models / "0.safetensors", models / "0.safetensors").output.replace(
        "0 layers differ, 4 are", "4 layers are"
    )
    with open_store(models / "0.safetensors") as store:
        weights = store.load()
    changed = {**weights, "layers.1.w": weights["layers.1.w"] * 1.5}
    write_safetensors(models / "changed.safetensors", changed)
    rows = json.loads(soups("diff", models / "0.safetensors", models / "changed.safetensors", "--json", code=0).output)[
        "rows"
    ]
    assert rows["layers.0"]["distance"] == 0
    assert rows["layers.1"]["distance"] == pytest.approx(0.5 * float(weights["layers.1.w"].norm()))
    result = soups("diff", models / "0.safetensors", models / "changed.safetensors", code=1)
    assert "5.000e-01" in result.output and "1.000000" in result.output
    write_safetensors(models / "less.safetensors", {"norm": torch.ones(3)})
    assert "3 missing" in soups("diff", models / "0.safetensors", models / "less.safetensors", code=1).output


def test_diff_draws_a_heatmap(models):
    pytest.importorskip("matplotlib")
    soups("diff", models / "0.safetensors", models / "1.safetensors", "--figure", models / "diff.png", code=1)
    assert (models / "diff.png").read_bytes()[:4] == b"\x89PNG"


def test_methods():
    assert "ties.official" in soups("methods").output
    assert "arXiv:2306.01708" in soups("methods", "ties").output
    assert json.loads(soups("methods", "--json").output)["ties"]["base"] == "required"
    assert "did you mean 'ties'" in soups("methods", "tise", code=1).output


def test_python_takes_the_same_configuration(models):
    import yaml

    import soups as package

    soups("merge", models / "merge.yml", models / "out")
    weights = package.merge(yaml.safe_load((models / "merge.yml").read_text()))
    with open_store(models / "out") as store:
        assert all(torch.equal(store.read(name), tensor) for name, tensor in weights.items())
    assert package.merge("linear", [weights, weights]).keys() == weights.keys()


@pytest.mark.slow
def test_help_is_quick_and_imports_no_torch():
    code = "import sys, soups.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "soups.cli", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0  # 0.3 s on an idle machine


@pytest.mark.slow
def test_kill_minus_nine_leaves_no_output_that_looks_whole(models):
    big = {"w": torch.zeros(3_000_000)}
    for number in range(3):
        write_safetensors(models / f"{number}.safetensors", big)
    code = (
        "import os, signal, soups.merging.stream as s\n"
        "old = s.check_finite\n"
        "def die(result, job, start, stop):\n"
        "    if start > 1_000_000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    old(result, job, start, stop)\n"
        "s.check_finite = die\n"
        f"import soups; soups.merge({str(models / 'merge.yml')!r}, {str(models / 'out')!r}, threads=1)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -9
    assert not (models / "out").exists()
    soups("merge", models / "merge.yml", models / "out")
    with open_store(models / "0.safetensors") as store:
        assert not store.read("w").any()


def test_cold_fusion_between_strangers(tmp_path):
    """Two contributors with checkpoints of their own kinds, one round, its log and its replay."""
    base = {"encoder.w": torch.zeros(3, 2), "encoder.b": torch.zeros(2)}
    write_safetensors(tmp_path / "base.safetensors", base)
    repo = tmp_path / "repo"
    assert "2 shared tensors" in soups("cold", "init", repo, tmp_path / "base.safetensors", "--quorum", 2).output
    assert "base 0" in soups("cold", "pull", repo, tmp_path / "pulled.safetensors").output
    trained = {name: tensor + 1 for name, tensor in open_store(tmp_path / "pulled.safetensors").load().items()}
    torch.save(
        {"state_dict": {f"model.{n}": t for n, t in trained.items()} | {"head": torch.ones(9)}}, tmp_path / "a.ckpt"
    )
    torch.save({name: tensor + 2 for name, tensor in trained.items()}, tmp_path / "b.pt")
    push = ("cold", "push", repo)
    assert "names under a prefix" in soups(*push, tmp_path / "a.ckpt", "--base", 0, "--contributor", "a", code=1).output
    soups(*push, tmp_path / "a.ckpt", "--base", 0, "--contributor", "a", "--prefix", "model.", "--task", "sums")
    assert "No round: 1 waiting, 2 must pass" in soups("cold", "fuse", repo).output
    assert (
        "never had the base 'abc'"
        in soups(*push, tmp_path / "b.pt", "--base", "abc", "--contributor", "b", code=1).output
    )
    assert "2 waiting, a round needs 2" in soups(*push, tmp_path / "b.pt", "--base", 0, "--contributor", "b").output
    assert "2 of 2 by linear" in soups("cold", "fuse", repo).output
    soups("cold", "pull", repo, tmp_path / "new.safetensors")
    with open_store(tmp_path / "new.safetensors") as store:
        assert store.metadata["cold.number"] == "1" and torch.equal(store.read("encoder.w"), torch.full((3, 2), 2.0))
    log = soups("cold", "log", repo).output
    assert "base 1" in log and "from base 0 norm" in log
    assert "round 1  2 contributions  same bits" in soups("cold", "replay", repo).output
    record = repo / "rounds" / "000001.json"
    record.write_text(
        record.read_text().replace('"scale":1.0', '"scale":0.5', 1).replace('"scale": 1.0', '"scale": 0.5', 1)
    )
    assert "did not come out as the log says" in soups("cold", "replay", repo, code=1).output
    assert (
        "--stale=often"
        in soups("cold", "init", tmp_path / "x", tmp_path / "base.safetensors", "--stale", "often", code=1).output
    )
    assert "soups cold init" in soups("cold", "log", tmp_path / "nowhere", code=1).output
