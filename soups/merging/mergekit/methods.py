"""mergekit's method names: our preset for each, its parameters, and what the base model is to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from soups.merging.mergekit.parameters import Parameter


@dataclass(frozen=True)
class Spec:
    """One of mergekit's methods.

    Attributes:
        preset: ours that reproduces it.
        base: whether its base model is needed, optional, or an input like the others.
        parameters: mergekit's.
        seeded: whether it takes `--random-seed`.
    """

    preset: str
    base: Literal["required", "optional", "input"]
    parameters: tuple[Parameter, ...] = ()
    seeded: bool = False


_WEIGHT = Parameter("weight", "weight", each=True)
_DENSITY = Parameter("density", "density", default=1.0, each=True)
_UNUSED_DENSITY = Parameter("density", "", default=1.0, each=True)
_MASK = Parameter("int8_mask", "", "bool", default=False)
_LAMBDA = Parameter("lambda", "scale", default=1.0)


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", "normalize", "bool", default=default)


def _rescale(default: bool, field: str = "rescale") -> Parameter:
    return Parameter("rescale", field, "bool", default=default)


_GAMMA = Parameter("gamma", "gamma", default=0.01, each=True)
_EPSILON = Parameter("epsilon", "epsilon", default=0.15, each=True)

SPECS: dict[str, Spec] = {
    "linear": Spec("linear", "input", (_WEIGHT, _normalize(True))),
    "passthrough": Spec("passthrough", "input", (Parameter("scale", "scale", default=None, each=True),)),
    "slerp": Spec("slerp", "required", (Parameter("t", "t"),)),
    "nuslerp": Spec(
        "nuslerp",
        "optional",
        (
            _WEIGHT,
            Parameter("nuslerp_flatten", "flatten", "bool", default=True),
            Parameter("nuslerp_row_wise", "row_wise", "bool", default=False),
        ),
    ),
    "multislerp": Spec(
        "multislerp",
        "optional",
        (
            _WEIGHT,
            Parameter("normalize_weights", "normalize", "bool", default=True),
            Parameter("eps", "eps", default=1e-8),
        ),
    ),
    "karcher": Spec(
        "karcher",
        "input",
        (Parameter("max_iter", "max_iter", "int", default=10), Parameter("tol", "tol", default=1e-5)),
    ),
    "task_arithmetic": Spec(
        "task_arithmetic.mergekit",
        "required",
        (_WEIGHT, _UNUSED_DENSITY, _normalize(False), _rescale(False, ""), _LAMBDA, _MASK),
    ),
    "ties": Spec("ties.mergekit", "required", (_WEIGHT, _DENSITY, _normalize(True), _rescale(False), _LAMBDA, _MASK)),
    "dare_linear": Spec(
        "dare_linear.mergekit",
        "required",
        (_WEIGHT, _DENSITY, _normalize(False), _rescale(True), _LAMBDA, _MASK),
        seeded=True,
    ),
    "dare_ties": Spec(
        "dare_ties.mergekit",
        "required",
        (_WEIGHT, _DENSITY, _normalize(False), _rescale(True), _LAMBDA, _MASK),
        seeded=True,
    ),
    "breadcrumbs": Spec(
        "breadcrumbs.mergekit",
        "required",
        (_WEIGHT, _DENSITY, _GAMMA, _normalize(False), _rescale(False), _LAMBDA, _MASK),
    ),
    "breadcrumbs_ties": Spec(
        "breadcrumbs_ties.mergekit",
        "required",
        (_WEIGHT, _DENSITY, _GAMMA, _normalize(False), _rescale(False), _LAMBDA, _MASK),
    ),
    "della": Spec(
        "della.mergekit",
        "required",
        (_WEIGHT, _DENSITY, _EPSILON, _normalize(True), _rescale(True), _LAMBDA, _MASK),
        seeded=True,
    ),
    "della_linear": Spec(
        "della_linear.mergekit",
        "required",
        (_WEIGHT, _DENSITY, _EPSILON, _normalize(False), _rescale(True), _LAMBDA, _MASK),
        seeded=True,
    ),
    "model_stock": Spec("model_stock", "required", (Parameter("filter_wise", "filter_wise", "bool", default=False),)),
    "sce": Spec("sce", "required", (Parameter("select_topk", "select_topk", default=1.0), _MASK)),
    "ram": Spec("ram", "required", (Parameter("epsilon", "epsilon", default=1e-5),)),
    "ramplus_tl": Spec(
        "ram_plus.mergekit",
        "required",
        (
            Parameter("r", "r", default=0.1),
            Parameter("alpha", "alpha", default=0.2),
            Parameter("epsilon", "epsilon", default=1e-5),
        ),
    ),
    "nearswap": Spec("nearswap", "required", (Parameter("t", "t"),)),
    "arcee_fusion": Spec("arcee_fusion", "required"),
}
