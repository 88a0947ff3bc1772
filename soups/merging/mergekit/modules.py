"""The parts of a model of several towers, by what tensor names begin with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# mergekit's names for the parts of multimodal models, by what the tensors' names begin with; `None` is what is left.
_MODULES: dict[str, tuple[str | None, ...]] = {
    "text_decoder": ("language_model", "layers", "embed_tokens", "norm", "lm_head", None),
    "vision_tower": ("vision_tower", "vision_model", "visual"),
    "vision_model": ("vision_model", "vision_tower", "visual"),
    "multi_modal_projector": ("multi_modal_projector", "projector", "visual.merger"),
    "default": (None,),
}


def split_modules(names: Iterable[str], modules: Sequence[str]) -> dict[str, str | None]:
    """Return the module that each tensor is in: the one whose prefix fits it best, with or without a leading `model.`.

    >>> split_modules(["visual.merger.w", "visual.blocks.0.w", "lm_head.w"], ["text_decoder", "vision_tower", "multi_modal_projector"])
    {'visual.merger.w': 'multi_modal_projector', 'visual.blocks.0.w': 'vision_tower', 'lm_head.w': 'text_decoder'}
    >>> split_modules(["vision_tower.w", "language_model.lm_head.w", "lm_head.w"], ["text_decoder", "default"])
    {'vision_tower.w': 'default', 'language_model.lm_head.w': 'text_decoder', 'lm_head.w': 'text_decoder'}
    """
    prefixes = {
        prefix: module
        for module in reversed(modules)
        for prefix in _MODULES.get(module, (module,))
        if prefix is not None
    }
    takes_rest = [module for module in modules if None in _MODULES.get(module, ())]
    rest = "default" if "default" in takes_rest else next(iter(takes_rest), None)
    owner: dict[str, str | None] = {}
    for name in names:
        fitting = [prefix for prefix in prefixes if name.startswith((f"{prefix}.", f"model.{prefix}."))]
        owner[name] = prefixes[max(fitting, key=len)] if fitting else rest
    return owner
