"""Laws of every view of a store: ties, slices, hints, identities and places in files, each view against values of its own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from soups.merging.mergekit.rows import RowTable, VocabularyStore
from soups.protocols.cold_fusion.reduction import UpdateStore
from soups.stores import DictStore, SafetensorsStore, write_safetensors
from soups.stores.store import Store
from soups.stores.views import AliasedStore, RenamedStore, StoreView

EMBEDDING = torch.arange(12.0).reshape(4, 3) - 5
LAYER = torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(2, 5).bfloat16()
WEIGHTS = {"embed.weight": EMBEDDING, "head.weight": EMBEDDING, "layer.weight": LAYER, "count": torch.tensor(7)}


class Permuted(StoreView):
    """The view that an alignment needs: rows of some tensors in another order."""

    def __init__(self, store: Store, orders: dict[str, list[int]]) -> None:
        super().__init__(store)
        self.orders = {self.source(key): order for key, order in orders.items()}

    def changes(self, name: str) -> bool:
        return name in self.orders

    def change(self, name: str) -> str:
        return repr(self.orders[name])

    def compute(self, name: str, start: int, stop: int) -> Tensor:
        return self.store.read(name)[self.orders[name]].reshape(-1)[start:stop]


class Watched(SafetensorsStore):
    """A file that notes which hints it gets, and whether it was closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.hints: list[tuple[str, int, int]] = []
        self.closed = 0

    def will_need(self, key: str, start: int, stop: int) -> None:
        self.hints.append((self.tied().get(key, key), start, stop))
        assert stop <= self.meta(key).numel
        super().will_need(key, start, stop)

    def close(self) -> None:
        self.closed += 1
        super().close()


def updated(store: Store) -> Store:
    start = {name: torch.ones_like(tensor) for name, tensor in WEIGHTS.items()}
    start["head.weight"] = start["embed.weight"]
    return UpdateStore(store, DictStore(start), DictStore(WEIGHTS), 0.5, fresh=False)


def update(tensor: Tensor) -> Tensor:
    return tensor.double() + 0.5 * (tensor.double() - 1)


# name: how the view is made; its tensors; its ties; names whose bytes are not the file's; whether identities are known
VIEWS: dict[str, tuple[Callable[[Store], Store], dict[str, Tensor], dict[str, str], set[str], bool]] = {
    "nothing": (StoreView, WEIGHTS, {"head.weight": "embed.weight"}, set(), True),
    "renamed": (
        lambda store: RenamedStore(store, lambda key: None if key == "count" else f"model.{key}"),
        {f"model.{key}": tensor for key, tensor in WEIGHTS.items() if key != "count"},
        {"model.head.weight": "model.embed.weight"},
        set(),
        True,
    ),
    "without the first of two tied names": (
        lambda store: RenamedStore(store, lambda key: None if key == "embed.weight" else key),
        {key: tensor for key, tensor in WEIGHTS.items() if key != "embed.weight"},
        {},
        set(),
        True,
    ),
    "aliased": (
        lambda store: AliasedStore(store, {"a": "head.weight", "b": "layer.weight"}),
        {**WEIGHTS, "a": EMBEDDING, "b": LAYER},
        {"head.weight": "embed.weight", "a": "embed.weight", "b": "layer.weight"},
        set(),
        True,
    ),
    "permuted": (
        lambda store: Permuted(store, {"head.weight": [2, 0, 3, 1], "layer.weight": [1, 0]}),
        {
            **WEIGHTS,
            **dict.fromkeys(("embed.weight", "head.weight"), EMBEDDING[[2, 0, 3, 1]]),
            "layer.weight": LAYER.flip(0),
        },
        {"head.weight": "embed.weight"},
        {"embed.weight", "head.weight", "layer.weight"},
        True,
    ),
    "another vocabulary": (
        lambda store: VocabularyStore(store, {"head.weight": RowTable(np.array([1, -1, 3]), {1: ()})}),
        {
            **WEIGHTS,
            **dict.fromkeys(("embed.weight", "head.weight"), torch.stack([EMBEDDING[1], torch.zeros(3), EMBEDDING[3]])),
        },
        {"head.weight": "embed.weight"},
        {"embed.weight", "head.weight"},
        True,
    ),
    "ColD Fusion's update": (
        updated,
        {key: update(tensor) for key, tensor in WEIGHTS.items()},
        {"head.weight": "embed.weight"},
        set(WEIGHTS),
        False,
    ),
    "a view of a view": (
        lambda store: RenamedStore(Permuted(store, {"layer.weight": [1, 0]}), lambda key: f"m.{key}"),
        {f"m.{key}": LAYER.flip(0) if key == "layer.weight" else tensor for key, tensor in WEIGHTS.items()},
        {"m.head.weight": "m.embed.weight"},
        {"m.layer.weight"},
        True,
    ),
}


