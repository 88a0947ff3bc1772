"""State-dict algebra: closed forms, a float64 reference, and the rules for integer and tied tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soups.errors import WeightsError
from soups.reduction import accumulation_dtype
from soups.weights import (
    RunningSum,
    check_finite,
    check_same,
    describe_mismatch,
    hash_architecture,
    hash_weights,
    mean,
    tied_names,
)


def random_models(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    source = torch.Generator().manual_seed(seed)
    return [
        {
            "conv.weight": torch.randn(4, 3, 3, 3, generator=source).to(dtype),
            "norm.bias": torch.randn(4, generator=source).to(dtype),
            "norm.num_batches_tracked": torch.tensor(number + 5),
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mean_is_the_float64_mean_rounded_once(dtype: torch.dtype) -> None:
    models = random_models(7, dtype)
    result = mean(models)
    for name in ("conv.weight", "norm.bias"):
        exact = torch.stack([model[name].double() for model in models]).mean(0)
        assert result[name].dtype == dtype
        expected = exact.to(dtype)
        if dtype in (torch.float64, torch.float32):
            assert torch.equal(result[name], expected)
        else:  # a float32 sum of 16-bit values can round the other way at an exact tie of the last bit
            assert (result[name] == expected).float().mean() > 0.99
            assert torch.allclose(result[name].double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


def test_bfloat16_is_not_summed_in_bfloat16() -> None:
    # 256 + 1 is 256 in bfloat16: a naive sum of many small values would stand still.
    models = [{"w": torch.tensor([1.0], dtype=torch.bfloat16)} for _ in range(1000)]
    models.append({"w": torch.tensor([1001.0], dtype=torch.bfloat16)})
    expected = torch.tensor([(1000 + torch.tensor(1001.0).bfloat16().item()) / 1001]).bfloat16()
    assert torch.equal(mean(models)["w"], expected)


def test_integer_buffers_are_copied_from_the_first_model() -> None:
    result = mean(random_models(3))
    assert result["norm.num_batches_tracked"].item() == 5
    assert result["norm.num_batches_tracked"].dtype == torch.int64


def test_tied_tensors_stay_tied_and_are_counted_once() -> None:
    def tied(value: float) -> dict[str, torch.Tensor]:
        shared = torch.full((3,), value)
        return {"embed": shared, "head": shared}

    result = mean([tied(1.0), tied(2.0)])
    assert result["embed"].tolist() == [1.5, 1.5, 1.5]
    assert tied_names(result) == {"head": "embed"}


def test_slices_of_one_tensor_are_not_tied() -> None:
    fused = torch.arange(6.0)
    assert tied_names({"q": fused[:3], "k": fused[3:]}) == {}


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 6), seed=st.integers(0, 1000), order=st.randoms())
def test_mean_is_independent_of_order_and_idempotent(count: int, seed: int, order) -> None:
    models = random_models(count, seed=seed)
    shuffled = list(models)
    order.shuffle(shuffled)
    first, second = mean(models), mean(shuffled)
    for name in ("conv.weight", "norm.bias"):
        assert torch.equal(first[name], second[name])
        assert torch.equal(mean([models[0]] * count)[name], models[0][name])


def test_mean_with_equals_adding() -> None:
    models = random_models(4)
    total = RunningSum()
    for model in models[:3]:
        total.add(model)
    before = total.mean()
    trial = total.mean_with(models[3])
    assert torch.equal(total.mean()["conv.weight"], before["conv.weight"]), "a trial must not change the sum"
    total.add(models[3])
    assert torch.equal(trial["conv.weight"], total.mean()["conv.weight"])
    assert total.count == 4


def test_inputs_are_untouched() -> None:
    models = random_models(2)
    copies = [{name: tensor.clone() for name, tensor in model.items()} for model in models]
    result = mean(models)
    for tensor in result.values():
        tensor.zero_()
    for model, copy in zip(models, copies, strict=True):
        assert all(torch.equal(model[name], copy[name]) for name in model)


def test_a_mismatch_names_every_kind_and_adds_nothing() -> None:
    first, second = random_models(2)
    del second["norm.bias"]
    second["conv.weight"] = second["conv.weight"][:2]
    second["extra"] = torch.zeros(1)
    total = RunningSum()
    total.add(first)
    with pytest.raises(WeightsError, match="pool/abc") as caught:
        total.add(second, where="pool/abc")
    text = str(caught.value)
    assert "1 missing ('norm.bias')" in text
    assert "1 unexpected ('extra')" in text
    assert "expected (4, 3, 3, 3), found (2, 3, 3, 3)" in text
    assert total.count == 1 and torch.equal(total.mean()["conv.weight"], first["conv.weight"])


def test_an_integer_tensor_where_a_float_is_expected() -> None:
    with pytest.raises(WeightsError, match="another kind"):
        check_same({"w": torch.zeros(1)}, {"w": torch.zeros(1, dtype=torch.int64)}, where="x")
    assert describe_mismatch({"w": torch.zeros(1)}, {"w": torch.zeros(1, dtype=torch.float16)}) == ""


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_named_and_counted(bad: float) -> None:
    weights = random_models(1)[0]
    weights["norm.bias"][2] = bad
    with pytest.raises(WeightsError, match=r"ckpt: tensor 'norm.bias' holds 1 non-finite values .* of 4"):
        check_finite(weights, where="ckpt")


def test_no_models() -> None:
    with pytest.raises(WeightsError, match="no models"):
        mean([])


def test_hashes() -> None:
    first, second = random_models(2)
    assert hash_weights(first) == hash_weights(dict(reversed(first.items())))
    assert hash_weights(first) != hash_weights(second)
    assert hash_architecture(first) == hash_architecture(second)
    assert hash_architecture(first) != hash_architecture({**first, "w": torch.zeros(1)})
    assert hash_weights({"w": torch.zeros(2, dtype=torch.bfloat16)}) != hash_weights(
        {"w": torch.zeros(2, dtype=torch.float16)}
    )
    # The same values in another memory layout are the same weights.
    assert hash_weights({"w": torch.arange(6.0).reshape(2, 3).t()}) == hash_weights(
        {"w": torch.arange(6.0).reshape(2, 3).t().contiguous()}
    )


def test_accumulation_is_float32_or_better() -> None:
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert torch.finfo(accumulation_dtype(dtype)).bits >= 32
