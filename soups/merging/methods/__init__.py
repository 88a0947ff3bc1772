"""Every merge method by name. A name alone is the paper's form; `name.source` is what a public code made of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from soups.errors import ConfigError, did_you_mean
from soups.merging.method import Method
from soups.merging.methods.arcee_fusion import ArceeFusion
from soups.merging.methods.breadcrumbs import (
    breadcrumbs,
    breadcrumbs_mergekit,
    breadcrumbs_official,
    breadcrumbs_ties_mergekit,
)
from soups.merging.methods.cabs import CABS
from soups.merging.methods.consensus import Consensus
from soups.merging.methods.dare import dare, dare_linear_mergekit, dare_ties, dare_ties_mergekit
from soups.merging.methods.della import della, della_linear_mergekit, della_mergekit
from soups.merging.methods.fisher import Fisher
from soups.merging.methods.knots import KnOTS
from soups.merging.methods.linear import Linear, Nearswap, Passthrough
from soups.merging.methods.lot import LOT
from soups.merging.methods.mats import MaTS
from soups.merging.methods.model_stock import ModelStock
from soups.merging.methods.pcb import PCB
from soups.merging.methods.ram import RAM, ram_plus, ram_plus_mergekit
from soups.merging.methods.regmean import RegMean
from soups.merging.methods.robust import Median, TrimmedMean
from soups.merging.methods.sce import SCE
from soups.merging.methods.spherical import Karcher, MultiSlerp, NuSlerp, Slerp
from soups.merging.methods.svd import CART, TSV, IsoC, IsoCTS, cart_official
from soups.merging.methods.task_arithmetic import task_arithmetic, task_arithmetic_mergekit
from soups.merging.methods.ties import ties, ties_adamerging, ties_mergekit, ties_official, ties_peft
from soups.merging.methods.wudi import WUDI


class MethodEntry(NamedTuple):
    """A method by name: what makes it, and where it is from."""

    make: Callable[..., Method]
    source: str

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return (inspect.getdoc(self.make) or "").splitlines()[0]

    @property
    def base(self) -> Literal["required", "optional", "none"]:
        """Whether it needs a base model."""
        return self.make().base

    @property
    def statistics(self) -> tuple[str, ...]:
        """The kinds of statistics that it needs."""
        return self.make().statistics

    @property
    def parameters(self) -> dict[str, Any]:
        """Its parameters with their defaults."""
        return {name: parameter.default for name, parameter in inspect.signature(self.make).parameters.items()}


METHODS: dict[str, MethodEntry] = {
    "linear": MethodEntry(Linear, "arXiv:2203.05482"),
    "passthrough": MethodEntry(Passthrough, "mergekit"),
    "slerp": MethodEntry(Slerp, "Shoemake, SIGGRAPH 1985"),
    "nuslerp": MethodEntry(NuSlerp, "mergekit"),
    "multislerp": MethodEntry(MultiSlerp, "mergekit"),
    "karcher": MethodEntry(Karcher, "Grove and Karcher, 1973"),
    "task_arithmetic": MethodEntry(task_arithmetic, "arXiv:2212.04089"),
    "task_arithmetic.mergekit": MethodEntry(task_arithmetic_mergekit, "mergekit"),
    "ties": MethodEntry(ties, "arXiv:2306.01708"),
    "ties.official": MethodEntry(ties_official, "the authors' code"),
    "ties.adamerging": MethodEntry(ties_adamerging, "AdaMerging's code"),
    "ties.mergekit": MethodEntry(ties_mergekit, "mergekit"),
    "ties.peft": MethodEntry(ties_peft, "PEFT"),
    "dare": MethodEntry(dare, "arXiv:2311.03099"),
    "dare_ties": MethodEntry(dare_ties, "arXiv:2311.03099"),
    "dare_linear.mergekit": MethodEntry(dare_linear_mergekit, "mergekit"),
    "dare_ties.mergekit": MethodEntry(dare_ties_mergekit, "mergekit"),
    "della": MethodEntry(della, "arXiv:2406.11617"),
    "della.mergekit": MethodEntry(della_mergekit, "mergekit"),
    "della_linear.mergekit": MethodEntry(della_linear_mergekit, "mergekit"),
    "breadcrumbs": MethodEntry(breadcrumbs, "arXiv:2312.06795"),
    "breadcrumbs.official": MethodEntry(breadcrumbs_official, "the authors' code"),
    "breadcrumbs.mergekit": MethodEntry(breadcrumbs_mergekit, "mergekit"),
    "breadcrumbs_ties.mergekit": MethodEntry(breadcrumbs_ties_mergekit, "mergekit"),
    "model_stock": MethodEntry(ModelStock, "arXiv:2403.19522"),
    "sce": MethodEntry(SCE, "arXiv:2408.07990"),
    "ram": MethodEntry(RAM, "arXiv:2601.13572"),
    "ram_plus": MethodEntry(ram_plus, "arXiv:2601.13572"),
    "ram_plus.mergekit": MethodEntry(ram_plus_mergekit, "mergekit"),
    "nearswap": MethodEntry(Nearswap, "mergekit"),
    "arcee_fusion": MethodEntry(ArceeFusion, "mergekit"),
    "median": MethodEntry(Median, "arXiv:1803.01498"),
    "trimmed_mean": MethodEntry(TrimmedMean, "arXiv:1803.01498"),
    "consensus": MethodEntry(Consensus, "arXiv:2405.07813"),
    "tsv": MethodEntry(TSV, "arXiv:2412.00081"),
    "iso_c": MethodEntry(IsoC, "arXiv:2502.04959"),
    "iso_cts": MethodEntry(IsoCTS, "arXiv:2502.04959"),
    "cart": MethodEntry(CART, "arXiv:2412.12153"),
    "cart.official": MethodEntry(cart_official, "the authors' code"),
    "pcb": MethodEntry(PCB, "arXiv:2410.02396"),
    "cabs": MethodEntry(CABS, "arXiv:2503.01874"),
    "knots": MethodEntry(KnOTS, "arXiv:2410.19735"),
    "fisher": MethodEntry(Fisher, "arXiv:2111.09832"),
    "regmean": MethodEntry(RegMean, "arXiv:2212.09849"),
    "lot": MethodEntry(LOT, "arXiv:2505.23859"),
    "mats": MethodEntry(MaTS, "arXiv:2312.04339"),
    "wudi": MethodEntry(WUDI, "arXiv:2503.08099"),
}


def make_method(name: str, **parameters: Any) -> Method:
    """Make a method by its name.

    Args:
        name: one of `METHODS`.
        parameters: the method's; lists become tuples, one value a model.

    Raises:
        ConfigError: an unknown name or parameter.

    >>> make_method("ties", density=0.1).base
    'required'
    """
    if name not in METHODS:
        raise ConfigError(f"There is no merge method {name!r}; {did_you_mean(name, METHODS)}")
    entry = METHODS[name]
    for parameter in parameters:
        if parameter not in entry.parameters:
            raise ConfigError(f"{name} has no parameter {parameter!r}; {did_you_mean(parameter, entry.parameters)}")
    return entry.make(**{key: tuple(value) if isinstance(value, list) else value for key, value in parameters.items()})
