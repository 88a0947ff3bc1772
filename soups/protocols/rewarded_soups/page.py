"""The report of rewarded soups: expected rewards of every policy, beside the straight line and multi-objective training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from soups.protocols.rewarded_soups.interpolation import Shares, corner, label
from soups.protocols.rewarded_soups.plan import RewardedNodes
from soups.reporting.page import ChartPoint, Page, Part, Scatter, Table
from soups.stores.pool import Pool

# Expected rewards of one policy, in the order of the rewards.
Values = tuple[float, ...]


@dataclass(frozen=True)
class ParetoFront:
    """Expected rewards on test data: of each reward's own policy, of the weights between them, and of the references.

    Attributes:
        rewards: names of the n rewards.
        unit: of all of them; empty where each has its own.
        start: of the policy that all fits start from.
        ends: of each reward's own policy.
        soups: of the interpolated weights, by shares.
        references: of multi-objective training, by shares.
    """

    rewards: Sequence[str]
    unit: str
    start: Values
    ends: Sequence[Values]
    soups: Mapping[Shares, Values]
    references: Mapping[Shares, Values]

    def line(self, shares: Shares) -> Values:
        """Return Σ λᵢ R(θᵢ)."""
        return tuple(
            sum(share * end[number] for share, end in zip(shares, self.ends, strict=True))
            for number in range(len(self.rewards))
        )

    def margins(self) -> list[Values]:
        """Return how far each interpolation is above the straight line."""
        return [
            tuple(own - other for own, other in zip(values, self.line(shares), strict=True))
            for shares, values in self.soups.items()
        ]

    def page(self, pool: Pool, nodes: RewardedNodes, note: str, warnings: Sequence[str] = ()) -> Page:
        """Return the report.

        Args:
            pool: with the interpolated weights, whose hashes are the lineage.
            nodes: of the study.
            note: how the rewards were measured.
            warnings: shown first.
        """
        return Page(
            title="Rewarded soups",
            subject="protocol",
            summary=self._summary(),
            warnings=list(warnings),
            parts=[self._table(note), *self._figures()],
            lineage={
                "weights": {
                    label(shares).removeprefix("λ = "): pool.ingredient(node.inputs[0].fingerprint).weights
                    for shares, node in nodes.soups.items()
                }
            },
        )

    def _interpolated(self) -> dict[Shares, Values]:
        """Return ends and soups, by shares in their order."""
        count = len(self.rewards)
        return dict(
            sorted({**{corner(number, count): end for number, end in enumerate(self.ends)}, **self.soups}.items())
        )

    def _label(self, reward: str) -> str:
        return f"{reward}, {self.unit}" if self.unit else reward

    def _summary(self) -> str:
        margins = self.margins()
        above = sum(min(one) >= 0 for one in margins)
        smallest, where = min((value, name) for one in margins for value, name in zip(one, self.rewards, strict=True))
        both = "both rewards" if len(self.rewards) == 2 else "all rewards"
        text = (
            f"{above} of {len(margins)} interpolated models are on or above the straight line in {both} "
            f"(smallest margin {smallest:+.3f} {self.unit or f'in {where}'})."
        )
        gaps = [
            sum(
                share * (own - other)
                for share, own, other in zip(shares, self.soups[shares], self.references[shares], strict=True)
            )
            for shares in self.references
            if shares in self.soups
        ]
        if gaps:
            text += f" Their λ-weighted reward less that of multi-objective training is {sum(gaps) / len(gaps):+.3f}"
            text += f" {self.unit}." if self.unit else "."
        return text

    def _table(self, note: str) -> Table:
        none = [None] * len(self.rewards)
        two = len(self.rewards) == 2
        rows: list[list[Any]] = [["start", None, *self.start, *none, *none]]
        for shares, own in self._interpolated().items():
            rows.append([
                label(shares), shares[0] if two else ", ".join(f"{share:g}" for share in shares), *own,
                *(self.line(shares) if shares in self.soups else none), *self.references.get(shares, none),
            ])  # fmt: skip
        names = [self._label(name) for name in self.rewards]
        columns = ["weights", "λ", *names, *(f"line: {name}" for name in names), *(f"MORL: {name}" for name in names)]
        return Table(title="Rewarded soups", columns=columns, rows=rows, note=note)

    def _figures(self) -> list[Part]:
        two, interpolated = len(self.rewards) == 2, self._interpolated()
        figures: list[Part] = []
        for first, second in combinations(range(len(self.rewards)), 2):

            def points(values: Mapping[Shares, Values], x: int = first, y: int = second) -> list[ChartPoint]:
                return [ChartPoint(name=label(shares), x=own[x], y=own[y]) for shares, own in values.items()]

            names = self.rewards[first], self.rewards[second]
            figures.append(
                Scatter(
                    title="Pareto front of two rewards" if two else f"{names[1]} against {names[0]}",
                    x_label=self._label(names[0]),
                    y_label=self._label(names[1]),
                    groups={
                        "interpolated weights": points(interpolated),
                        "straight line": points({shares: self.line(shares) for shares in interpolated}),
                        "multi-objective": points(self.references),
                        "start": [ChartPoint(name="start", x=self.start[first], y=self.start[second])],
                    },
                    # Of more rewards than two the models lie on a surface.
                    connect=["interpolated weights", "straight line"] if two else [],
                )
            )
        return figures
