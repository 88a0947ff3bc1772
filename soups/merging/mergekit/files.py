"""What belongs to a merged folder besides weights: configuration, tokenizer, chat template, model card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from soups.errors import ConfigError
from soups.merging.mergekit.chat_templates import CHAT_TEMPLATES
from soups.merging.mergekit.layer_settings import Layer, follow_layers
from soups.merging.mergekit.schema import Document, MergeConfiguration, ModelReference
from soups.merging.mergekit.vocabulary import Shared
from soups.stores.companions import carried_files
from soups.stores.quantised import plain_config

_TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip


def folder_files(
    configuration: MergeConfiguration,
    document: Document,
    donor: ModelReference,
    folders: dict[ModelReference, Path],
    *,
    stack: Sequence[Sequence[tuple[ModelReference, int]]] | None,
    untied: bool,
    shared: Shared | None = None,
    vocabulary: int | None = None,
    copy_tokenizer: bool,
    write_card: bool,
) -> dict[str, bytes | Path]:
    """Return the files to put beside the weights, by name.

    Args:
        configuration: the configuration; its text is kept as `mergekit_config.yml`.
        document: the merge that is written.
        donor: the model that configuration and tokenizer are from.
        folders: the models that are folders.
        stack: the source layers of each layer of the output, if they were changed.
        untied: whether the output has a head of its own where some models had not.
        shared: the vocabulary that the models were brought to.
        vocabulary: the number of tokens of the output, if it was changed.
        copy_tokenizer: take the tokenizer along.
        write_card: write a README.md.

    Raises:
        ConfigError: a tokenizer or chat template that is not supported.
    """
    files: dict[str, bytes | Path] = {"mergekit_config.yml": configuration.text.encode()}
    if write_card:
        files["README.md"] = model_card(configuration, document, list(folders)).encode()
    if donor not in folders:
        return files
    carried = carried_files(folders[donor])
    files |= {name: path for name, path in carried.items() if name not in _TOKENIZER and name not in files}
    if "config.json" in carried:
        files["config.json"] = updated_config(
            carried["config.json"], document, _with_configs(stack, folders), untied=untied, vocabulary=vocabulary
        )
    if copy_tokenizer:
        files |= _tokenizer_files(document, donor, folders, shared)
    if document.chat_template:
        template = _chat_template(document.chat_template, list(folders.values()))
        if template is not None:
            files["chat_template.jinja"] = template.encode()
    return files


def _with_configs(
    stack: Sequence[Sequence[tuple[ModelReference, int]]] | None, folders: Mapping[ModelReference, Path]
) -> list[list[Layer]] | None:
    """Return the source layers with their models' config.json; an empty one where there is none."""
    if stack is None:
        return None
    models = dict.fromkeys(model for layers in stack for model, _ in layers)
    paths = {model: folders[model] / "config.json" for model in models if model in folders}
    configs = {model: _json(path) for model, path in paths.items() if path.is_file()}
    return [[(configs.get(model, {}), layer) for model, layer in layers] for layers in stack]


def updated_config(
    path: Path,
    document: Document,
    stack: Sequence[Sequence[Layer]] | None,
    *,
    untied: bool = False,
    vocabulary: int | None = None,
) -> bytes:
    """Return a model's config.json with the output's dtype, number of layers and of tokens, and untied head."""
    config = plain_config(_json(path))
    if stack is not None:
        config = follow_layers(config, stack, str(path))
    dtype = document.out_dtype or document.dtype
    if dtype:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    if untied:  # also where it is not written: the library ties many models by default
        config["tie_word_embeddings"] = False
    if vocabulary is not None:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and "vocab_size" in part:
                part["vocab_size"] = vocabulary
    return (json.dumps(config, indent=2) + "\n").encode()


def _tokenizer_files(
    document: Document, donor: ModelReference, folders: dict[ModelReference, Path], shared: Shared | None
) -> dict[str, bytes | Path]:
    if shared is None:
        source = str((document.tokenizer.source if document.tokenizer else document.tokenizer_source) or "")
        folder = document.base_model if source == "base" and document.base_model else donor
        return dict(carried_files(folders.get(folder, folders[donor]), _TOKENIZER))
    files: dict[str, bytes | Path] = dict(carried_files(shared.vocabulary.folder, _TOKENIZER))
    if not shared.changed:
        return files
    files["tokenizer.json"] = json.dumps(shared.vocabulary.content, ensure_ascii=False, indent=2).encode()
    # Files of the old formats know nothing of the new tokens, and some loaders prefer them.
    files = {
        name: path for name, path in files.items() if not name.endswith((".model", "added_tokens.json", "vocab.json"))
    }
    settings = files.get("tokenizer_config.json")
    if isinstance(settings, Path):
        content = _json(settings)
        if "added_tokens_decoder" in content:
            content["added_tokens_decoder"] = {
                str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
                for entry in shared.vocabulary.content["added_tokens"]
            }
            files["tokenizer_config.json"] = (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}. Copy the model again.") from error


def _chat_template(setting: str, folders: Sequence[Path]) -> str | None:
    if setting == "auto":
        found = [template for folder in folders if (template := _template_of(folder))]
        return Counter(found).most_common(1)[0][0] if found else None
    if setting in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[setting]
    if len(setting) >= 20 and "{" in setting:
        return setting
    raise ConfigError(
        f"chat_template {setting!r} is neither 'auto', nor one of {', '.join(CHAT_TEMPLATES)}, nor a template itself (Jinja, at "
        f"least 20 characters)."
    )


def _template_of(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = config.get("chat_template")
        return template if isinstance(template, str) else None
    except (OSError, ValueError):
        return None


def model_card(configuration: MergeConfiguration, document: Document, models: Sequence[ModelReference]) -> str:
    """Return a README.md: front matter, what was merged, and the configuration."""
    names = [str(model) for model in models]
    front = yaml.safe_dump(
        {"base_model": names, "tags": ["merge", "soups"], "library_name": "transformers"}, sort_keys=False
    )
    listed = "\n".join(f"* {name}" for name in names)
    base = f" with {document.base_model} as the base" if document.base_model else ""
    text = configuration.text.rstrip()
    return (
        f"---\n{front}---\n# Merged model\n\nMade with [soups] by the method `{document.merge_method}`{base} from\n\n{listed}\n\n"
        f"The configuration, in mergekit's format:\n\n```yaml\n{text}\n```\n"
    )