@pytest.fixture(params=VIEWS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Watched, Store, dict, dict, set, bool]]:
    write_safetensors(tmp_path / "m.safetensors", WEIGHTS, {"who": "me"})
    store = Watched(tmp_path / "m.safetensors")
    make, *expected = VIEWS[request.param]
    view = make(store)
    yield store, view, *expected
    view.close()
    assert store.closed == 1


def test_contents(case) -> None:
    store, view, tensors, ties, _, _ = case
    assert set(view.keys()) == set(tensors) and len(view.keys()) == len(tensors)
    assert view.metadata == store.metadata and view.metadata["who"] == "me" and view.location == store.location
    for key, tensor in tensors.items():
        assert view.meta(key) == (tuple(tensor.shape), tensor.dtype)
        assert view.read(key).dtype == tensor.dtype and torch.equal(view.read(key), tensor), key
    assert view.tied() == ties
    loaded = view.load()
    for name, first in ties.items():
        assert loaded[name] is loaded[first], "tied tensors are one tensor"


def test_reads_of_slices_are_slices_of_reads(case) -> None:
    _, view, tensors, _, _, _ = case
    for key, tensor in tensors.items():
        flat = tensor.reshape(-1)
        for start in range(flat.numel() + 1):
            for stop in (*range(start, flat.numel() + 1), None):
                assert torch.equal(view.read_flat(key, start, stop), flat[start:stop]), (key, start, stop)
        for rows in (slice(1, 3), slice(None, -1), slice(2, 2)) if tensor.ndim else ():
            assert torch.equal(view.read(key, rows), tensor[rows])


def test_a_place_in_a_file_is_given_only_where_the_bytes_are_the_tensors(case) -> None:
    store, view, tensors, _, changed, _ = case
    for key, tensor in tensors.items():
        row = view.file_row(key, 1 if tensor.numel() > 1 else 0)
        assert (row is None) == (key in changed), key
        if row is not None:
            start = 1 if tensor.numel() > 1 else 0
            read = row.source.read_tensor(row.offset, row.dtype, tensor.numel() - start)
            assert torch.equal(read, tensor.reshape(-1)[start:])
            assert row.source.identity == store.extent(store.keys()[0]).source.identity


def test_identities_are_none_or_tell_contents_apart(case) -> None:
    store, view, tensors, ties, changed, known = case
    for key in tensors:
        identity = view.identity(key)
        if key in changed and not known:
            assert identity is None, "what is not known is not claimed"
            continue
        assert identity is not None
        same_as_below = any(identity == store.identity(name) for name in store)
        assert same_as_below == (key not in changed), key
        assert identity == view.identity(ties.get(key, key)), "tied names have one identity"
    others = [view.identity(key) for key in tensors if key not in ties]
    assert not known or len(set(others)) == len(others)


def test_hints_pass_through(case) -> None:
    store, view, tensors, _, _, _ = case
    for key, tensor in tensors.items():
        store.hints.clear()
        view.will_need(key, 0, tensor.numel())
        assert len(store.hints) == 1 and store.hints[0][1] == 0 and store.hints[0][2] > 0, key


def test_unknown_names_are_errors(case) -> None:
    from soups.errors import WeightsError

    _, view, _, _, _, _ = case
    for ask in (view.meta, view.read, view.identity):
        with pytest.raises(WeightsError, match="nowhere"):
            ask("nowhere")


def test_another_change_is_another_identity(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", WEIGHTS)
    with SafetensorsStore(tmp_path / "m.safetensors") as store:
        found = {
            Permuted(store, {"layer.weight": order}).identity("layer.weight") for order in ([0, 1], [1, 0], [1, 1])
        }
        assert len(found) == 3
        tables = [
            RowTable(np.array([0, 1])),
            RowTable(np.array([1, 0])),
            RowTable(np.array([1, -1]), {1: ((store, 2),)}),
        ]
        assert len({VocabularyStore(store, {"embed.weight": table}).identity("embed.weight") for table in tables}) == 3
        unknown = RowTable(np.array([1, -1]), {1: ((DictStore(WEIGHTS), 2),)})
        assert VocabularyStore(store, {"embed.weight": unknown}).identity("embed.weight") is None


def test_a_tie_survives_only_where_everything_read_has_it() -> None:
    untied = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    tied = DictStore(WEIGHTS)
    for stores in ((tied, DictStore(untied), tied), (tied, tied, DictStore(untied)), (DictStore(untied), tied, tied)):
        assert UpdateStore(*stores, 0.5, fresh=False).tied() == {}
    assert UpdateStore(tied, tied, tied, 0.5, fresh=False).tied() == {"head.weight": "embed.weight"}
