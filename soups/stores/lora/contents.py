"""An adapter's tensors by the module that they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from soups.errors import StorageError

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<path>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.default)?"
    r"(\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<path>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.default)?")
_OTHER = re.compile(
    r"\.(lora_[^.]+|ranknum|vera_[^.]+|hada_[^.]+|lokr_[^.]+|ia3_l|oft_[^.]+|boft_[^.]+|prompt_[^.]+)(\.|$)"
)


@dataclass
class Factors:
    """The factors at one place of the wrapped model.

    Attributes:
        path: the place, `base_layer` included: wrappers of several parameters of one module lie in one another.
        keys: the adapter's tensors by kind: `lora_A`, `lora_B`, `lora_B.bias`, `lora_embedding_A`, ….
    """

    path: str
    keys: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def module(self) -> str:
        """The module's name in the base model."""
        return without_wrappers(self.path)


@dataclass(frozen=True)
class Whole:
    """A tensor that stands for one of the base's.

    Attributes:
        key: its name in the adapter.
        wrapped: it is the weight inside a LoRA layer, which stays tied to what the base ties it to.
    """

    key: str
    wrapped: bool


@dataclass
class Contents:
    """Everything in an adapter's file.

    Attributes:
        factors: by their place.
        wholes: by the name that the tensor has in the base model.
        rows: trained rows by the embedding's name.
    """

    factors: dict[str, Factors] = field(default_factory=dict[str, Factors])
    wholes: dict[str, Whole] = field(default_factory=dict[str, Whole])
    rows: dict[str, str] = field(default_factory=dict[str, str])


def without_wrappers(path: str) -> str:
    """Return a module's name without the names of PEFT's wrappers.

    >>> without_wrappers("h.0.experts.base_layer.base_layer")
    'h.0.experts'
    """
    return re.sub(r"\.(base_layer|token_adapter)(?=\.|$)", "", path)


def read_contents(names: Iterable[str], location: str) -> Contents:
    """Sort an adapter's tensors.

    Raises:
        StorageError: a tensor of another kind of adapter.
    """
    contents = Contents()
    found: dict[str, tuple[int, Whole]] = {}
    for key in names:
        name = key.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(name):
            kind = match["kind"] + (".bias" if match["leaf"] == "bias" else "")
            contents.factors.setdefault(match["path"], Factors(match["path"])).keys[kind] = key
        elif match := _TOKENS.fullmatch(name):
            contents.rows[without_wrappers(match["path"])] = key
        elif match := _OTHER.search(name):
            raise StorageError(
                f"{location} holds {key!r}: {match[1]!r} is no part of a LoRA, DoRA or rsLoRA adapter. Merge it into its base "
                f"with PEFT (merge_and_unload), and name the merged folder."
            )
        elif ".original_module." not in name:  # the frozen copy beside a module that was trained
            plain = re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", name)
            bare = without_wrappers(plain)
            preference = 2 if plain != name else 1 if bare == plain else 0
            if bare not in found or found[bare][0] < preference:
                found[bare] = (preference, Whole(key, bare != plain))
    contents.wholes = {name: whole for name, (_, whole) in found.items()}
    return contents
