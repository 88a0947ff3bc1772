"""From a configuration and the models' headers to jobs: which tensors of which layers go where, by which method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from soups.errors import ConfigError, SoupError, WeightsError, did_you_mean
from soups.merging.attaching import Attachments, check_weights
from soups.merging.job import Job
from soups.merging.keeping import (
    decides_vocabulary,
    kept_ties,
    untied_by_keeping,
    without_kept,
)
from soups.merging.mergekit.keep import check_fit, kept_tensors
from soups.merging.mergekit.layers import Layers, Position, depth
from soups.merging.mergekit.methods import Spec, configuration_names, find_spec
from soups.merging.mergekit.modules import split_modules
from soups.merging.mergekit.parameters import names_of
from soups.merging.mergekit.schema import MergeConfiguration, ModelReference
from soups.merging.mergekit.sections import MergeSection, SectionInput, references, sections_of
from soups.merging.mergekit.vocabulary import Shared, share_vocabulary
from soups.merging.mergekit.vocabulary import truncate_embeddings as cut_embeddings
from soups.merging.method import Method
from soups.merging.methods import make_method
from soups.merging.operands import Source
from soups.merging.plan import MergePlan, check_complex, is_averaged_dtype, output_dtype
from soups.statistics import Statistics
from soups.stores.folder import folder_of
from soups.stores.lora import resized_vocabulary, untied_heads
from soups.stores.names import reconcile
from soups.stores.store import Store, TensorMeta

Opener = Callable[[ModelReference], Store]


@dataclass
class Planned:
    """What a document comes to.

    Attributes:
        plan: the jobs.
        donor: the model that gives configuration and tokenizer.
        stack: for each layer of the output, the models and layers that it is from; `None` where layers stay as they are.
        warnings: what is odd about the document.
        untied: whether an output head is written that some models had tied to the embedding.
        shared: the vocabulary that the models are brought to, if one was asked for.
        vocabulary: the number of tokens, if it was changed.
    """

    plan: MergePlan
    donor: ModelReference
    stack: list[list[tuple[ModelReference, int]]] | None
    warnings: list[str] = field(default_factory=list[str])
    untied: bool = False
    shared: Shared | None = None
    vocabulary: int | None = None


def plan_document(
    configuration: MergeConfiguration, number: int, opener: Opener, *, seed: int = 0, truncate_embeddings: bool = False
) -> Planned:
    """Plan one document of a configuration, reading headers only.

    Args:
        configuration: from `read_configuration`.
        number: which document.
        opener: opens a model; asked once for each.
        seed: for the methods that draw random masks.
        truncate_embeddings: cut embeddings of different lengths to the shortest, whatever their rows stand for.

    Raises:
        ConfigError: an unknown method, parameters or layers that do not fit; the message names the line.
        WeightsError: models that do not fit each other.
    """
    return _Planner(configuration, number, opener, seed, truncate_embeddings).run()


class _Planner:
    def __init__(
        self, configuration: MergeConfiguration, number: int, opener: Opener, seed: int, truncate: bool
    ) -> None:
        self.configuration, self.number, self.seed = configuration, number, seed
        self.document = configuration.documents[number]
        spec = find_spec(self.document.merge_method)
        if spec is None:
            raise ConfigError(
                f"{self.at('merge_method')}: merge_method {self.document.merge_method!r} is unknown; "
                f"{did_you_mean(self.document.merge_method, configuration_names())}"
            )
        self.spec: Spec = spec
        self.sections = sections_of(self.document, ())
        if spec.base == "donor":  # it gives configuration and tokenizer, and is no input unless it is listed
            self.sections = [
                replace(section, inputs=tuple(one for one in section.inputs if not one.implied), base=None)
                for section in self.sections
            ]
        self.warnings: list[str] = []
        self.stores = {reference: opener(reference) for reference in references(self.document)}
        self.folders = {ref: folder for ref, store in self.stores.items() if (folder := folder_of(store)) is not None}
        self.donor = self.document.base_model or self.sections[0].inputs[0].model
        self.numbers, self.attachments = self._attach(opener)
        shown = reconcile(self.stores, self.donor, self.folders, rename=self.document.rename)
        self.stores, self.heads = shown.stores, shown.heads
        self.whole = self.stores[self.donor]
        self.kept = kept_tensors(self.document, self.stores, self.donor, self.at("keep"))
        self.stores = {ref: without_kept(store, self.document.keep or []) for ref, store in self.stores.items()}
        self.shared = share_vocabulary(self.document, self.stores, self.folders, self.donor)
        if truncate:
            cut_embeddings(self.stores)
        self.modules = self._split_modules()
        self.layers = {(module, reference): Layers(names) for (module, reference), names in self.modules.items()}
        self.methods: dict[tuple[Any, ...], Method] = {}

    def _attach(self, opener: Opener) -> tuple[dict[ModelReference, int], Attachments]:
        """Open the models' statistics; return which number of them each model has."""
        rule = make_method(self.spec.preset)
        inputs = {one.model: one for section in self.sections for one in section.inputs if one.model != section.base}
        given = {one.model: one.statistics for one in inputs.values() if one.statistics is not None}
        lacking = [model for model in inputs if model not in given]
        if rule.statistics and lacking:
            raise ConfigError(
                f"{self.at('models')}: {self.document.merge_method} needs statistics ({', '.join(rule.statistics)}) of every "
                f"model; give {lacking[0]} its file: `statistics: PATH` beside `model:`."
            )
        stores = [self.stores[model] for model in given]
        opened = [Statistics.open(opener(ModelReference(path=path))) for path in given.values()]
        try:
            attachments = Attachments([rule], stores, opened or None)
            check_weights(stores, opened)
        except SoupError as error:
            raise type(error)(f"{self.at('models')}: {error}") from error
        return {model: number for number, model in enumerate(given)}, attachments

    def _split_modules(self) -> dict[tuple[str | None, ModelReference], list[str]]:
        """Return each model's tensor names by module; `None` is the whole model."""
        if not self.document.modules:
            return {(None, reference): list(store) for reference, store in self.stores.items()}
        modules = list(self.document.modules)
        owners = {reference: split_modules(store, modules) for reference, store in self.stores.items()}
        used = {module for owner in owners.values() for module in owner.values()}
        for module in modules:
            if module not in used:
                parts = sorted({name.split(".")[0] for owner in owners.values() for name in owner})
                raise ConfigError(
                    f"{self.at('modules', module)}: no tensor belongs to module {module!r}. Names begin with {parts[:8]}."
                )
        for reference, owner in owners.items():
            if lost := [name for name, module in owner.items() if module is None]:
                raise ConfigError(
                    f"{self.at('modules')}: {len(lost)} tensors of {reference} are in none of the modules {modules}, {lost[0]!r} "
                    f"among them. Name their part of the model as well, or add the module 'default' for the rest."
                )
        return {
            (module, reference): [name for name, where in owner.items() if where == module]
            for module in modules
            for reference, owner in owners.items()
        }

    def at(self, *path: str | int) -> str:
        return self.configuration.at(self.number, path)

    def run(self) -> Planned:
        self._check_parameters()
        for section in self.sections:
            self._check_section(section)
        jobs: list[Job] = []
        stack: list[list[tuple[ModelReference, int]]] | None = None
        for module in dict.fromkeys(section.module for section in self.sections):
            sections = [section for section in self.sections if section.module == module]
            if self._is_base_alone(sections[0]):
                jobs += self._base_alone(sections[0])
                continue
            if sections[0].length is None:
                jobs += self._whole(sections[0])
                continue
            jobs += self._sliced(sections)
            stack = self._stack(sections)
            if module not in (None, "default"):
                self.warnings.append(
                    f"{self.at('modules', module)}: the output's {module} has {len(stack)} layers; set that in its config.json."
                )
                stack = None
        self.attachments.check_used()
        jobs += [Job(name, self.whole.meta(name), None, (Source(self.whole, name),)) for name in self.kept]
        tied = self._tied({job.key for job in jobs}) | kept_ties(self.whole, self.kept)
        plan = MergePlan(tuple(job for job in jobs if job.key not in tied), tied)
        makers = [self.whole] if decides_vocabulary(self.kept) else list(self.stores.values())
        heads = self.heads | untied_heads(makers) | untied_by_keeping(self.whole, self.kept)
        untied = any(head not in tied for head in heads & set(plan.outputs))
        vocabulary = self.shared.size if self.shared else resized_vocabulary(makers)
        return Planned(plan, self.donor, stack, self.warnings, untied, self.shared, vocabulary)

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
                if self.spec.own:
                    raise ConfigError(
                        f"{self.configuration.where}: {self.document.merge_method} has no parameter {name!r}; {hint}"
                    )
                self.warnings.append(
                    f"{self.configuration.where}: {self.document.merge_method} has no parameter {name!r}, which was ignored; {hint}"
                )

        shared = {parameter.name for parameter in self.spec.parameters if not parameter.each}
        for section in self.sections:
            for one in section.inputs:
                for name in sorted(shared & set(one.parameters or {})):
                    self.warnings.append(
                        f"{self.at(*section.path)}: {name!r} holds for all models at once; under {one.model} it was ignored."
                    )

    def _check_section(self, section: MergeSection) -> None:
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
        if self._is_base_alone(section):
            return
        count = len(models) - (section.base in models and self.spec.base != "input")
        sample = make_method(self.spec.preset)
        sample.check(count, has_base=section.base is not None, name=f"{where}: {method}")

    def _check_range(self, one: SectionInput, section: MergeSection, where: str) -> None:
        layers = self.layers[section.module, one.model]
        stacks = layers.stacks
        if len(stacks) != 1:
            raise ConfigError(
                f"{where}: slices need one stack of layers, but {one.model} has {len(stacks)}: {stacks[:5]}. Use models, or "
                f"modules with slices in each."
            )
        count, end = layers.count(stacks[0]), (one.first or 0) + (section.length or 0)
        if end > count:
            raise ConfigError(
                f"{where}: layer_range [{one.first}, {end}] of {one.model} ends after its {count} layers."
            )

    def _is_base_alone(self, section: MergeSection) -> bool:
        """Tell whether a module lists the base model alone, which methods on task vectors leave as it is."""
        alone = section.length is None and [one.model for one in section.inputs] == [section.base]
        return alone and section.module is not None and self.spec.base == "required"

    def _base_alone(self, section: MergeSection) -> list[Job]:
        model, copied = section.inputs[0].model, make_method("passthrough")
        jobs: list[Job] = []
        for name in self.modules[section.module, model]:
            source = self._source(model, name)
            meta = source.store.meta(name)
            if not is_averaged_dtype(meta.dtype):
                jobs.append(Job(name, meta, None, (source,)))
                continue
            jobs.append(Job(name, self._output_meta(source, meta), copied, (source,)))
        return jobs

    def _output_meta(self, source: Source, meta: TensorMeta) -> TensorMeta:
        dtype = self.document.out_dtype or self.document.dtype
        own = source.store.declared_dtype(source.key)
        return TensorMeta(meta.shape, output_dtype(own, getattr(torch, dtype) if dtype else None))

    def _whole(self, section: MergeSection) -> list[Job]:
        donor = self.donor if self.donor in [one.model for one in section.inputs] else section.inputs[0].model
        names = self.modules[section.module, donor]
        check_fit(
            self.stores[donor],
            names,
            [(self.stores[one.model], self.modules[section.module, one.model]) for one in section.inputs],
        )
        layers = self.layers[section.module, donor]
        jobs: list[Job] = []
        for name in names:
            place = layers.place(name)
            t = 0.0 if place.stack is None else depth(place.layer, layers.count(place.stack))
            jobs.append(self._job(section, name, [name] * len(section.inputs), t))
        return jobs

    def _sliced(self, sections: Sequence[MergeSection]) -> list[Job]:
        jobs: list[Job] = []
        for number, section in enumerate(sections):
            first = section.inputs[0]
            layers = self.layers[section.module, first.model]
            for name in self.modules[section.module, first.model]:
                place = layers.place(name)
                if place.stack is None:
                    wanted = 0 if place.layer < 0 else len(sections) - 1
                    if number == wanted:
                        jobs.append(self._job(section, name, [name] * len(section.inputs), 0.0))
                    continue
                index = place.layer - (first.first or 0)
                if 0 <= index < (section.length or 0):
                    jobs.append(self._layer_job(section, place, index))
        return sorted(jobs, key=lambda job: _natural(job.key))

    def _stack(self, sections: Sequence[MergeSection]) -> list[list[tuple[ModelReference, int]]]:
        """Return the source layers of each output layer, the donor's first."""
        return [
            sorted(
                ((one.model, (one.first or 0) + index) for one in section.inputs),
                key=lambda source: source[0] != self.donor,
            )
            for section in sections
            for index in range(section.length or 0)
        ]

    def _layer_job(self, section: MergeSection, place: Position, index: int) -> Job:
        sources = [place.name((one.first or 0) + index) for one in section.inputs]
        return self._job(section, place.name(section.begin + index), sources, depth(index, section.length or 1))

    def _job(self, section: MergeSection, name: str, keys: Sequence[str], t: float) -> Job:
        sources = {one.model: self._source(one.model, key) for one, key in zip(section.inputs, keys, strict=True)}
        base = sources.get(section.base) if section.base and self.spec.base != "input" else None
        donor = base or next(iter(sources.values()))
        meta = donor.store.meta(donor.key)
        for source in sources.values():
            shape = source.store.meta(source.key).shape
            if shape != meta.shape:
                raise WeightsError(
                    f"{source.store.location}: {source.key!r} has shape {shape}, but {donor.store.location} has {meta.shape}. "
                    f"If these are vocabularies of different sizes, ask for one with `tokenizer: {{source: union}}`; "
                    f"`keep: [{name}]` takes this tensor from the base (or the first model) as it is."
                )
        if not is_averaged_dtype(meta.dtype):
            return Job(name, meta, None, (donor,))
        others = [one for one in section.inputs if base is None or one.model != section.base]
        each = [(one, key) for one, key in zip(section.inputs, keys, strict=True) if one in others]
        method = self._method(section, name, each, t)
        check_complex(method, meta, name, donor.store)
        out = self._output_meta(donor, meta)
        read = self.attachments.of(method, [(self.numbers.get(one.model, -1), [key]) for one, key in each], meta)
        return Job(name, out, method, tuple(sources[one.model] for one in others), base, read)

    def _source(self, model: ModelReference, key: str) -> Source:
        return Source(self.stores[model], key)

    def _method(self, section: MergeSection, name: str, each: Sequence[tuple[SectionInput, str]], t: float) -> Method:
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
        if self.spec.seeded and values.get("seed") is None:
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
