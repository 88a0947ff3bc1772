"""`keep:` in a configuration, the tensors that are the base's as they are; and whether the others fit each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from soups.errors import ConfigError, WeightsError
from soups.merging.keeping import decides_vocabulary, keep_hint, kept_names
from soups.merging.mergekit.layers import Layers
from soups.merging.mergekit.schema import Document, ModelReference
from soups.stores.store import Store, headers
from soups.weights import describe_mismatch


def kept_tensors(
    document: Document, stores: Mapping[ModelReference, Store], donor: ModelReference, where: str
) -> list[str]:
    """Return the names of the donor's tensors that `keep` names.

    Args:
        document: the configuration.
        stores: the models, under one set of names.
        donor: the base, or the first model.
        where: the line, for messages.

    Raises:
        ConfigError: a pattern matches no tensor; slices decide about layers that are kept; or an embedding is kept and the
            tokenizer is not the base's.
    """
    patterns = document.keep or []
    try:
        kept = kept_names(stores[donor], stores.values(), patterns)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if document.slices or any(module.slices for module in (document.modules or {}).values()):
        layers = Layers(list(stores[donor]))
        if inner := [name for name in kept if layers.place(name).stack is not None]:
            raise ConfigError(
                f"{where}: {inner[0]!r} belongs to a layer, and slices decide which layers there are. Keep only tensors outside "
                f"the layers, or use models."
            )
    source = document.tokenizer.source if document.tokenizer else document.tokenizer_source
    if decides_vocabulary(kept) and source not in (None, "base", donor, str(donor)):
        raise ConfigError(
            f"{where}: {patterns} keeps an embedding or an output head, whose rows are the base's tokens; the tokenizer must "
            f"then be the base's too. Write `tokenizer: {{source: base}}`, or do not keep these tensors."
        )
    return kept


def check_fit(donor: Store, names: Sequence[str], others: Sequence[tuple[Store, Sequence[str]]]) -> None:
    """Check that the models' tensors of a section have the donor's names, shapes and kinds.

    Raises:
        WeightsError: they do not.
    """
    expected = headers(donor, names)
    for store, own in others:
        found = headers(store, own)
        if problem := describe_mismatch(expected, found):
            raise WeightsError(
                f"{store.location} does not fit {donor.location}: {problem}. Models that are merged need the same "
                f"architecture and vocabulary. Tensors that are the same under other names are mapped by `rename: {{old: new}}` "
                f"(regular expressions), vocabularies are brought together by `tokenizer: {{source: union}}`; else leave the "
                f"model out, or bring it to the same shape first.{keep_hint(expected, found)}"
            )
