"""mergekit's configuration as pydantic models, with errors that point at the line of the file.

The rules are those of mergekit 0.1.5 as its documentation and behaviour show them. Keys that mergekit would ignore without
a word are collected as warnings here, and are errors in strict mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from soups.errors import ConfigError, did_you_mean
from soups.stores.opening import split_adapter

Scalar = bool | int | float | str
DTYPES = ("float16", "bfloat16", "float32", "float64", "int64")


class Part(BaseModel):
    """A mapping of the configuration; keys it does not know are kept for the warnings."""

    model_config = ConfigDict(extra="allow", frozen=True)

    def unknown(self) -> list[str]:
        """Return the keys that mean nothing here."""
        return list(self.__pydantic_extra__ or {})


class ModelReference(BaseModel):
    """A model by its place, with an optional revision and LoRA adapter: `path[@revision][+adapter[@revision]]`."""

    model_config = ConfigDict(frozen=True)

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None
    state: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, str):
            return _split_reference(value)
        if isinstance(value, Mapping) and "model" in value:
            mapping = cast("Mapping[str, Any]", value)
            model, lora = mapping["model"], mapping.get("lora")
            parts: dict[str, Any] = {"path": model} if isinstance(model, str) else dict(model)
            if lora:
                inner: dict[str, Any] = {"path": lora} if isinstance(lora, str) else dict(lora)
                parts |= {"lora": inner.get("path"), "lora_revision": inner.get("revision")}
            return parts | ({"state": mapping["state"]} if mapping.get("state") else {})
        return value

    def __str__(self) -> str:
        lora = f"+{self.lora}" + (f"@{self.lora_revision}" if self.lora_revision else "") if self.lora else ""
        return self.path + (f"@{self.revision}" if self.revision else "") + lora


def _split_reference(text: str) -> dict[str, str | None]:
    model, lora = split_adapter(text)
    path, revision = _split_revision(model)
    adapter, lora_revision = _split_revision(lora)
    if not path:
        raise ValueError("a model reference without a path")
    return {"path": path, "revision": revision or None, "lora": adapter or None, "lora_revision": lora_revision or None}


def _split_revision(place: str) -> tuple[str, str | None]:
    if "://" in place or Path(place).exists():  # here "@" is a part of the path
        return place, None
    if place.count("@") > 1 or "+" in place:
        raise ValueError(f"{place!r} is no model reference; write path[@revision][+adapter[@revision]]")
    path, _, revision = place.partition("@")
    return path, revision or None


class Conditional(Part):
    """One value, or a gradient over the layers, for tensors whose name contains `filter`."""

    value: Scalar | list[Scalar]
    filter: str | None = None

    def applies(self, name: str) -> bool:
        """Tell whether this value is for the tensor called `name`."""
        return self.filter is None or self.filter == "*" or self.filter in name


Setting = Scalar | list[Scalar] | Conditional | list[Conditional]
Parameters = dict[str, Setting]


class InputModel(Part):
    """One of the models."""

    model: ModelReference
    parameters: Parameters | None = None
    statistics: str | None = None
    state: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_state(cls, value: Any) -> Any:
        """Let `state: average` beside `model:` say which weights of a training checkpoint are meant."""
        if isinstance(value, Mapping) and "state" in value and isinstance(value.get("model"), str):
            mapping = cast("Mapping[str, Any]", value)
            return {**mapping, "model": {**_split_reference(mapping["model"]), "state": mapping["state"]}}
        return value


class SliceSource(Part):
    """A range of one model's layers: from the first up to, and without, the last."""

    model: ModelReference
    layer_range: tuple[int, int]
    parameters: Parameters | None = None

    @field_validator("layer_range")
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= value[0] < value[1]:
            raise ValueError(f"layer_range {list(value)} must be [first, last) with 0 ≤ first < last")
        return value


