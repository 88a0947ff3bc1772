"""The files of a model folder that belong to the model and are not its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from soups.stores.folder import contained

# What training and tools leave in a folder; none of it describes the model.
_TRAINING = re.compile(
    r"(trainer_state|(all|train|eval|test|predict)_results)\.json|training_args\.bin|optimizer.*|scheduler.*\.pt|scaler\.pt|"
    r"hf_quant_config\.json|"
    r"rng_state.*|events\.out\.tfevents.*|.*\.log|latest|zero_to_fp32\.py|mergekit_config\.yml|adapter_(config\.json|model\..*)"
)
_FOLDERS = re.compile(
    r"checkpoint-.*|global_step.*|epoch[-_=]?\d+.*|runs|logs|wandb|mlruns|tensorboard|lightning_logs|__pycache__|eval|"
    # other formats of the weights, which would be those of another model
    r"onnx|openvino|coreml|original|gguf|metal|tflite|tf|flax|mlx"
)
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|ot|onnx|onnx_data|gguf|ggml|tflite|mlmodel|index\.json)(\.\d+)?",
    re.IGNORECASE,
)
_WHOLE_MODEL = re.compile(r"(model|pytorch_model|diffusion_pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
_PAGES = re.compile(r".*\.(md|png|jpe?g|gif|webp|svg|pdf|html|ipynb|zip|tar|t?gz|lock)", re.IGNORECASE)
_TERMS = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY|ATTRIBUTION)(\W.*)?", re.IGNORECASE)


def carried_files(folder: Path, names: Sequence[str] | None = None) -> dict[str, Path]:
    """Return the files of a model folder to take along into a merged one, by their paths in it.

    Configuration, tokenizer, processors, remote code, terms of use, and subfolders with everything in them (the pooling and
    dense modules of sentence-transformers, templates). Left out are weights, weights in other formats, checkpoints and
    states of training, results, logs, caches, hidden files, and pages about another model.

    Args:
        folder: where to look.
        names: the names to take; `None` takes all that belong to the model.

    Raises:
        StorageError: a link leads out of the folder.
    """
    if not folder.is_dir():
        return {}
    found = sorted(path.relative_to(folder).as_posix() for path in _files(folder, folder))
    return {name: contained(folder, name) for name in found if names is None or name in names}


def is_left_by_training(name: str) -> bool:
    """Tell whether a file's name is that of a state of training, results or a log.

    >>> is_left_by_training("training_args.bin"), is_left_by_training("model.bin")
    (True, False)
    """
    return bool(_TRAINING.fullmatch(name))


def _files(folder: Path, top: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith(".") or is_left_by_training(path.name):
            continue
        if path.is_dir():
            if not _FOLDERS.fullmatch(path.name) and not _is_another_checkpoint(path, top):
                yield from _files(path, top)
        elif path.is_file() and (_TERMS.fullmatch(path.name) or not _is_left_out(path.name, at_top=folder == top)):
            yield path


def _is_left_out(name: str, *, at_top: bool) -> bool:
    return bool(_PAGES.fullmatch(name)) or (at_top and bool(_WEIGHTS.fullmatch(name)))


def _is_another_checkpoint(folder: Path, top: Path) -> bool:
    """Tell whether a subfolder is a state of training or a copy of the model, rather than a part of it."""
    if any((folder / name).exists() for name in ("trainer_state.json", "training_args.bin", "adapter_config.json")):
        return True
    if not any(_WHOLE_MODEL.fullmatch(path.name) for path in folder.iterdir()):
        return False
    if folder.relative_to(top).as_posix() in _listed_modules(top):
        return False
    kind = _settings(folder / "config.json").get("model_type")
    return kind is None or kind == _settings(top / "config.json").get("model_type")


def _listed_modules(top: Path) -> set[str]:
    """Return the subfolders that sentence-transformers' `modules.json` names."""
    listed = _json(top / "modules.json")
    entries = cast("list[Any]", listed) if isinstance(listed, list) else []
    return {str(cast("dict[str, Any]", one).get("path")) for one in entries if isinstance(one, dict)}


def _settings(path: Path) -> dict[str, Any]:
    content = _json(path)
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}


def _json(path: Path) -> object:
    """Return what a file of JSON holds; None where there is no such file, or it holds none."""
    try:
        return cast("object", json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
