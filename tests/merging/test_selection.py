import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soups.merging.noise import kept, kept_each, masked_, random_bits, rounded
from soups.merging.selection import Cut, cut_at, exact_cut, kth_largest

numbers = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0, 1e-45, 1e-38, 3.4e38]), st.floats(0, 1e6, width=32)), min_size=1, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(values=numbers, pieces=st.integers(1, 5), double=st.booleans(), data=st.data())
def test_kth_largest_is_that_of_a_sort(values, pieces, double, data):
    dtype = torch.float64 if double else torch.float32
    whole = torch.tensor(values, dtype=dtype)
    streams = [(lambda part=part: [part]) for part in whole.tensor_split(pieces)]
    ranks = data.draw(st.lists(st.integers(1, len(values)), min_size=1, max_size=4))
    ordered = whole.sort(descending=True).values
    assert kth_largest(streams, ranks, dtype=dtype) == [float(ordered[rank - 1]) for rank in ranks]


@settings(max_examples=150, deadline=None)
@given(values=numbers, pieces=st.integers(1, 5), data=st.data())
def test_an_exact_cut_keeps_k_and_the_earlier_of_equal_ones(values, pieces, data):
    whole = torch.tensor(values)
    rank = data.draw(st.integers(0, len(values)))
    parts = whole.tensor_split(pieces)
    room = data.draw(st.sampled_from([0, 100]))
    (cut,) = exact_cut(lambda: parts, [rank], len(values), dtype=torch.float32, room=room)
    kept, start = [], 0
    for part in parts:
        kept.append(cut.keep_(part.clone(), start))
        start += part.numel()
    chosen = whole.sort(descending=True, stable=True).indices[:rank]
    expected = torch.zeros_like(whole)
    expected[chosen] = whole[chosen]
    assert torch.equal(torch.cat(kept), expected)


def test_signs_are_kept_and_equal_ones_are_kept_together():
    values = torch.tensor([-2.0, 1.0, 2.0, -3.0])
    (cut,) = cut_at([lambda: [values.abs()]], [2], 4, dtype=torch.float32)
    assert cut.keep_(values.clone()).tolist() == [-2.0, 0.0, 2.0, -3.0]
    assert Cut(None).keep_(values).equal(values) and not Cut(float("inf")).keep_(values.clone()).any()


@settings(max_examples=50, deadline=None)
@given(start=st.integers(0, 5000), count=st.integers(0, 300))
def test_noise_does_not_depend_on_where_a_chunk_begins(start, count):
    whole = random_bits(3, "w", 0, 0, 6000)
    assert (random_bits(3, "w", 0, start, count) == whole[start : start + count]).all()


def test_noise_is_uniform_and_differs_by_key():
    like = torch.ones(7)
    bits = random_bits(0, "w", 0, 0, 160_000)
    for part in (bits, bits[::4], bits[3::16]):
        counts = np.bincount(part >> 11, minlength=32)
        expected = len(part) / 32
        assert ((counts - expected) ** 2 / expected).sum() < 70  # chi-square with 31 degrees of freedom
    assert abs(np.corrcoef(bits[:-1], bits[1:])[0, 1]) < 0.01
    assert rounded(0.25) == 0.25 and rounded(1e-9) == 2**-16 and rounded(0) == 0
    limits = np.tile(np.array([1, 16_384, 65_535], np.uint16), 20_000)
    share = torch.from_numpy(kept_each(limits, 0, "w", 0, 0, 60_000)).double().view(-1, 3).mean(0)
    assert share.tolist() == pytest.approx([0, 0.25, 1], abs=0.01)
    mask = torch.from_numpy(kept(0.1, 0, "w", 0, 0, 100_000)).double()
    assert float(mask.mean()) == pytest.approx(0.1, abs=0.005)
    for other in ((1, "w", 0), (0, "v", 0), (0, "w", 1)):
        assert (random_bits(*other, 0, 640) == random_bits(0, "w", 0, 0, 640)).sum() < 3
    assert kept(1.0, 0, "w", 0, 0, 5).tolist() == [1] * 5
    assert kept(0.0, 0, "w", 0, 0, 5).tolist() == [0] * 5
    assert masked_(like, kept(0.0, 0, "w", 0, 0, like.numel())).tolist() == [0] * like.numel()


def test_noise_is_what_it_was():
    # Published merges are reproduced from their seed: these numbers must never change.
    assert random_bits(0, "w", 0, 0, 4).tolist() == [6352, 64764, 11862, 59014]
