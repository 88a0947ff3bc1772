"""The header of an artifact: what a file says of its method, base model, tasks and tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from soups.errors import WeightsError

FORMAT = "soups.artifact/1"


class Origin(BaseModel):
    """A model that went in.

    Attributes:
        location: where it was.
        weights_hash: `soups.weights.hash_weights` of its weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    location: str
    weights_hash: str


class Header(BaseModel):
    """What a file says of itself.

    Attributes:
        method: a name of `PART_METHODS`.
        parameters: the method's.
        base: the base model, which is not in the file.
        tasks: the experts by task, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    parameters: dict[str, Any]
    base: Origin
    tasks: dict[str, Origin]

    def metadata(self) -> dict[str, str]:
        """Return text to text, for a safetensors header."""
        return {"format": FORMAT, "soups.artifact": json.dumps(self.model_dump(), sort_keys=False)}


def read_header(metadata: Mapping[str, str], location: str) -> Header:
    """Return an artifact's header.

    Raises:
        WeightsError: the file is no artifact, or its header is damaged.
    """
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"{location} is no artifact: its header does not say {FORMAT!r}. Artifacts are made by pack."
        )
    try:
        return Header.model_validate_json(metadata["soups.artifact"])
    except (KeyError, ValidationError) as error:
        raise WeightsError(f"{location}: the header of this artifact is damaged. Copy it again. ({error})") from error


def name_of(task: str | None, tensor: str, piece: str) -> str:
    """Return where a piece of a tensor is in the file.

    >>> name_of(None, "w", "signs"), name_of("news", "w", "signs")
    ('shared/w/signs', 'task/news/w/signs')
    """
    return f"shared/{tensor}/{piece}" if task is None else f"task/{task}/{tensor}/{piece}"