class Slice(Part):
    """Some layers of the output."""

    sources: list[SliceSource]
    base_model: ModelReference | None = None
    parameters: Parameters | None = None
    residual_weight: float | None = None

    @field_validator("sources")
    @classmethod
    def _equal_lengths(cls, value: list[SliceSource]) -> list[SliceSource]:
        lengths = {source.layer_range[1] - source.layer_range[0] for source in value}
        if len(lengths) != 1:
            raise ValueError("all sources of a slice need layer ranges of one length")
        return value


class Module(Part):
    """A part of the model with inputs of its own."""

    models: list[InputModel] | None = None
    slices: list[Slice] | None = None
    parameters: Parameters | None = None


class ZeroToken(Part):
    """A row of zeros."""

    kind: Literal["zero"]


class ModelToken(Part):
    """The row of some token of one of the models."""

    kind: Literal["model_token"]
    model: ModelReference
    token: str | None = None
    token_id: int | None = None

    @model_validator(mode="after")
    def _one_token(self) -> ModelToken:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("exactly one of token and token_id is needed")
        return self


def _token_kind(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return str(cast("Mapping[str, Any]", value).get("kind", "model"))
    return str(getattr(value, "kind", "model"))


class TokenSpec(Part):
    """Where a token's row is from, for the models that lack it; for all of them with `force`."""

    source: Annotated[
        Annotated[ZeroToken, Tag("zero")]
        | Annotated[ModelToken, Tag("model_token")]
        | Annotated[ModelReference, Tag("model")],
        Discriminator(_token_kind),
    ]
    force: bool = False


class TokenizerSpec(Part):
    """Where the tokenizer is from."""

    source: str | ModelReference = "union"
    tokens: dict[str, TokenSpec] | None = None
    pad_to_multiple_of: int | None = Field(None, ge=1)


class Document(Part):
    """One merge."""

    merge_method: str
    base_model: ModelReference | None = None
    models: list[InputModel] | None = None
    slices: list[Slice] | None = None
    modules: dict[str, Module] | None = None
    rename: dict[str, str] | None = None
    keep: list[str] | None = None
    parameters: Parameters | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | ModelReference | None = None
    tokenizer: TokenizerSpec | None = None
    chat_template: str | None = None
    name: str | None = None

    @field_validator("dtype", "out_dtype")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        if value is not None and value.removeprefix("torch.") not in DTYPES:
            short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}
            hint = f"write {short[value]!r}" if value in short else f"allowed: {', '.join(DTYPES)}"
            raise ValueError(f"{value!r} is no dtype; {hint}")
        return value.removeprefix("torch.") if value else None

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> Document:
        given = [name for name in ("models", "slices", "modules") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"exactly one of models, slices and modules is needed; found {given or 'none'}")
        if self.tokenizer and self.tokenizer_source:
            raise ValueError("tokenizer and tokenizer_source exclude each other; keep tokenizer")
        return self


@dataclass
class MergeConfiguration:
    """A configuration file: its documents in order, its text, and what is odd about it.

    Attributes:
        documents: the merges; the last one without a name is the result.
        text: the file as it was written.
        where: the file's name, for messages.
        warnings: what mergekit would have ignored without a word.
    """

    documents: list[Document]
    text: str
    where: str
    lines: list[dict[tuple[str | int, ...], int]] = field(default_factory=list[dict[tuple[str | int, ...], int]])
    warnings: list[str] = field(default_factory=list[str])

    def at(self, number: int, path: Sequence[str | int]) -> str:
        """Return "file, line 3" for a place in document `number`."""
        known = self.lines[number] if number < len(self.lines) else {}
        route = tuple(path)
        while route and route not in known:
            route = route[:-1]
        return f"{self.where}, line {known[route]}" if route in known else self.where


