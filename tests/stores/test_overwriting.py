"""Overwriting a model's folder replaces the model; whatever else is in the folder stays, and nothing is lost half-way."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from soups.errors import StorageError
from soups.merging import merge
from soups.stores import FolderWriter, TensorMeta, open_store, write_safetensors

OTHERS = {
    ".git/HEAD": "ref: refs/heads/main", ".git/objects/ab/cd": "blob", ".gitattributes": "*.safetensors lfs",
    "notes.txt": "mine", "results/table.csv": "1,2", "pytorch_model.bin": "an older copy", "model.py": "code",
    "checkpoint-100/model.safetensors": "mine", "model.safetensors.bak": "mine", "my-model-00001-of-00002.safetensors": "mine",
    ".hidden": "mine", "training_args.bin": "mine",
}  # fmt: skip
NAMES = ["a", "b", "c"]


def values(number: int) -> dict[str, torch.Tensor]:
    return {name: torch.full((1000,), float(number + place)) for place, name in enumerate(NAMES)}


def write(folder: Path, number: int, shard_bytes: int, files: dict[str, bytes], **options) -> None:
    weights = values(number)
    plan = {name: TensorMeta(tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    with FolderWriter(folder, plan, shard_bytes=shard_bytes, files=files, **options) as writer:
        for name in plan:
            if name not in writer.finished:
                writer.write_flat(name, 0, weights[name])


def holds(folder: Path, number: int) -> bool:
    with open_store(folder) as store:
        return all(torch.equal(store.read(name), tensor) for name, tensor in values(number).items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    for name, text in OTHERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "link").symlink_to(tmp_path)
    (folder / "empty").mkdir()
    return folder


def others(folder: Path) -> dict[str, str]:
    assert (folder / "link").is_symlink() and (folder / "empty").is_dir()
    return {name: (folder / name).read_text() for name in OTHERS if (folder / name).is_file()}


@pytest.mark.parametrize("first", [4000, 10**9])
@pytest.mark.parametrize("second", [4000, 8000, 10**9])
@pytest.mark.parametrize("fingerprint", [None, "f" * 64])
def test_a_model_is_replaced_and_nothing_else(folder: Path, first: int, second: int, fingerprint: str | None) -> None:
    old = {"config.json": b"old", "tokenizer.json": b"old", "vocab.txt": b"old", "special_tokens_map.json": b"old"}
    write(folder, 1, first, old, overwrite=True)
    assert others(folder) == OTHERS and holds(folder, 1)
    new = {"config.json": b"new", "tokenizer.json": b"new", "1_Pooling/config.json": b"new"}
    write(folder, 5, second, new, overwrite=True, fingerprint=fingerprint)
    assert others(folder) == OTHERS and holds(folder, 5)
    assert (folder / "config.json").read_bytes() == b"new" and (folder / "1_Pooling/config.json").read_bytes() == b"new"
    assert not (folder / "vocab.txt").exists(), "an older tokenizer beside the new one would be another model's"
    weights = {
        path.name for path in folder.iterdir() if path.name.startswith("model") and path.suffix == ".safetensors"
    }
    count = {4000: 3, 8000: 2, 10**9: 1}[second]
    assert len(weights) == count and (folder / "model.safetensors.index.json").exists() == (count > 1)
    assert [path.name for path in folder.parent.iterdir()] == ["out"], "nothing is left beside the output"


def test_a_merge_from_the_command_line_keeps_the_repository_that_it_writes_into(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        (tmp_path / f"m{number}").mkdir()
        write_safetensors(tmp_path / f"m{number}/model.safetensors", values(number))
        (tmp_path / f"m{number}/config.json").write_text("{}")
    configuration = {"merge_method": "linear", "dtype": "float32",
                     "models": [{"model": str(tmp_path / f"m{n}"), "parameters": {"weight": 0.5}} for n in range(2)]}  # fmt: skip
    (tmp_path / "merge.yml").write_text(json.dumps(configuration))
    from typer.testing import CliRunner

    from soups.cli import app

    monkeypatch.chdir(folder)
    for out in (str(folder), "."):
        result = CliRunner().invoke(app, ["merge", str(tmp_path / "merge.yml"), out, "--overwrite", "--quiet"])
        assert result.exit_code == 0, result.output
        assert others(folder) == OTHERS
        with open_store(folder) as store:
            assert torch.equal(store.read("a"), torch.full((1000,), 0.5))
    merged = merge("linear", [tmp_path / "m0", tmp_path / "m1"], out=tmp_path / "out", overwrite=True)
    assert merged == tmp_path / "out" and others(folder) == OTHERS


def test_a_link_to_a_folder_stays_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(folder)
    write(tmp_path / "latest", 3, 10**9, {}, overwrite=True)
    assert (tmp_path / "latest").is_symlink() and holds(folder, 3) and others(folder) == OTHERS


@pytest.mark.parametrize("failing", range(8))
def test_a_fault_while_files_take_their_places_brings_the_old_model_back(
    folder: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, 1, 4000, {"config.json": b"old"}, overwrite=True)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    replace, calls = Path.replace, []

    def fail(self: Path, target: Path) -> Path:
        if self.suffix != ".part":
            calls.append(self)
            if len(calls) == failing + 1:
                raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StorageError, match="disk is full"):
        write(folder, 5, 8000, {"config.json": b"new"}, overwrite=True)
    monkeypatch.undo()
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    assert after == before and [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("killed_at", range(0, 9, 2))
def test_a_killed_process_loses_neither_model_and_the_next_one_goes_on(folder: Path, killed_at: int) -> None:
    write(folder, 1, 4000, {"config.json": b"old"}, overwrite=True)
    program = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from tests.stores import test_overwriting as t
        replace, calls = Path.replace, []
        def kill(self, target):
            if self.suffix != ".part":
                calls.append(self)
                if len(calls) == {killed_at + 1}:
                    os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)
        Path.replace = kill
        t.write(Path({str(folder)!r}), 5, 8000, {{"config.json": b"new"}}, overwrite=True, fingerprint="f" * 64)
    """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.returncode == -signal.SIGKILL
    assert others(folder) == OTHERS
    found: list[float] = []
    for path in folder.parent.rglob("model*.safetensors"):
        if path.read_bytes()[:4] != b"mine":
            with open_store(path) as store:
                found += [float(store.read(name)[0]) - NAMES.index(name) for name in store]
    assert sorted(found) == [1.0] * 3 + [5.0] * 3, "every tensor of both is there under some name"
    with contextlib.suppress(StorageError):  # or no model at all
        assert holds(folder, 1) or holds(folder, 5), "never a mixture"
    write(folder, 5, 8000, {"config.json": b"new"}, overwrite=True, fingerprint="f" * 64)
    assert holds(folder, 5) and others(folder) == OTHERS and [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_file_is_not_replaced_by_a_folder_nor_a_folder_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="is a file, and a folder is to be made there"):
        write(tmp_path / "file", 1, 10**9, {}, overwrite=True)
    (tmp_path / "m.safetensors").mkdir()
    (tmp_path / "m.safetensors/notes").write_text("mine")
    with pytest.raises(StorageError, match="is a folder, and a file is to be made there"):
        merge("linear", [values(1), values(2)], out=tmp_path / "m.safetensors", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "m.safetensors/notes").read_text() == "mine"
