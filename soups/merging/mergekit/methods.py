"""What `merge_method` may be in a configuration, with the parameters and the part of the base model.

A bare name that mergekit has means mergekit's form (`ties` is `ties.mergekit`). Every other registered method goes by its
registered name, with its own parameters. Where mergekit has the bare name for another form, the paper's form is `NAME.paper`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from soups.merging.cards import ParameterCard, card
from soups.merging.mergekit.parameters import REQUIRED, Parameter
from soups.merging.methods import METHODS


@dataclass(frozen=True)
class Spec:
    """A method as configurations have it.

    Attributes:
        preset: the registered method.
        base: whether its base model is needed, optional, an input like the others, or only the model that configuration and
            tokenizer are from.
        parameters: as they are written in the file.
        seeded: whether it takes `--random-seed`.
        own: whether it is a registered method under its own parameters; an unknown one is then an error, where mergekit ignores
            it and a warning says so.
    """

    preset: str
    base: Literal["required", "optional", "input", "donor"]
    parameters: tuple[Parameter, ...] = ()
    seeded: bool = False
    own: bool = False


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


PAPER = ".paper"
"""What is put behind a registered name that means another form in mergekit."""


def configuration_name(registered: str) -> str:
    """Return what to write as `merge_method` for a registered method.

    >>> configuration_name("tsv"), configuration_name("ties"), configuration_name("linear")
    ('tsv', 'ties.paper', 'linear')
    """
    known = SPECS.get(registered)
    return registered if known is None or known.preset == registered else registered + PAPER


def configuration_names() -> list[str]:
    """Return everything that `merge_method` may be: mergekit's names first."""
    return list(dict.fromkeys([*SPECS, *(configuration_name(name) for name in METHODS)]))


def find_spec(name: str) -> Spec | None:
    """Return the method that `merge_method: NAME` means; `None` if there is none."""
    if name in SPECS:
        return SPECS[name]
    registered = name.removesuffix(PAPER) if configuration_name(name.removesuffix(PAPER)) == name else name
    return _own_spec(registered) if registered in METHODS else None


def _own_spec(name: str) -> Spec:
    entry = METHODS[name]
    found = card(name, entry.make, entry.source)
    # Without a seed of its own, the seed of the whole merge serves.
    parameters = tuple(
        Parameter(
            one.name, one.name, _kind(one), default=None if one.name == "seed" else one.default, each=one.per_model
        )
        for one in found.parameters
    )
    seeded = any(one.name == "seed" for one in found.parameters)
    return Spec(name, "donor" if entry.base == "none" else entry.base, parameters, seeded, own=True)


def _kind(parameter: ParameterCard) -> Literal["float", "bool", "int", "names"]:
    if parameter.type == "bool":
        return "bool"
    if parameter.type == "int":
        return "int"
    return "names" if parameter.type == "names" else "float"


def skeleton(registered: str) -> str:
    """Return a configuration for a registered method that runs once its paths are filled in."""
    entry = METHODS[registered]
    name = configuration_name(registered)
    spec = find_spec(name)
    assert spec is not None
    method = entry.make()
    count = max(method.least, 1 if method.most == 1 else 2)
    lines = [f"merge_method: {name}"]
    if spec.base == "required":
        lines.append("base_model: PATH/TO/BASE")
    lines.append("models:")
    if spec.base == "required":
        lines.append("  - model: PATH/TO/BASE")
    for number in range(1, count + 1):
        lines.append(f"  - model: PATH/TO/MODEL_{number}")
        if entry.statistics:
            lines.append(
                f"    statistics: PATH/TO/MODEL_{number}.statistics.safetensors  # {', '.join(entry.statistics)}"
            )
    own = {one.name: one for one in card(registered, entry.make, entry.source).parameters}
    given = [
        (one, own[one.field].default if one.default is REQUIRED else one.default)
        for one in spec.parameters
        if one.field
    ]
    values = [f"  {one.name}: {_written(default)}" for one, default in given if default is not None]
    if values:
        lines += ["parameters:", *values]
    return "\n".join([*lines, "dtype: float32", ""])


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[]"
    # YAML takes 1e-05 for text; with a point it is a number.
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text