def read_configuration(config: str | Path | Mapping[str, Any]) -> MergeConfiguration:
    """Read a configuration: a file, YAML text with more than one line, or a mapping.

    Raises:
        ConfigError: it is no YAML, or does not fit the schema; the message names the line and what is allowed.
    """
    if isinstance(config, Mapping):
        text, where = yaml.safe_dump(dict(config), sort_keys=False), "the configuration"
    elif isinstance(config, str) and "\n" in config:
        text, where = config, "the configuration"
    else:
        where = str(config)
        try:
            text = Path(config).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"Cannot read the configuration {config}: {error}.") from error
    configuration = MergeConfiguration([], text, where)
    try:
        loader = yaml.SafeLoader(text)
        try:
            while loader.check_node():
                node = loader.get_node()
                configuration.lines.append(dict(_lines(node)))
                configuration.documents.append(
                    _validate(configuration, len(configuration.documents), loader.construct_document(node))
                )
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no valid YAML: {error}") from error
    if not configuration.documents:
        raise ConfigError(f"{where} is empty. It needs at least merge_method and models.")
    for number, document in enumerate(configuration.documents):
        configuration.warnings.extend(_unknown_keys(configuration, number, document, ()))
    return configuration


def _lines(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], int]]:
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in cast("list[tuple[Any, Any]]", node.value):
            for found, line in _lines(value, (*path, str(key.value))):
                yield found, key.start_mark.line + 1 if found == (*path, str(key.value)) else line
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(cast("list[Any]", node.value)):
            yield from _lines(value, (*path, number))


def _validate(configuration: MergeConfiguration, number: int, content: Any) -> Document:
    if not isinstance(content, dict):
        raise ConfigError(f"{configuration.at(number, ())}: a mapping with merge_method and models was expected.")
    if "search" in content:
        raise ConfigError(
            f"{configuration.at(number, ('search',))}: a search needs a held-out score, which a file does not have. Lists of candidates "
            f"go to `python train.py +soup=merge soup.method=… +soup.parameters.NAME=[…]`, or to "
            f"soups.coefficients.search_parameters; lists in a file are gradients over the layers."
        )
    try:
        return Document.model_validate(content)
    except ValidationError as error:
        problem = _deepest(configuration, number, error)
        route = _real_path(configuration, number, problem["loc"])
        if problem["type"] == "missing":
            what = f"{problem['loc'][-1]!r} is missing"
        else:
            what = problem["msg"].removeprefix("Value error, ")
        place = ".".join(map(str, route))
        raise ConfigError(f"{configuration.at(number, route)}: {place + ': ' if place else ''}{what}.") from error


def _deepest(configuration: MergeConfiguration, number: int, error: ValidationError) -> Any:
    # Of the branches of a union, the one that got furthest into the file is what the user meant.
    return max(error.errors(), key=lambda item: len(_real_path(configuration, number, item["loc"])))


def _real_path(configuration: MergeConfiguration, number: int, loc: Sequence[str | int]) -> tuple[str | int, ...]:
    """Leave out of a pydantic location what is no place in the file (the names of a union's branches)."""
    route: tuple[str | int, ...] = ()
    for part in loc:
        if (*route, part) in configuration.lines[number]:
            route = (*route, part)
    return route


def _unknown_keys(
    configuration: MergeConfiguration, number: int, part: Any, path: tuple[str | int, ...]
) -> Iterator[str]:
    if isinstance(part, Part):
        allowed = list(type(part).model_fields)
        for key in part.unknown():
            yield f"{configuration.at(number, (*path, key))}: unknown key {key!r} was ignored; {did_you_mean(key, allowed)}"
        for name in allowed:
            yield from _unknown_keys(configuration, number, getattr(part, name), (*path, name))
    elif isinstance(part, list):
        for index, item in enumerate(cast("list[Any]", part)):
            yield from _unknown_keys(configuration, number, item, (*path, index))
    elif isinstance(part, dict):
        for key, item in cast("dict[str, Any]", part).items():
            yield from _unknown_keys(configuration, number, item, (*path, key))
