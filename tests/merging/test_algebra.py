import pytest
import torch

from soups.errors import ConfigError
from soups.merging.algebra import task_vector, weights
from soups.stores import open_store, write_safetensors

A, B, C = (
    {f"layers.{i}.w": torch.full((2,), value) for i in range(3)} | {"n": torch.tensor(1)} for value in (1.0, 3.0, 10.0)
)


def test_an_analogy():
    result = (weights(C) + weights(B) - weights(A)).load()
    assert result["layers.0.w"].tolist() == [12, 12] and result["n"] == 1


def test_forgetting_scaling_and_dividing():
    base = weights(A)
    assert (base - 0.5 * task_vector(B, A)).load()["layers.1.w"].tolist() == [0, 0]
    assert ((weights(A) + weights(B)) / 2).load()["layers.1.w"].tolist() == [2, 2]
    assert (-weights(B)).load()["layers.1.w"].tolist() == [-3, -3]


def test_scaling_by_layer():
    tau = task_vector(C, A)
    expression = weights(A) + tau.on("layers.0.*") + (0.5 * tau).on("layers.2.*")
    result = expression.load()
    assert [float(result[f"layers.{i}.w"][0]) for i in range(3)] == [10, 1, 5.5]
    with pytest.raises(ConfigError, match="already"):
        expression.on("*")


def test_one_model_is_read_once_however_often_it_occurs(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", A)
    one = weights(tmp_path / "a.safetensors")
    expression = one + one - 3 * weights(str(tmp_path / "a.safetensors"))
    assert len(expression.places) == 1
    expression.save(tmp_path / "out.safetensors")
    with open_store(tmp_path / "out.safetensors") as store:
        assert store.read("layers.0.w").tolist() == [-1, -1]
