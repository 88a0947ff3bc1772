"""What transformers knows about the tensor names of an architecture, read from the library where it is installed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch


@dataclass(frozen=True)
class Architecture:
    """The names of one model class.

    Attributes:
        name: the class, `"BertForMaskedLM"`.
        prefix: the name under which heads keep the body (`base_model_prefix`), `"bert"`.
        renames: from a name as older versions or the Hub have it to the name in the module.
        ties: from a tied parameter to the parameter that it repeats, when the configuration ties them.
        ignored: patterns of tensors that loading ignores, or makes where they are absent.
        transposed: modules whose weight has the shape (in, out), as `Conv1D` keeps it.
        linear: modules whose weight has the shape (out, in).
        convolutions: modules whose weight is a kernel of shape (out, in, …), without groups.
        names: the names in the module's own state dict.
        modules: the names of all modules.
    """

    name: str
    prefix: str
    renames: Callable[[str], str]
    ties: Mapping[str, str]
    ignored: tuple[re.Pattern[str], ...]
    transposed: frozenset[str]
    linear: frozenset[str]
    convolutions: frozenset[str]
    names: frozenset[str]
    modules: frozenset[str]


def architecture_of(folder: Path | None) -> Architecture | None:
    """Return what transformers knows of a model folder's architecture.

    None without a folder, a `config.json` or the library, for remote code, and for a type that the installed version does
    not have.
    """
    if folder is None or find_spec("transformers") is None:
        return None
    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return _architecture(text)


@lru_cache(maxsize=32)
def _architecture(text: str) -> Architecture | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    settings = cast("dict[str, Any]", content)
    if settings.get("auto_map"):  # remote code, which is never run here
        return None
    model = _build({key: value for key, value in settings.items() if key != "quantization_config"})
    return None if model is None else _describe(model)


def _build(settings: dict[str, Any]) -> Any:
    """Return the model without contents, or None where the installed version does not know it."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    library: Any = transformers
    configurations: Any = CONFIG_MAPPING
    models: Any = MODEL_MAPPING
    kind = settings.get("model_type")
    if kind not in configurations:
        return None
    config = configurations[kind].from_dict(settings)
    named = [getattr(library, str(name), None) for name in settings.get("architectures") or ()]
    made = next((one for one in named if one is not None and hasattr(one, "_from_config")), None)
    if made is None:
        if type(config) not in models:
            return None
        made = models[type(config)]
        made = made[0] if isinstance(made, tuple) else made
    with torch.device("meta"):
        return made._from_config(config)


def _describe(model: Any) -> Architecture:
    names = frozenset(cast("list[str]", list(model.state_dict())))
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    lists = [getattr(model, f"_keys_to_ignore_on_load_{which}", None) or () for which in ("unexpected", "missing")]
    return Architecture(
        name=type(model).__name__,
        prefix=str(model.base_model_prefix or ""),
        renames=_renames(model, names),
        ties=_ties(model),
        ignored=tuple(re.compile(pattern) for patterns in lists for pattern in sorted(patterns)),
        transposed=frozenset(name for name, kind in kinds.items() if kind == "Conv1D"),
        linear=frozenset(name for name, kind in kinds.items() if kind.endswith("Linear")),
        convolutions=frozenset(
            name
            for name, module in model.named_modules()
            if kinds[name] in ("Conv1d", "Conv2d", "Conv3d") and module.groups == 1
        ),
        names=names,
        modules=frozenset(kinds),
    )


def _ties(model: Any) -> dict[str, str]:
    if hasattr(model, "all_tied_weights_keys"):  # transformers 5
        return {str(name): str(first) for name, first in dict(model.all_tied_weights_keys).items()}
    tied = getattr(model, "_tied_weights_keys", None) or ()
    embedding = model.get_input_embeddings()
    first = next((name for name, module in model.named_modules() if module is embedding), None)
    if first is None or not getattr(model.config, "tie_word_embeddings", True):
        return {}
    return {str(name): f"{first}.weight" for name in tied if str(name).endswith(".weight")}


def _renames(model: Any, names: frozenset[str]) -> Callable[[str], str]:
    steps = _steps(model)

    def rename(name: str) -> str:
        if name in names:
            return name
        for step in steps:
            name = step(name)
        return name

    return rename


def _steps(model: Any) -> list[Callable[[str], str]]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers 4
        table = cast("dict[str, str]", getattr(model, "_checkpoint_conversion_mapping", None) or {})
        return [lambda name, old=old, new=new: re.sub(old, new, name, count=1) for old, new in table.items()]
    conversions = cast("list[Any]", get_model_conversion_mapping(model))
    # Converters cut or stack tensors; a name alone cannot follow them.
    return [
        lambda name, one=one: str(one.rename_source_key(name)[0])
        for one in conversions
        if not isinstance(one, WeightConverter)
    ]
