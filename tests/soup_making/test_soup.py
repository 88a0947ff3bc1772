"""A pool to a soup without Hydra: what is built and read, how often, and that both directions of the metric are obeyed."""

import pkgutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from soups.fitting import read_configuration
from soups.fitting.ingredient import fine_tune
from soups.fitting.run import Run, run_of, shared
from soups.soup_making.soup import make_soup
from soups.stores.pool import Pool
from tests.launch.conftest import compose_settings


def run_with(overrides: list[str], *more: str) -> Run:
    return run_of(read_configuration(compose_settings([*overrides, "+soup=greedy", *more])))


def counted(monkeypatch: pytest.MonkeyPatch, place: str, counts: Counter[str], name: str) -> None:
    """Count the calls of a function or method at a dotted place."""
    owner, _, attribute = place.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    original: Callable[..., Any] = getattr(owner, attribute)

    def call(*arguments: Any, **named: Any) -> Any:
        counts[name] += 1
        return original(*arguments, **named)

    monkeypatch.setattr(owner, attribute, call)


def test_four_ingredients_and_a_soup_share_what_they_have_in_common(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()
    counted(monkeypatch, "soups.fitting.run.build_splits", counts, "splits")
    counted(monkeypatch, "soups.fitting.run.ensure_base_model", counts, "base model")
    counted(monkeypatch, "soups.fitting.run.ensure_probe", counts, "probe")
    counted(monkeypatch, "soups.stores.pool.Pool._weights", counts, "whole models read")
    counted(monkeypatch, "soups.fitting.training.build_splits", counts, "splits")
    run = run_with(overrides)
    with shared(run):
        for seed in range(4):
            fine_tune(run_with(overrides, f"seed={seed}"), show_progress=False)
    report, _ = make_soup(run)
    assert len(report.ingredients) == 4
    # The probe and the base model once each, and each ingredient once.
    assert counts == {"splits": 1, "base model": 1, "probe": 1, "whole models read": 6}, counts
    assert Pool(run.layout.pool.path).names() == sorted(report.ingredients)
