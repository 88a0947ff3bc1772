"""One row a method: what it needs and what it promises. `test_laws.py` holds every row to it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    base: bool = True
    models: int = 3
    any_order: bool = True
    scales: bool = True
    """Scaling every model and the base scales the result."""
    random: bool = False
    returns_common: bool = False
    """Copies of one model, away from the base, merge to that model."""
    statistics: tuple[str, ...] = ()
    """The kinds of statistics that it is given."""


ROWS = [
    Row("linear", base=False, returns_common=True),
    Row("linear", {"weight": (0.2, 0.3, 0.7), "normalize": False}, base=False, any_order=False),
    Row("passthrough", {"scale": 0.5}, base=False, models=1),
    Row("slerp", {"t": 0.3}, models=1),
    Row("nuslerp", {"weight": (0.3, 0.7)}, base=False, models=2, any_order=False, returns_common=True),
    Row("nuslerp", {"weight": (0.3, 0.7)}, models=2, any_order=False, returns_common=True),
    Row("nuslerp", {"flatten": False}, models=2, returns_common=True),
    Row("nuslerp", {"flatten": False, "row_wise": True}, base=False, models=2, returns_common=True),
    Row("multislerp", base=False, returns_common=True),
    Row("multislerp", {"weight": (0.2, 0.3, 0.7)}, any_order=False, returns_common=True),
    Row("karcher", base=False, returns_common=True),
    Row("task_arithmetic"),
    Row("task_arithmetic", {"scale": 1.0, "normalize": True}, returns_common=True),
    Row("task_arithmetic.mergekit", {"weight": (0.2, -0.3, 0.7)}, any_order=False),
    Row("ties", returns_common=False),
    Row("ties", {"density": 1.0}, returns_common=True),
    Row("ties", {"weight": (0.2, 0.3, 0.7), "density": (0.1, 0.2, 0.3)}, any_order=False),
    Row("ties.official"),
    Row("ties.adamerging"),
    Row("ties.mergekit", {"density": 0.3}),
    Row("ties.mergekit", {"density": 0.3, "weight": (0.2, 0.3, 0.7), "rescale": True}, any_order=False),
    Row("ties.mergekit", {"density": 0.3, "normalize": False}),
    Row("ties.peft"),
    Row("dare", {"seed": 7}, random=True, any_order=False),
    Row("dare_ties", {"density": 0.3}, random=True, any_order=False),
    Row("dare_linear.mergekit", {"density": 0.3}, random=True, any_order=False),
    Row("dare_ties.mergekit", {"density": 0.3, "rescale": False}, random=True, any_order=False),
    Row("della", {"density": 0.4}, random=True, any_order=False),
    Row("della.mergekit", {"density": 0.4}, random=True, any_order=False),
    Row("della_linear.mergekit", {"density": 0.4, "rescale": False}, random=True, any_order=False),
    Row("breadcrumbs"),
    Row("breadcrumbs.official"),
    Row("breadcrumbs.mergekit", {"density": 0.5, "gamma": 0.05}),
    Row("breadcrumbs_ties.mergekit", {"density": 0.5, "rescale": True}),
    Row("model_stock", returns_common=True),
    Row("model_stock", {"filter_wise": True}, returns_common=True),
    Row("sce", returns_common=True, scales=False),
    Row("sce", {"select_topk": 0.3}, scales=False),
    Row("ram", scales=False, returns_common=True),
    Row("ram", {"epsilon": 0.4}, scales=False),
    Row("ram_plus", {"epsilon": 0.4}, scales=False),
    Row("ram_plus.mergekit", {"epsilon": 0.4, "r": 0.5}, scales=False),
    Row("nearswap", {"t": 0.01}, models=1, scales=False),
    Row("arcee_fusion", models=1, scales=False),
    Row("median", base=False, returns_common=True),
    Row("median", base=False, models=4, returns_common=True),
    Row("trimmed_mean", {"trim": 0.25}, base=False, models=5, returns_common=True),
    Row("consensus"),
    Row("consensus", {"threshold": (0.2, 0.4, 0.6), "agree": 1}, any_order=False),
    Row("pcb", {"ratio": 0.2}),
    Row("cabs", any_order=False),
    Row("cabs", {"keep": 32, "weight": (0.2, 0.3, 0.7)}, any_order=False),
    Row("knots", any_order=False),  # but for rounding in the SVD, which moves elements across the cut
    Row("tsv"),
    Row("iso_c"),
    Row("iso_cts"),
    Row("fisher", base=False, returns_common=True, statistics=("fisher",)),
    Row(
        "fisher",
        {"weight": (0.2, 0.3, 0.7), "normalize": True},
        base=False,
        any_order=False,
        returns_common=True,
        statistics=("fisher",),
    ),
    Row("regmean", base=False, returns_common=True, statistics=("gram",)),
    Row(
        "regmean",
        {"weight": (0.2, 0.3, 0.7), "off_diagonal": 0.1},
        base=False,
        any_order=False,
        returns_common=True,
        statistics=("gram",),
    ),
    Row("lot", statistics=("gram", "second_moment")),
    Row("mats", base=False, returns_common=True, statistics=("gram", "kfac_out")),
    Row("wudi", {"steps": 20}, scales=False),  # Adam's step is absolute
    Row("wudi", {"exact": True}),
    Row("cart", base=False, returns_common=True),
    Row("cart.official", {"tasks": 20}, base=False, returns_common=True),
    Row("cart", {"exclude": ("mat*",)}, base=False, returns_common=True),
]
