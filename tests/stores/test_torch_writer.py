import pytest
import torch

from soups.errors import StorageError, WeightsError
from soups.merging import merge
from soups.stores import TensorMeta, TorchWriter, open_store

WEIGHTS = {
    "a": torch.randn(300, 7),
    "b": torch.randn(5).bfloat16(),
    "c": torch.tensor(3),
    "empty": torch.zeros(0, 3),
    "flag": torch.tensor([True, False]),
}


def write(path, weights=WEIGHTS, **options):
    plan = {name: TensorMeta(tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    with TorchWriter(path, plan, **options) as writer:
        for name, tensor in reversed(weights.items()):
            writer.write_flat(name, 0, tensor)
    return path


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_it(tmp_path, mmap):
    path = write(tmp_path / "w.pt", tied={"again": "a"})
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert list(loaded) == [*WEIGHTS, "again"]
    for name, tensor in WEIGHTS.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    assert loaded["again"].data_ptr() == loaded["a"].data_ptr()
    assert loaded["a"].data_ptr() % 64 == 0 or not mmap
    with open_store(path) as store:
        assert store.tied() == {"again": "a"} and torch.equal(store.read("a"), WEIGHTS["a"])
    assert [file.name for file in tmp_path.iterdir()] == ["w.pt"]


def test_nothing_is_left_after_a_failure(tmp_path):
    with (
        pytest.raises(WeightsError, match="not written whole"),
        TorchWriter(tmp_path / "w.pt", {"a": TensorMeta((3,), torch.float32)}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WeightsError, match="float8"):
        TorchWriter(tmp_path / "w.pt", {"a": TensorMeta((3,), torch.float8_e4m3fn)})
    write(tmp_path / "w.pt")
    with pytest.raises(StorageError, match="already"):
        write(tmp_path / "w.pt")


def test_a_merged_lightning_checkpoint_loads_in_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Model(lightning.LightningModule):
        def __init__(self, width: int = 2) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = torch.nn.Linear(width, 1)

    trainer = lightning.Trainer(max_epochs=0, logger=False, enable_progress_bar=False, enable_model_summary=False)
    for number in (1, 3):
        model = Model(width=5)
        torch.nn.init.constant_(model.net.weight, number)
        trainer.strategy.connect(model)
        trainer.save_checkpoint(tmp_path / f"{number}.ckpt")
    merge("linear", [tmp_path / "1.ckpt", tmp_path / "3.ckpt"], out=tmp_path / "soup.ckpt")
    soup = Model.load_from_checkpoint(tmp_path / "soup.ckpt")
    assert soup.hparams["width"] == 5 and soup.net.weight.tolist() == [[2.0] * 5]
    content = torch.load(tmp_path / "soup.ckpt", weights_only=True)
    assert "optimizer_states" not in content and "pytorch-lightning_version" in content
