"""Every command tells a mistake in one paragraph, and shows names as they are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from soups.averaging import averages, load_averaged
from soups.cli import app
from soups.errors import SoupError
from soups.stores import open_store, read_safetensors
from soups.stores.collection import find_checkpoints

GGUF, HTML = b"GGUF\x03\x00\x00\x00" + bytes(600), b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 5\n"
FILES = {"a GGUF": GGUF, "a web page": HTML, "a Git LFS pointer": LFS, "is empty": b"", "begins with zeros": bytes(900),
         "JSON text": b'{"weights": 1}\n' * 60, "compressed archive": b"\x1f\x8b\x08" + bytes(600), "HDF5": b"\x89HDF\r\n" + bytes(99)}  # fmt: skip


def run(*arguments: object, code: int | None = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert code is None or result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("ending", [".safetensors", ".bin", ".ckpt", ".pt", "", ".gguf"])
@pytest.mark.parametrize("kind", FILES)
def test_files_of_other_kinds_are_named(kind: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{ending}"
    path.write_bytes(FILES[kind])
    for read in (open_store, lambda path: load_averaged(path, "raw"), averages):
        with pytest.raises(SoupError, match=kind):
            read(path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00001.safetensors"])
def test_also_among_the_shards_of_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(SoupError, match=r"Git LFS pointer.*git lfs pull"):
        open_store(tmp_path)


def mistakes(tmp: Path) -> dict[str, list[object]]:
    (tmp / "page.ckpt").write_bytes(HTML)
    (tmp / "file").write_text("x")
    (tmp / "empty").mkdir()
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp / "module.pt")
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp / "plain.ckpt")
    save_file({"w": torch.ones(2)}, tmp / "m.safetensors")
    (tmp / "bad.yml").write_text("merge_method: [")
    nothing = tmp / "nothing"
    return {
        "inspect": ["inspect", nothing], "inspect a page": ["inspect", tmp / "page.ckpt"],
        "inspect a module": ["inspect", tmp / "module.pt"], "inspect a state": ["inspect", tmp / "plain.ckpt", "--state", "average"],
        "inspect a folder": ["inspect", tmp / "empty"], "diff": ["diff", nothing, tmp / "m.safetensors"],
        "diff figure": ["diff", tmp / "m.safetensors", tmp / "m.safetensors", "--figure", tmp / "file" / "x.png"],
        "merge": ["merge", nothing, tmp / "out"], "merge bad": ["merge", tmp / "bad.yml", tmp / "out"],
        "merge folder": ["merge", tmp, tmp / "out"], "averages": ["averages", nothing], "averages page": ["averages", tmp / "page.ckpt"],
        "averages module": ["averages", tmp / "module.pt"], "averages folder": ["averages", tmp / "empty"],
        "export": ["export", tmp / "plain.ckpt", "--to", tmp / "o.pt"], "export ending": ["export", tmp / "plain.ckpt", "--to", tmp / "o.x"],
        "export place": ["export", tmp / "plain.ckpt", "--to", tmp / "file" / "o.pt", "--which", "raw"],
        "report": ["report", nothing], "report file": ["report", tmp / "file"], "pool ls": ["pool", "ls", nothing],
        "pool show": ["pool", "show", nothing, "aa"], "cold log": ["cold", "log", nothing], "cold fuse": ["cold", "fuse", nothing],
        "cold init": ["cold", "init", tmp / "repo", nothing], "cold pull": ["cold", "pull", nothing, tmp / "o.safetensors"],
        "methods": ["methods", "nothing"],
    }  # fmt: skip


@pytest.mark.parametrize("kind", [
    "inspect", "inspect a page", "inspect a module", "inspect a state", "inspect a folder", "diff", "diff figure", "merge",
    "merge bad", "merge folder", "averages", "averages page", "averages module", "averages folder", "export", "export ending",
    "export place", "report", "report file", "pool ls", "pool show", "cold log", "cold fuse", "cold init", "cold pull", "methods",
])  # fmt: skip
def test_a_mistake_is_one_paragraph(kind: str, tmp_path: Path) -> None:
    output = run(*mistakes(tmp_path)[kind], code=None).strip()
    if kind == "averages module":
        assert "Error:" in output or "raw" in output
    assert "Traceback" not in output and "\n\n" not in output, output
    assert output.startswith("Error: ") or "│" in output, output
    assert output.count("\n") <= 2 or kind == "merge bad", output


NAMES = ["[/data/plots].weight", "[bold]w[/bold].weight", "a[0].weight", "[red]", ":smile:.weight"]


def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path: Path) -> None:
    save_file({name: torch.full((2,), float(k)) for k, name in enumerate(NAMES)}, tmp_path / "[x].safetensors")
    save_file({name: torch.full((2,), float(k + 1)) for k, name in enumerate(NAMES)}, tmp_path / "[y].safetensors")
    for output in (
        run("inspect", tmp_path / "[x].safetensors", "--tensors"),
        run("diff", tmp_path / "[x].safetensors", tmp_path / "[y].safetensors", "--tensors", code=1),
    ):
        assert all(name in output for name in NAMES), output
    (tmp_path / "merge.yml").write_text(json.dumps({"merge_method": "linear", "dtype": "float32", "models": [
        {"model": str(tmp_path / f"[{letter}].safetensors"), "parameters": {"weight": 0.5}} for letter in "xy"]}))  # fmt: skip
    run("merge", tmp_path / "merge.yml", tmp_path / "[out].safetensors")
    run("merge", tmp_path / "merge.yml", "--dry-run")
    merged = read_safetensors(tmp_path / "[out].safetensors")
    assert all(torch.equal(merged[name], torch.full((2,), k + 0.5)) for k, name in enumerate(NAMES))


@pytest.mark.parametrize("name", ["a+b", "user@host", "v1.0+cu118@main"])
def test_paths_with_plus_and_at(name: str, tmp_path: Path) -> None:
    for number in range(2):
        folder = tmp_path / f"{name}-{number}"
        folder.mkdir()
        save_file({"w": torch.full((2,), float(number))}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    with open_store(tmp_path / f"{name}-1") as store:
        assert store.read("w").tolist() == [1, 1]
    run("inspect", tmp_path / f"{name}-1")
    models = [{"model": str(tmp_path / f"{name}-{n}"), "parameters": {"weight": 0.5}} for n in range(2)]
    (tmp_path / "merge.yml").write_text(json.dumps({"merge_method": "linear", "dtype": "float32", "models": models}))
    run("merge", tmp_path / "merge.yml", tmp_path / f"{name}-out")
    with open_store(tmp_path / f"{name}-out") as store:
        assert store.read("w").tolist() == [0.5, 0.5]


def test_inspect_shows_what_others_refuse(tmp_path: Path) -> None:
    save_file(
        {"q.qweight": torch.ones(2, 2, dtype=torch.int32), "q.qzeros": torch.ones(2, 2, dtype=torch.int32)},
        tmp_path / "q.safetensors",
    )
    assert "8 parameters in 2 tensors (2 int32)" in run("inspect", tmp_path / "q.safetensors")
    torch.save({"state_dict": {"w": torch.ones(2)}, "hyper_parameters": {"p": Path("x")}}, tmp_path / "a.ckpt")
    assert "not loaded: hyper_parameters.p (pathlib" in run("inspect", tmp_path / "a.ckpt").replace("\n", "")


def test_an_export_does_not_replace_a_file_unasked(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "a.ckpt")
    (tmp_path / "o.pt").write_text("mine")
    arguments = ("export", tmp_path / "a.ckpt", "--to", tmp_path / "o.pt", "--which", "raw")
    assert "already" in run(*arguments, code=1) and (tmp_path / "o.pt").read_text() == "mine"
    run(*arguments, "--overwrite")
    assert torch.load(tmp_path / "o.pt", weights_only=True)["w"].tolist() == [1, 1]


def test_a_trainers_folder_holds_checkpoints_and_training_arguments(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint-10"
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "run" / "last.pt")
    for path in (folder, tmp_path / "run"):
        for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"state": {"exp_avg": torch.ones(2)}}, path / name)
    assert sorted(find_checkpoints(tmp_path / "run")) == ["checkpoint-10", "last"]
