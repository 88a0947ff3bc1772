"""A document as sections: stretches of the output that are merged from the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from soups.errors import ConfigError
from soups.merging.mergekit.schema import Document, ModelReference, Module, Parameters


@dataclass(frozen=True)
class SectionInput:
    """One model's share in a slice: its layers from `first` on.

    Attributes:
        model: which.
        first: its first layer; `None` for the whole model.
        parameters: its own.
        statistics: the file of its statistics.
        implied: whether it is there only because it is the base.
    """

    model: ModelReference
    first: int | None = None
    parameters: Parameters | None = None
    statistics: str | None = None
    implied: bool = False


@dataclass(frozen=True)
class MergeSection:
    """Some layers of the output, from the same inputs.

    Attributes:
        inputs: the models.
        base: the base model.
        begin: the first layer in the output.
        length: how many layers; `None` for all of them.
        levels: parameters of the slice, the module and the document, in order of precedence.
        path: where in the file it is.
        module: the part of the model that it makes; `None` for all of it.
    """

    inputs: tuple[SectionInput, ...]
    base: ModelReference | None
    begin: int
    length: int | None
    levels: tuple[Parameters | None, ...]
    path: tuple[str | int, ...]
    module: str | None = None


def references(document: Document) -> list[ModelReference]:
    """Return every model of a document, once, the base first."""
    sections = sections_of(document, ())
    found = [document.base_model] if document.base_model else []
    for section in sections:
        found += [one.model for one in section.inputs] + ([section.base] if section.base else [])
    return list(dict.fromkeys(found))


def sections_of(document: Document, path: tuple[str | int, ...]) -> list[MergeSection]:
    """Return a document's sections, module by module; `path` is where the document is in its file."""
    if document.modules:
        return [
            replace(section, module=name)
            for name, module in document.modules.items()
            for section in _of_part(module, document, (*path, "modules", name))
        ]
    return list(_of_part(document, document, path))


def _of_part(part: Document | Module, document: Document, path: tuple[str | int, ...]) -> Iterator[MergeSection]:
    levels = (document.parameters,) if part is document else (part.parameters, document.parameters)
    base = document.base_model
    if part.models:
        inputs = [SectionInput(one.model, None, one.parameters, one.statistics) for one in part.models]
        if base and base not in [one.model for one in inputs]:
            inputs.append(SectionInput(base, None, None, implied=True))
        yield MergeSection(tuple(inputs), base, 0, None, (None, *levels), (*path, "models"))
        return
    begin = 0
    for number, piece in enumerate(part.slices or []):
        inputs = [SectionInput(one.model, one.layer_range[0], one.parameters) for one in piece.sources]
        length = piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0]
        place = (*path, "slices", number)
        yield MergeSection(tuple(inputs), piece.base_model or base, begin, length, (piece.parameters, *levels), place)
        begin += length
        for one in piece.sources:
            if [other.model for other in piece.sources].count(one.model) > 1:
                raise ConfigError(f"slices {number}: {one.model} occurs twice among the sources of one slice.")
