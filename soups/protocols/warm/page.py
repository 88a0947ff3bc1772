"""The report of WARM: accuracies, memory of wrong labels, and best-of-N of the average, its members and their ensembles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from soups.evaluation import best_of_n, best_of_n_kl
from soups.protocols.execution import notes_of
from soups.protocols.warm.average import best_first
from soups.protocols.warm.plan import AverageNotes, FeatureNotes, NoiseGroup, WarmNodes, WarmSettings
from soups.protocols.warm.rewards import Rewards
from soups.reporting.page import Curves, Page, Part, Table
from soups.stores.pool import Pool
from soups.tasks.preferences import Pairs

MEAN, BEST, ENSEMBLE, MEDIAN, WARM = "mean of members", "best single", "ensemble", "median", "WARM"


@dataclass(frozen=True)
class RatedTexts:
    """Texts and their mean ratings (N,)."""

    texts: list[str]
    means: Tensor


@dataclass(frozen=True)
class WarmRow:
    """The numbers of one model; accuracies and shares in percent.

    Attributes:
        share: of swapped labels.
        model: its name.
        heldout: accuracy on noisy held-out pairs; None where it was not measured.
        test: rightly ordered pairs of test texts.
        ood: the same for each other domain.
        fit: training labels that are reproduced.
        wrong: wrong training labels that are reproduced; None where there are none.
        rating: mean rating of the best of the most candidates.
    """

    share: float
    model: str
    heldout: float | None
    test: float
    ood: dict[str, float] = field(default_factory=dict[str, float])
    fit: float | None = None
    wrong: float | None = None
    rating: float = 0.0

    @property
    def ood_mean(self) -> float | None:
        """The mean over the other domains."""
        return mean_of(list(self.ood.values()))


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are there."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def warm_page(
    nodes: WarmNodes,
    settings: WarmSettings,
    pool: Pool,
    texts: Mapping[str, RatedTexts],
    gap: float,
    training_pairs: Callable[[Mapping[str, Any]], Pairs],
) -> Page:
    """Return the report.

    Args:
        nodes: of a finished study.
        settings: of the protocol.
        pool: with the results.
        texts: the scored texts by split: "test" and other domains.
        gap: smallest difference of mean ratings of a judged pair.
        training_pairs: returns the training pairs of a group's data section.
    """
    control = Rewards.of(pool.weights(nodes.control_scores.fingerprint)).texts["test"]
    control = (control - control.mean()) / control.std()
    rows: list[WarmRow] = []
    figures: list[Part] = []
    for group in nodes.groups:
        scored = _Scored(group, settings, pool, texts, gap, training_pairs(group.data))
        rows += scored.rows()
        figures += scored.best_of_n(control)
    more: list[Part] = [_memory(rows)] if len(nodes.groups) > 1 else []
    if nodes.features is not None:
        more.append(_features_part(notes_of(pool.ingredient(nodes.features.fingerprint), FeatureNotes)))
    return Page(
        title="WARM",
        subject="protocol",
        summary=" ".join(_sentence(rows, group.share) for group in nodes.groups),
        parts=[_main_table(rows, settings.sizes[-1], gap), _domain_table(rows), *figures, *more],
        lineage={f"{group.share:.0%} swapped": _lineage(group, pool) for group in nodes.groups},
    )


@dataclass(frozen=True)
class _Scored:
    """One share of swapped labels, with everything that its models are judged by."""

    group: NoiseGroup
    settings: WarmSettings
    pool: Pool
    texts: Mapping[str, RatedTexts]
    gap: float
    pairs: Pairs

    def singles(self) -> list[Rewards]:
        return [Rewards.of(self.pool.weights(node.fingerprint)) for node in self.group.scores]

    def accuracies(self) -> list[float]:
        return [self.pool.ingredient(node.fingerprint).heldout() for node in self.group.members]

    def models(self) -> dict[str, Rewards]:
        """Return the rewards of the best member, the ensembles of the kept members, and their weight average."""
        singles, best = self.singles(), best_first(self.accuracies(), self.settings.study.keep)
        kept = [singles[number] for number in best]
        return {
            BEST: singles[best[0]],
            ENSEMBLE: Rewards.together(kept),
            MEDIAN: Rewards.together(kept, "median"),
            WARM: Rewards.of(self.pool.weights(self.group.warm_scores.fingerprint)),
        }

    def rows(self) -> list[WarmRow]:
        accuracies = self.accuracies()
        table = [
            self.row(f"member {number + 1}", single, accuracies[number]) for number, single in enumerate(self.singles())
        ]
        heldout = {BEST: max(accuracies), WARM: self.pool.ingredient(self.group.warm_scores.fingerprint).heldout()}
        models = [self.row(name, rewards, heldout.get(name)) for name, rewards in self.models().items()]
        return [*table, self.mean_row(table), *models]

    def row(self, name: str, rewards: Rewards, heldout: float | None) -> WarmRow:
        means = {split: rated.means for split, rated in self.texts.items()}
        accuracy = {split: 100 * value for split, value in rewards.accuracy(means, self.gap).items()}
        pairs, mistaken = self.pairs, self.pairs.labels != self.pairs.truth
        fit, wrong = (rewards.agreement(pairs.labels, among) for among in (torch.ones_like(mistaken), mistaken))
        return WarmRow(
            share=self.group.share,
            model=name,
            heldout=None if heldout is None else 100 * heldout,
            test=accuracy.pop("test"),
            ood=accuracy,
            fit=None if fit is None else 100 * fit,
            wrong=None if wrong is None else 100 * wrong,
            rating=best_of_n(rewards.texts["test"], means["test"], self.settings.sizes[-1:])[0],
        )

    def mean_row(self, table: Sequence[WarmRow]) -> WarmRow:
        test, rating = mean_of([row.test for row in table]), mean_of([row.rating for row in table])
        assert test is not None
        assert rating is not None
        ood = {name: sum(row.ood[name] for row in table) / len(table) for name in table[0].ood}
        heldout = mean_of([row.heldout for row in table])
        fit, wrong = mean_of([row.fit for row in table]), mean_of([row.wrong for row in table])
        return WarmRow(self.group.share, MEAN, heldout, test, ood, fit, wrong, rating)

    def best_of_n(self, control: Tensor) -> list[Part]:
        """Return the curves of best-of-N, judged by ratings and by the control reward model."""
        sizes, share = self.settings.sizes, self.group.share
        judged: list[Part] = []
        models = {name: [rewards] for name, rewards in self.models().items()} | {MEAN: self.singles()}
        for label, judge in (
            ("mean rating", self.texts["test"].means),
            ("control reward, standard deviations", control),
        ):
            series: dict[str, list[float | None]] = {}
            for name, several in models.items():
                curves = [best_of_n(one.texts["test"], judge, sizes) for one in several]
                series[name] = [mean_of(list(values)) for values in zip(*curves, strict=True)]
            judged.append(
                Curves(
                    title=f"Best of N by {label.partition(',')[0]}, {share:.0%} swapped",
                    x_label=f"KL from the sampled texts, nats (N = {', '.join(map(str, sizes))})",
                    y_label=label,
                    x=[best_of_n_kl(size) for size in sizes],
                    series=series,
                )
            )
        return judged


def _main_table(rows: Sequence[WarmRow], largest: int, gap: float) -> Table:
    return Table(
        title="WARM against its members",
        columns=[
            "swapped", "model", "held-out, %", "ID, %", "OOD, %", "fit of labels, %", "fit of wrong labels, %",
            f"best of {largest}: rating",
        ],
        rows=[
            [f"{row.share:.0%}", row.model, row.heldout, row.test, row.ood_mean, row.fit, row.wrong, row.rating]
            for row in rows
        ],
        highlight=_of_warm(rows),
        note=(
            f"ID and OOD: all pairs of test texts whose mean ratings differ by {gap} or more, ordered rightly. Members are "
            f"ranked on held-out pairs, whose labels are as noisy as the training pairs'. Wrong labels: labels of training "
            f"pairs that contradict the mean of all raters, swapped or not."
        ),
    )  # fmt: skip


def _domain_table(rows: Sequence[WarmRow]) -> Table:
    names = list(rows[0].ood)
    return Table(
        title="OOD pairs by domain",
        columns=["swapped", "model", *(f"{name}, %" for name in names)],
        rows=[[f"{row.share:.0%}", row.model, *(row.ood[name] for name in names)] for row in rows],
        highlight=_of_warm(rows),
    )


def _of_warm(rows: Sequence[WarmRow]) -> list[int]:
    return [number for number, row in enumerate(rows) if row.model == WARM]


def _memory(rows: Sequence[WarmRow]) -> Curves:
    series: dict[str, list[float | None]] = {}
    for row in rows:
        if not row.model.startswith("member "):
            series.setdefault(row.model, []).append(row.wrong)
    return Curves(
        title="Wrong training labels that are reproduced",
        x_label="labels swapped, %",
        y_label="agreement with wrong labels, %",
        x=[100 * share for share in dict.fromkeys(row.share for row in rows)],
        series=series,
    )


def _features_part(notes: FeatureNotes) -> Curves:
    series: dict[str, list[float | None]] = {}
    for depth, measured in notes.layers.items():
        series[f"average, {depth} layer{'s' if int(depth) > 1 else ''}"] = [*measured["average"]]
    depth = "2" if "2" in notes.layers else next(iter(notes.layers))
    series[f"ensemble, {depth} layers"] = [*notes.layers[depth]["ensemble"]]
    for depth in notes.layers:
        series[f"p^{depth}"] = [chance ** int(depth) for chance in notes.probabilities]
    return Curves(
        title="Weight of a feature that each member has with probability p",
        x_label="p",
        y_label="weight, relative to a member that has it",
        x=notes.probabilities,
        series=series,
    )


def _sentence(rows: Sequence[WarmRow], share: float) -> str:
    by_name = {row.model: row for row in rows if row.share == share}
    warm, best, together = by_name[WARM], by_name[BEST], by_name[ENSEMBLE]

    def both(row: WarmRow) -> tuple[str, str]:
        return f"{row.test:.1f}", "none" if row.ood_mean is None else f"{row.ood_mean:.1f}"

    (warm_id, warm_ood), (best_id, best_ood), (ensemble_id, ensemble_ood) = map(both, (warm, best, together))
    text = (
        f"With {share:.0%} of the labels swapped, WARM orders {warm_id} % of the in-distribution and {warm_ood} % of the OOD "
        f"pairs rightly (best single {best_id} and {best_ood}, ensemble {ensemble_id} and {ensemble_ood})"
    )
    if warm.wrong is not None:
        text += (
            f" and reproduces {warm.wrong:.1f} % of the wrong training labels (best single {best.wrong:.1f}, ensemble "
            f"{together.wrong:.1f})"
        )
    return f"{text}."


def _lineage(group: NoiseGroup, pool: Pool) -> dict[str, Any]:
    average = pool.ingredient(group.warm.fingerprint)
    return {
        "members": [pool.ingredient(node.fingerprint).weights for node in group.members],
        "average": average.weights,
        "averaged": notes_of(average, AverageNotes).members,
    }
