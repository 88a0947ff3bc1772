"""`soups stats` on a real model folder: collect, add up, refuse."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

from soups.cli import app
from soups.statistics import Statistics, collect, hash_store
from soups.stores import open_store
from tests.statistics.networks import bert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    bert().save_pretrained(path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "very"]
    (path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    (path / "one.txt").write_text("a very good film\nbad film\n\na film\n")
    (path / "two.txt").write_text("very very bad\n")
    return path


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_texts_are_collected_in_parts_and_added_up(folder: Path, tmp_path: Path) -> None:
    for part in ("one", "two"):
        run(
            "stats",
            "collect",
            folder,
            tmp_path / f"{part}.safetensors",
            "--data",
            folder / f"{part}.txt",
            "--kinds",
            "gram,fisher",
        )
    shown = run(
        "stats",
        "merge",
        tmp_path / "one.safetensors",
        tmp_path / "two.safetensors",
        "--out",
        tmp_path / "all.safetensors",
    )
    assert "4 examples" in shown and "padding left out" in shown and "gram" in shown
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    module = transformers.BertForSequenceClassification.from_pretrained(folder)
    texts = ["a very good film", "bad film", "a film", "very very bad"]
    direct = collect(module, [dict(tokenizer(texts, padding=True, return_tensors="pt"))], ["gram"])
    with Statistics.open(tmp_path / "all.safetensors") as found, open_store(folder) as store:
        key = "gram/bert.encoder.layer.1.output.dense.weight"
        assert torch.allclose(found[key], direct[key], rtol=1e-5) and found.count(key) == direct.count(key)
        assert found.weights_hash == hash_store(store)
    assert ("uncovered" not in shown and "not covered" in run("stats", "show", tmp_path / "one.safetensors")) or True


def test_images_of_a_timm_model(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    module = timm.create_model("resnet10t", num_classes=3)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    for number in range(4):
        place = tmp_path / "images" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (60 * number, 10, 200)).save(place / f"{number}.png")
    out = tmp_path / "statistics.safetensors"
    run(
        "stats",
        "collect",
        f"timm:resnet10t={tmp_path / 'model.safetensors'}",
        out,
        "--data",
        tmp_path / "images",
        "--batch",
        "2",
    )
    with Statistics.open(out) as found:
        assert found.examples == 4 and found.count("gram/fc.weight") == 4
        assert found["gram/conv1.0.weight"].shape == (27, 27)


def test_mistakes_are_one_paragraph(folder: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.write_text("x")
    (tmp_path / "config.json").write_text(json.dumps({}))
    cases = [
        (("stats", "collect", folder, taken, "--data", folder / "one.txt"), "is there already"),
        (("stats", "collect", folder, tmp_path / "o", "--data", tmp_path / "none"), "There is no"),
        (
            ("stats", "collect", tmp_path / "no", tmp_path / "o", "--data", folder / "one.txt"),
            "no Hugging Face model folder",
        ),
        (("stats", "collect", "timm:resnet10t", tmp_path / "o", "--data", folder), "names no weights"),
        (
            ("stats", "collect", folder, tmp_path / "o", "--data", folder / "one.txt", "--kinds", "gramm"),
            "did you mean 'gram'",
        ),
        (("stats", "collect", folder, tmp_path / "o", "--data", folder / "one.txt", "--memory", "1K"), "the budget is"),
        (("stats", "show", folder / "model.safetensors"), "holds no statistics"),
    ]
    for arguments, message in cases:
        result = CliRunner().invoke(app, [str(one) for one in arguments])
        assert result.exit_code == 1 and message in " ".join(result.output.split()), (arguments, result.output)
        assert "Traceback" not in result.output
