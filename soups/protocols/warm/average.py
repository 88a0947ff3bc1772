"""The average of reward models that exist already, of any origin."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from soups.errors import ConfigError, WeightsError
from soups.merging import merge
from soups.stores import Store, open_store
from soups.stores.tokenizer import tokenizer_hash

# A model's folder or file.
Model = str | os.PathLike[str]


def best_first(scores: Sequence[float], keep: int) -> list[int]:
    """Return the numbers of the `keep` highest scores, best first; of equal ones the earlier is first.

    Raises:
        ConfigError: there are fewer than `keep` scores, or `keep` is not positive.

    >>> best_first([0.7, 0.9, 0.7], 2)
    [1, 0]
    """
    if not 1 <= keep <= len(scores):
        raise ConfigError(f"WARM averages from 1 to {len(scores)} members here, not {keep} (protocol.study.keep).")
    return sorted(range(len(scores)), key=lambda number: (-scores[number], number))[:keep]


def average(
    models: Sequence[Model | tuple[Model, Model]],
    out: str | os.PathLike[str] | None = None,
    scores: Sequence[float] | None = None,
    keep: int | None = None,
    overwrite: bool = False,
) -> dict[str, Tensor] | Path | str:
    """Average reward models: φ = 1/M Σ φᵢ, streamed from and to files.

    A folder that comes out loads like the ones that went in, for Hugging Face models with
    `AutoModelForSequenceClassification.from_pretrained(out, num_labels=1)`.

    Args:
        models: folders or files of sequence classifiers with one label, as `soups.stores.open_store` takes them; a pair of a
            model and a LoRA adapter for it is merged first. They must share their start: the pretrained weights and the head.
        out: a folder, a file, or None to return the weights.
        scores: of each model on held-out preferences, higher is better; needed with `keep`.
        keep: average only the best so many.
        overwrite: replace what is at `out`.

    Raises:
        ConfigError: fewer than two models, or scores that do not fit.
        WeightsError: a model has another number of labels, another architecture, vocabulary or tokenizer.
        soups.errors.StorageError: a model cannot be read, or `out` not be written.
    """
    chosen = list(models)
    if keep is not None:
        if scores is None or len(scores) != len(chosen):
            raise ConfigError(f"keep={keep} needs one held-out score for each of the {len(chosen)} models.")
        chosen = [chosen[number] for number in best_first(scores, keep)]
    if len(chosen) < 2 and keep != 1:
        raise ConfigError(f"An average needs at least two reward models; {len(chosen)} given.")
    with ExitStack() as stack:
        stores: list[Store] = []
        tokenizers: dict[str, str] = {}
        for place in chosen:
            model, adapter = place if isinstance(place, tuple) else (place, None)
            stores.append(stack.enter_context(open_store(model, adapter=adapter)))
            config = Path(model) / "config.json"
            if config.is_file():
                labels = _labels(cast(Mapping[str, Any], json.loads(config.read_text())))
                if labels != 1:
                    raise WeightsError(f"{model} has {labels} labels; a reward model has one (num_labels=1).")
            if found := tokenizer_hash(model):
                tokenizers.setdefault(found, str(model))
                if len(tokenizers) > 1:
                    first = next(iter(tokenizers.values()))
                    raise WeightsError(
                        f"{model} comes with another tokenizer than {first}: its token ids mean other tokens, so that an "
                        f"average of their embeddings means nothing. Leave it out, or train it with the others' tokenizer."
                    )
        # Merged adapters have no configuration and tokenizer of their own: the first one's base gives them.
        base = chosen[0][0] if isinstance(chosen[0], tuple) else None
        return merge("linear", stores, base=base, out=out, overwrite=overwrite)


def _labels(config: Mapping[str, Any]) -> int:
    """Return the number of labels that a Hugging Face configuration gives a sequence classifier."""
    if "num_labels" in config:
        return int(config["num_labels"])
    return len(config["id2label"]) if "id2label" in config else 2
