"""From a configuration and the models' headers to jobs: which tensors of which layers go where, by which method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from soups.errors import ConfigError, WeightsError, did_you_mean
from soups.merging.api import Plan, headers
from soups.merging.mergekit.layers import Layers, Place, depth
from soups.merging.mergekit.methods import SPECS, Spec
from soups.merging.mergekit.parameters import names_of
from soups.merging.mergekit.schema import Document, Module, Parameters, Recipe, Reference
from soups.merging.method import Method
from soups.merging.methods import make_method
from soups.merging.operands import Source
from soups.merging.stream import Job
from soups.stores.store import AliasedStore, Store, TensorMeta
from soups.weights import describe_mismatch

# The two ends of a language model that may be one tensor.
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Opener = Callable[[Reference], Store]


@dataclass(frozen=True)
class Input:
    """One model's share in a slice: its layers from `first` on.

    Attributes:
        model: which.
        first: its first layer; `None` for the whole model.
        parameters: its own.
        implied: whether it is there only because it is the base.
    """

    model: Reference
    first: int | None = None
    parameters: Parameters | None = None
    implied: bool = False


@dataclass(frozen=True)
class Section:
    """Some layers of the output, from the same inputs.

    Attributes:
        inputs: the models.
        base: the base model.
        begin: the first layer in the output.
        length: how many layers; `None` for all of them.
        levels: parameters of the slice, the module and the document, in order of precedence.
        path: where in the file it is.
    """

    inputs: tuple[Input, ...]
    base: Reference | None
    begin: int
    length: int | None
    levels: tuple[Parameters | None, ...]
    path: tuple[str | int, ...]


@dataclass
class Planned:
    """What a document comes to.

    Attributes:
        plan: the jobs.
        donor: the model that gives configuration and tokenizer.
        layers: the number of layers, if it was changed.
        warnings: what is odd about the document.
        untied: whether an output head is written that some models had tied to the embedding.
    """

    plan: Plan
    donor: Reference
    layers: int | None
    warnings: list[str] = field(default_factory=list[str])
    untied: bool = False


def references(document: Document) -> list[Reference]:
    """Return every model of a document, once, the base first."""
    sections = _sections(document, ())
    found = [document.base_model] if document.base_model else []
    for section in sections:
        found += [one.model for one in section.inputs] + ([section.base] if section.base else [])
    return list(dict.fromkeys(found))


def _sections(document: Document, path: tuple[str | int, ...]) -> list[Section]:
    if document.modules:
        unknown = [name for name in document.modules if name != "default"]
        if unknown:
            raise ConfigError(
                f"modules: {unknown[0]!r}: only the module 'default' is supported, the whole model. Models of several towers "
                f"are merged by `models`, all towers at once."
            )
        return list(_of_part(document.modules["default"], document, (*path, "modules", "default")))
    return list(_of_part(document, document, path))


def _of_part(part: Document | Module, document: Document, path: tuple[str | int, ...]) -> Iterator[Section]:
    levels = (document.parameters,) if part is document else (part.parameters, document.parameters)
    base = document.base_model
    if part.models:
        inputs = [Input(one.model, None, one.parameters) for one in part.models]
        if base and base not in [one.model for one in inputs]:
            inputs.append(Input(base, None, None, implied=True))
        yield Section(tuple(inputs), base, 0, None, (None, *levels), (*path, "models"))
        return
    begin = 0
    for number, piece in enumerate(part.slices or []):
        inputs = [Input(one.model, one.layer_range[0], one.parameters) for one in piece.sources]
        length = piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0]
        place = (*path, "slices", number)
        yield Section(tuple(inputs), piece.base_model or base, begin, length, (piece.parameters, *levels), place)
        begin += length
        for one in piece.sources:
            if [other.model for other in piece.sources].count(one.model) > 1:
                raise ConfigError(f"slices {number}: {one.model} occurs twice among the sources of one slice.")


def plan_document(recipe: Recipe, number: int, opener: Opener, *, seed: int = 0) -> Planned:
    """Plan one document of a recipe, reading headers only.

    Args:
        recipe: from `read_recipe`.
        number: which document.
        opener: opens a model; asked once for each.
        seed: for the methods that draw random masks.

    Raises:
        ConfigError: an unknown method, parameters or layers that do not fit; the message names the line.
        WeightsError: models that do not fit each other.
    """
    return _Planner(recipe, number, opener, seed).run()


class _Planner:
    def __init__(self, recipe: Recipe, number: int, opener: Opener, seed: int) -> None:
        self.recipe, self.number, self.seed = recipe, number, seed
        self.document = recipe.documents[number]
        if self.document.merge_method not in SPECS:
            raise ConfigError(
                f"{self.at('merge_method')}: merge_method {self.document.merge_method!r} is unknown; "
                f"{did_you_mean(self.document.merge_method, SPECS)}"
            )
        self.spec: Spec = SPECS[self.document.merge_method]
        self.sections = _sections(self.document, ())
        self.warnings: list[str] = []
        self.stores = {reference: opener(reference) for reference in references(self.document)}
        self.untied = self._give_heads()
        self.layers = {reference: Layers(store) for reference, store in self.stores.items()}
        self.donor = self.document.base_model or self.sections[0].inputs[0].model
        self.methods: dict[tuple[Any, ...], Method] = {}

    def _give_heads(self) -> bool:
        """Let models that leave a tied output head out have it, if another model has one; tell whether any was given."""
        names = {reference: set(store) for reference, store in self.stores.items()}
        given = False
        for reference, own in names.items():
            if _HEAD not in own and _EMBEDDING in own and any(_HEAD in others for others in names.values()):
                self.stores[reference] = AliasedStore(self.stores[reference], {_HEAD: _EMBEDDING})
                given = True
        return given

    def at(self, *path: str | int) -> str:
        return self.recipe.at(self.number, path)

    def run(self) -> Planned:
        self._check_parameters()
        for section in self.sections:
            self._check_section(section)
        jobs = self._whole() if self.sections[0].length is None else self._sliced()
        tied = self._tied({job.key for job in jobs})
        plan = Plan(tuple(job for job in jobs if job.key not in tied), tied)
        layers = None
        if self.sections[0].length is not None:
            layers = sum(section.length or 0 for section in self.sections)
        untied = self.untied and _HEAD not in tied
        return Planned(plan, self.donor, layers, self.warnings, untied)

    def _tied(self, names: set[str]) -> dict[str, str]:
        donor = self.stores[self.donor].tied()
        common = {
            name: first
            for name, first in donor.items()
            if all(name not in set(store) or store.tied().get(name) == first for store in self.stores.values())
        }
        return {name: first for name, first in common.items() if name in names and first in names}

    def _check_parameters(self) -> None:
        known = {parameter.name for parameter in self.spec.parameters}
        for section in self.sections:
            for name in sorted(names_of([*section.levels, *(one.parameters for one in section.inputs)]) - known):
                hint = did_you_mean(name, known) if known else "it has none."
                self.warnings.append(
                    f"{self.recipe.where}: {self.document.merge_method} has no parameter {name!r}, which was ignored; {hint}"
                )

        shared = {parameter.name for parameter in self.spec.parameters if not parameter.each}
        for section in self.sections:
            for one in section.inputs:
                for name in sorted(shared & set(one.parameters or {})):
                    self.warnings.append(
                        f"{self.at(*section.path)}: {name!r} holds for all models at once; under {one.model} it was ignored."
                    )

    def _check_section(self, section: Section) -> None:
        where, method = self.at(*section.path), self.document.merge_method
        models = [one.model for one in section.inputs]
        twice = [model for model in models if models.count(model) > 1]
        if twice:
            raise ConfigError(f"{where}: {twice[0]} occurs twice. List each model once, with the sum of its weights.")
        if self.spec.base == "required" and section.base is None:
            raise ConfigError(f"{where}: {method} needs base_model, the model that the others were fine-tuned from.")
        if self.spec.base == "required" and section.base not in models:
            raise ConfigError(f"{where}: {method} needs the base model {section.base} among the sources of each slice.")
        if self.spec.base == "input":
            for one in section.inputs:
                if one.implied and any(p.name == "weight" for p in self.spec.parameters):
                    raise ConfigError(
                        f"{where}: base_model {one.model} counts as an input of {method} and has no weight. List it among the "
                        f"models with one (0 leaves it out), or remove base_model."
                    )
                if one.implied:
                    self.warnings.append(
                        f"{where}: base_model {one.model} is merged as an input of {method} like the others."
                    )
        if section.length is not None:
            for one in section.inputs:
                self._check_range(one, section, where)
        count = len(models) - (section.base in models and self.spec.base != "input")
        sample = make_method(self.spec.preset)
        sample.check(count, has_base=section.base is not None, name=f"{where}: {method}")

    def _check_range(self, one: Input, section: Section, where: str) -> None:
        stacks = self.layers[one.model].stacks
        if len(stacks) != 1:
            raise ConfigError(
                f"{where}: slices need one stack of layers, but {one.model} has {len(stacks)}: {stacks[:5]}. Use models."
            )
        count, end = self.layers[one.model].count(stacks[0]), (one.first or 0) + (section.length or 0)
        if end > count:
            raise ConfigError(
                f"{where}: layer_range [{one.first}, {end}] of {one.model} ends after its {count} layers."
            )

    def _whole(self) -> list[Job]:
        (section,) = self.sections
        donor = self.stores[self.donor]
        names = _names_of_all(donor, [self.stores[one.model] for one in section.inputs])
        layers = self.layers[self.donor]
        jobs: list[Job] = []
        for name in names:
            place = layers.place(name)
            t = 0.0 if place.stack is None else depth(place.layer, layers.count(place.stack))
            jobs.append(self._job(section, name, [name] * len(section.inputs), t))
        return jobs

    def _sliced(self) -> list[Job]:
        jobs: list[Job] = []
        for number, section in enumerate(self.sections):
            first = section.inputs[0]
            store, layers = self.stores[first.model], self.layers[first.model]
            for name in store:
                place = layers.place(name)
                if place.stack is None:
                    wanted = 0 if place.layer < 0 else len(self.sections) - 1
                    if number == wanted:
                        jobs.append(self._job(section, name, [name] * len(section.inputs), 0.0))
                    continue
                index = place.layer - (first.first or 0)
                if 0 <= index < (section.length or 0):
                    jobs.append(self._layer_job(section, place, index))
        return sorted(jobs, key=lambda job: _natural(job.key))

    def _layer_job(self, section: Section, place: Place, index: int) -> Job:
        sources = [place.name((one.first or 0) + index) for one in section.inputs]
        return self._job(section, place.name(section.begin + index), sources, depth(index, section.length or 1))

    def _job(self, section: Section, name: str, keys: Sequence[str], t: float) -> Job:
        sources = {one.model: self._source(one.model, key) for one, key in zip(section.inputs, keys, strict=True)}
        base = sources.get(section.base) if section.base and self.spec.base != "input" else None
        donor = base or next(iter(sources.values()))
        meta = donor.store.meta(donor.key)
        for source in sources.values():
            shape = source.store.meta(source.key).shape
            if shape != meta.shape:
                raise WeightsError(
                    f"{source.store.location}: {source.key!r} has shape {shape}, but {donor.store.location} has {meta.shape}. "
                    f"If these are vocabularies of different sizes, bring the models to one tokenizer first."
                )
        if not meta.dtype.is_floating_point:
            return Job(name, meta, None, (donor,))
        others = [one for one in section.inputs if base is None or one.model != section.base]
        each = [(one, key) for one, key in zip(section.inputs, keys, strict=True) if one in others]
        method = self._method(section, name, each, t)
        dtype = self.document.out_dtype or self.document.dtype
        out = TensorMeta(meta.shape, getattr(torch, dtype) if dtype else meta.dtype)
        return Job(name, out, method, tuple(sources[one.model] for one in others), base)

    def _source(self, model: Reference, key: str) -> Source:
        return Source(self.stores[model], key)

    def _method(self, section: Section, name: str, each: Sequence[tuple[Input, str]], t: float) -> Method:
        where = self.at(*section.path)
        values: dict[str, Any] = {}
        for parameter in self.spec.parameters:
            if parameter.each:
                found = [parameter.look_up((one.parameters, *section.levels), key, t, where) for one, key in each]
                value: Any = found[0] if self.spec.preset == "passthrough" else tuple(found)
            else:
                value = parameter.look_up(section.levels, name, t, where)
            if parameter.field:
                values[parameter.field] = value
        if self.spec.seeded:
            values["seed"] = self.seed
        identity = tuple(sorted(values.items()))
        if identity not in self.methods:
            try:
                self.methods[identity] = make_method(self.spec.preset, **values)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from error
        return self.methods[identity]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _names_of_all(donor: Store, stores: Sequence[Store]) -> list[str]:
    expected = headers(donor)
    for store in stores:
        found = headers(store)
        if problem := describe_mismatch(expected, found):
            raise WeightsError(
                f"{store.location} does not fit {donor.location}: {problem}. Models that are merged need the same "
                f"architecture and vocabulary; leave this one out, or bring it to the same shape first."
            )
    return list(donor)
