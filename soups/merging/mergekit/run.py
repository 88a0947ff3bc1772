"""Carry out a configuration: open models, plan, merge, write the folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from soups.errors import ConfigError, StorageError
from soups.merging.mergekit.files import folder_files
from soups.merging.mergekit.planning import Planned, plan_document
from soups.merging.mergekit.schema import Document, MergeConfiguration, ModelReference, read_configuration
from soups.merging.mergekit.sections import references
from soups.merging.output import execute
from soups.stores.files import fingerprint, write_text
from soups.stores.folder import folder_of
from soups.stores.memory import HeaderStore
from soups.stores.opening import open_store
from soups.stores.sources import is_remote
from soups.stores.store import Store
from soups.stores.writer import DEFAULT_SHARD_BYTES
from soups.weights import Weights


def merge_configuration(
    config: str | Path | Mapping[str, Any],
    out: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    strict: bool = False,
    overwrite: bool = False,
    truncate_embeddings: bool = False,
    copy_tokenizer: bool = True,
    write_card: bool = True,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    warn: Callable[[str], None] = lambda _: None,
    planned: Callable[[Planned], None] = lambda _: None,
    **options: Any,
) -> dict[str, Tensor] | Path | str:
    """Merge by a configuration in mergekit's format.

    Args:
        config: a file, YAML text, or the mapping that it would hold.
        out: what to make: a folder, a file, or an fsspec URL of one (see `soups.merging.execute`); `None` returns the weights.
        seed: for the methods that draw random masks (mergekit's `--random-seed`).
        strict: make every warning an error.
        overwrite: replace what is at `out`.
        truncate_embeddings: cut embeddings of different lengths to the shortest, whatever their rows stand for (mergekit's
            `--unsafe-truncate-embeddings`).
        copy_tokenizer: take the tokenizer along.
        write_card: write a README.md.
        shard_bytes: most bytes in one file.
        warn: told what mergekit would have ignored or done without a word.
        planned: told each plan before it is carried out.
        options: of the engine: `budget`, `threads`, `device`, `compiled`, `progress`.

    Returns:
        The weights, or the path that was written.

    Raises:
        SoupError: the configuration or the models are at fault; the message names the line or the tensor.
    """
    configuration = read_configuration(config)
    report = _reporter(strict, warn)
    for warning in configuration.warnings:
        report(warning)
    order = document_order(configuration)
    parts = _intermediates(configuration, seed, os.fspath(out)) if out is not None and len(order) > 1 else None
    finished: dict[str, Path | Weights] = {}
    try:
        for number in order:
            document = configuration.documents[number]
            last = number == order[-1]
            target = out if last else parts / str(document.name) if parts else None
            with ExitStack() as stack:
                stores = _opener(stack, finished, document.rename)
                plan = plan_document(configuration, number, stores, seed=seed, truncate_embeddings=truncate_embeddings)
                for warning in plan.warnings:
                    report(warning)
                planned(plan)
                models = {ref: folder_of(stores(ref)) for ref in references(document)}
                folders = {ref: folder for ref, folder in models.items() if folder is not None}
                files = folder_files(
                    configuration,
                    document,
                    plan.donor,
                    folders,
                    stack=plan.stack,
                    untied=plan.untied,
                    shared=plan.shared,
                    vocabulary=plan.vocabulary,
                    copy_tokenizer=copy_tokenizer,
                    write_card=write_card,
                )
                mark = parts / f"{document.name}.sha256" if parts and not last else None
                wanted = plan.plan.fingerprint(device=str(options.get("device", "cpu")))
                if mark and mark.is_file() and mark.read_text() == wanted:
                    finished[str(document.name)] = Path(str(target))
                    continue
                result = execute(
                    plan.plan,
                    target,
                    files=files,
                    metadata={"soups.merge": json.dumps({"configuration": configuration.text, "seed": seed})},
                    shard_bytes=shard_bytes,
                    overwrite=overwrite or not last,
                    **options,
                )
                if mark and wanted:
                    write_text(mark, wanted)
            if last:
                if parts:
                    shutil.rmtree(parts, ignore_errors=True)
                return result
            assert not isinstance(result, str)
            finished[str(document.name)] = result
    except BaseException:
        if parts and parts.is_dir() and not any(parts.iterdir()):
            parts.rmdir()
        raise
    raise AssertionError("a configuration without documents")


def _intermediates(configuration: MergeConfiguration, seed: int, out: str) -> Path:
    """Return where the results of named documents are kept until the last one is made; the same place for the same configuration."""
    mark = fingerprint({"configuration": configuration.text, "seed": seed})[:16]
    if is_remote(out):
        return Path(tempfile.gettempdir()) / f"soups-{mark}.parts"
    return Path(out).parent / f".{Path(out).name}.{mark}.parts"


def describe_plan(
    config: str | Path | Mapping[str, Any],
    *,
    seed: int = 0,
    strict: bool = False,
    truncate_embeddings: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> tuple[MergeConfiguration, list[Planned]]:
    """Plan a configuration without reading or writing a tensor.

    Returns:
        The configuration, and a plan for each of its documents in the order in which they are carried out.

    Raises:
        SoupError: as `merge_configuration`.
    """
    configuration = read_configuration(config)
    report = _reporter(strict, warn)
    for warning in configuration.warnings:
        report(warning)
    plans: list[Planned] = []
    finished: dict[str, Store] = {}
    for number in document_order(configuration):
        document = configuration.documents[number]
        with ExitStack() as stack:
            opener = _opener(stack, finished, document.rename)
            plan = plan_document(configuration, number, opener, seed=seed, truncate_embeddings=truncate_embeddings)
        for warning in plan.warnings:
            report(warning)
        plans.append(plan)
        finished[str(document.name)] = HeaderStore(f"document {document.name}", plan.plan.outputs, plan.plan.tied)
    return configuration, plans


def _opener(
    stack: ExitStack, finished: Mapping[str, Path | Weights | Store], rename: Mapping[str, str] | None = None
) -> Callable[[ModelReference], Store]:
    opened: dict[ModelReference, Store] = {}

    def opener(reference: ModelReference) -> Store:
        if reference not in opened:
            opened[reference] = stack.enter_context(open_reference(reference, finished, rename))
        return opened[reference]

    return opener


def _reporter(strict: bool, warn: Callable[[str], None]) -> Callable[[str], None]:
    def report(warning: str) -> None:
        if strict:
            raise ConfigError(f"{warning} (an error because of --strict)")
        warn(warning)

    return report


def document_order(configuration: MergeConfiguration) -> list[int]:
    """Return the documents' numbers so that each comes after those it names; the result is the last.

    Raises:
        ConfigError: not exactly one document without a name, a name twice, or documents that need each other.
    """
    names = [document.name for document in configuration.documents]
    if len(names) == 1:
        return [0]
    if names.count(None) != 1:
        raise ConfigError(
            f"{configuration.where} has {len(names)} documents, of which exactly one, the result, may have no name; "
            f"{names.count(None)} have none."
        )
    if len(set(names)) != len(names):
        raise ConfigError(f"{configuration.where}: two documents have one name: {names}.")
    order: list[int] = []
    waiting: list[int] = []

    def visit(number: int) -> None:
        if number in order:
            return
        if number in waiting:
            raise ConfigError(
                f"{configuration.where}: the documents {[names[one] for one in waiting]} need each other."
            )
        waiting.append(number)
        document: Document = configuration.documents[number]
        for reference in references(document):
            if reference.path in names:
                visit(names.index(reference.path))
        waiting.pop()
        order.append(number)

    visit(names.index(None))
    return order


def open_reference(
    reference: ModelReference,
    finished: Mapping[str, Path | Weights | Store],
    rename: Mapping[str, str] | None = None,
) -> Store:
    """Open a model: an earlier document's result, a path, or a repository of the Hugging Face Hub.

    Args:
        reference: the model.
        finished: results by their documents' names.
        rename: for the names in its adapter, if it has one.

    Raises:
        StorageError: it is in none of these places.
    """
    place = finished.get(reference.path, reference.path)
    adapter = _local(reference.lora, reference.lora_revision) if reference.lora else None
    if not isinstance(place, str):
        return open_store(place, state=reference.state, adapter=adapter, rename=rename)
    return open_store(_local(place, reference.revision), state=reference.state, adapter=adapter, rename=rename)


def _local(path: str, revision: str | None) -> str:
    if Path(path).exists() or "://" in path or path.count("/") != 1:
        return path
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.bin"]
        return snapshot_download(path, revision=revision, allow_patterns=patterns)
    except ImportError:
        return path
    except Exception as error:  # the library raises errors of several unrelated kinds
        raise StorageError(
            f"There is no folder or file {path}, and it could not be had from the Hugging Face Hub either ({error}). "
            f"Check the name, or download it first."[:800]
        ) from error
