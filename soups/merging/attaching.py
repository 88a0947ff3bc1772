"""Which statistics go with which tensor of a merge, checked before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from soups.errors import ConfigError, WeightsError
from soups.merging.attached import Statistic
from soups.merging.method import Method
from soups.statistics import Statistics
from soups.stores.store import Store, TensorMeta
from soups.stores.views import StoreView


class Attachments:
    """The statistics of the models of one merge.

    Args:
        methods: the merge's methods.
        models: the stores.
        statistics: each model's, in the order of the models; `None` where there are none.

    Raises:
        ConfigError: a method needs statistics and there are none, or the other way round; or not one for each model.
        WeightsError: a model's statistics lack a kind that a method needs.
    """

    def __init__(
        self, methods: Sequence[Method], models: Sequence[Store], statistics: Sequence[Statistics] | None
    ) -> None:
        self._models, self._statistics = models, statistics
        self._wanted = {kind: type(rule).__name__ for rule in methods for kind in rule.statistics}
        self._names = [frozenset(found.store) for found in statistics or []]
        self._used: set[str] = set()
        if statistics is None:
            if self._wanted:
                kind, name = next(iter(self._wanted.items()))
                raise ConfigError(
                    f"{name} needs statistics ({kind}) of every model: merge(…, statistics=[…]), one file for each model in "
                    f"the order of the models."
                )
            return
        if not self._wanted:
            names = ", ".join(dict.fromkeys(type(rule).__name__ for rule in methods))
            raise ConfigError(
                f"Statistics were given, but {names} uses none. Leave them out, or choose another method."
            )
        if len(statistics) != len(models):
            raise ConfigError(
                f"There are statistics of {len(statistics)} models for {len(models)} models; give one for each, in their order."
            )
        for found in statistics:
            for kind, name in self._wanted.items():
                if kind not in found.kinds:
                    raise WeightsError(
                        f"{found.location} holds {', '.join(found.kinds) or 'nothing'}, but {name} needs {kind}. Collect it."
                    )

    def of(
        self, method: Method, models: Sequence[tuple[int, Sequence[str]]], weight: TensorMeta
    ) -> dict[str, tuple[Statistic, ...]]:
        """Return each model's statistics for a tensor, by kind; without the kinds that cover no model's.

        Args:
            method: how the tensor is merged.
            models: the number of each model that is merged, and the tensor's names in it; several if it is tied.
            weight: its shape and dtype.

        Raises:
            WeightsError: a kind covers the tensor in some models only, or has another shape than the method expects.
        """
        result: dict[str, tuple[Statistic, ...]] = {}
        for kind in method.statistics:
            every = self._statistics or []
            found = [_find(every[i], self._names[i], self._models[i], kind, names) for i, names in models]
            present = [one for one in found if one is not None]
            if not present:
                continue
            if len(present) < len(found):
                number, names = next(model for model, one in zip(models, found, strict=True) if one is None)
                raise WeightsError(
                    f"{every[number].location} holds no {kind} of {names[0]!r}, but the other models' statistics do. Collect the same "
                    f"tensors for all models."
                )
            for one in present:
                if not method.fits(kind, weight, one.meta):
                    raise WeightsError(
                        f"{one.store.location}: {one.key!r} has shape {one.meta.shape}, which does not fit the weight's "
                        f"{weight.shape}. These are statistics of another architecture."
                    )
            self._used.add(kind)
            result[kind] = tuple(present)
        return result

    def check_used(self) -> None:
        """Check that every kind covers some tensor.

        Raises:
            WeightsError: one covers none of those that are merged.
        """
        for kind in self._wanted:
            if kind not in self._used and self._statistics:
                example = next((name for name in self._statistics[0].store if name.startswith(f"{kind}/")), kind)
                raise WeightsError(
                    f"{self._statistics[0].location} holds no {kind} of any tensor of {self._models[0].location}; it holds "
                    f"{example!r}. The names must be the model's."
                )


def _find(
    statistics: Statistics, known: frozenset[str], store: Store, kind: str, names: Iterable[str]
) -> Statistic | None:
    for name in names:
        own = _own_name(store, name)
        key = f"{kind}/{own}"
        if key in known:
            return Statistic(statistics.store, key, statistics.count(key), own in statistics.transposed)
    return None


def _own_name(store: Store, name: str) -> str:
    """Return the name that the checkpoint itself has for a tensor that is seen under another."""
    while isinstance(store, StoreView):
        store, name = store.store, store.original(name)
    return name


def check_weights(models: Sequence[Store], statistics: Sequence[Statistics] | None) -> None:
    """Check that each model's statistics are of its weights; every model is read once for that.

    Raises:
        WeightsError: they are of other weights.
    """
    for store, found in zip(models, statistics or [], strict=False):
        found.check_weights(store)
