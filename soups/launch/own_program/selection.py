"""Choose a soup among ingredients by a program's validation loop, then report on it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from soups.errors import ConfigError
from soups.evaluation.cautions import averaged_statistics, running_statistics, statistics_gaps
from soups.fitting.environment import versions
from soups.launch.own_program.configuration import Program
from soups.launch.own_program.evaluation import Evaluation
from soups.launch.own_program.ingredient import AFTERWARDS
from soups.launch.own_program.members import ProgramIngredients
from soups.launch.own_program.module_weights import extra_state
from soups.launch.own_program.options import recipe_options
from soups.recipes import RECIPES, Candidate, Soup, Step, greedy, needs_of, uniform
from soups.reporting import Decision, Row, SoupReport, differences, flatten
from soups.reporting.soup_report import soup_name
from soups.stores.pool import Ingredient, Pool
from soups.weights import Weights, hash_weights

_UPDATE = (
    "Measure the soup's with your training data: torch.optim.swa_utils.update_bn(loader, model). The search here scored "
    "averages of statistics."
)
# Settings that are shown beside an ingredient.
_SHOWN = 4


@dataclass
class ProgramSelection:
    """Choose a soup among ingredients by a program's validation loop, then report on it.

    Attributes:
        program: with its start and metric.
        pool: of the ingredients.
        chosen: the ingredients.
        evaluation: of the program.
    """

    program: Program
    pool: Pool
    chosen: ProgramIngredients
    evaluation: Evaluation

    def __post_init__(self) -> None:
        self._known: dict[str, dict[str, float]] = {}
        self.monitor, self.sign = str(self.program.monitor), 1.0 if self.program.mode == "max" else -1.0
        # Best first.
        self.members = sorted(
            self.chosen.members, key=lambda record: (-self.sign * record.heldout(self.monitor), record.fingerprint)
        )

    def validate(self, weights: Weights) -> dict[str, float]:
        """Return what validation logs for some weights; the same weights are validated once."""
        key = hash_weights(weights)
        if key not in self._known:
            self._known[key] = self.evaluation.validate(weights)
        return self._known[key]

    def score(self, weights: Weights) -> float:
        """Return the score of some weights, larger is better."""
        return self.sign * self.validate(weights)[self.monitor]

    def report(self, name: str, options: Mapping[str, Any], told: Sequence[str]) -> tuple[SoupReport, Weights]:
        """Select the soup, then test it; return the record and the soup's weights."""
        remembering = self._check_repeats()
        began = time.perf_counter()
        found = self.pool.start(self.program.spec.start)
        assert found is not None
        _, start = found
        recipe = str(options["recipe"])
        soups, steps = self._search(recipe, recipe_options(options), start)
        searched = time.perf_counter()
        best = self.pool.weights(self.members[0].fingerprint)
        models = {"start": start, "best single": best, **{soup_name(key): soup.weights for key, soup in soups.items()}}
        measured = {key: self._metrics(self.validate(weights), remembering) for key, weights in models.items()}
        tested = {key: self.evaluation.test(weights) for key, weights in models.items()}
        soup = soups[recipe]
        by_short = {record.short: record.fingerprint for record in self.members}
        data = self.evaluation.data
        samples = sum(data.samples) if data and None not in data.samples else 0  # pyright: ignore[reportArgumentType, reportCallIssue]
        report = SoupReport(
            fingerprint=name,
            name=recipe,
            settings={"soup": dict(options)},
            versions=versions(),
            pool=self.pool.url,
            metric=self.monitor,
            mode=self.program.mode or "max",
            members=[by_short[short] for short in soup.members],
            ingredients=[record.fingerprint for record in self.members],
            splits={"heldout": samples, **({"test": 0} if any(tested.values()) else {})},
            rows=self._rows(measured, tested, soups, steps, recipe, remembering),
            steps=[self._decision(step) for step in soup.steps or steps],
            search=recipe if soup.steps else "greedy",
            lineage={
                "recipe": dict(options),
                "start": self.program.spec.start,
                "validation data": data.digest if data else "",
                "soup": hash_weights(soup.weights),
                "members": [
                    {"fingerprint": record.fingerprint, "weights": record.weights}
                    for record in self.members
                    if record.short in soup.members
                ],
                "coefficients": soup.coefficients,
                "heldout": self.sign * soup.score,
                "versions": versions(),
                "pool": self.pool.url,
            },
            seconds={"search": searched - began, "evaluation": time.perf_counter() - searched},
            coefficients=soup.coefficients,
            evaluations=len(self._known),
            warnings=list(dict.fromkeys([*told, *self.chosen.told, *self._warnings(remembering)])),
            details={**soup.details, "metrics that remember": remembering},
        )
        return report, soup.weights

    def _search(
        self, recipe: str, options: Mapping[str, Any], start: Weights
    ) -> tuple[dict[str, Soup], Sequence[Step]]:
        candidates = [
            Candidate(
                record.short, self.sign * record.heldout(self.monitor),
                lambda name=record.fingerprint: self.pool.weights(name),
                lambda name=record.fingerprint: self.pool.store(name),
            )
            for record in self.members
        ]  # fmt: skip
        ties = options.get("ties", "paper") if recipe == "greedy" else "paper"
        soups = {"uniform": uniform(candidates, self.score), "greedy": greedy(candidates, self.score, ties)}
        steps = soups["greedy"].steps
        if recipe not in soups:
            needs = needs_of(RECIPES[recipe])
            origin = {"start": Candidate("start", math.nan, lambda: start)} if "start" in needs else {}
            soups[recipe] = RECIPES[recipe](candidates, self.score, **origin, **options)
        return soups, steps

    def _rows(
        self, measured: Mapping[str, dict[str, float]], tested: Mapping[str, dict[str, float]],
        soups: Mapping[str, Soup], steps: Sequence[Step], recipe: str, remembering: Sequence[str],
    ) -> list[Row]:  # fmt: skip
        own = {record.short: self._metrics(record.metrics["heldout"], remembering) for record in self.members}
        keys = [key for key in next(iter(own.values())) if all(key in values for values in own.values())]
        average = {key: math.fsum(values[key] for values in own.values()) / len(own) for key in keys}
        fates = self._fates(soups, steps, recipe)
        labels = _labels(self.members)

        def row(name: str, kind: str, note: str = "") -> Row:
            metrics = {"heldout": measured[name], **({"test": tested[name]} if tested[name] else {})}
            return Row(name=name, kind=kind, metrics=metrics, note=note)

        return [
            row("start", "start"),
            *(
                Row(
                    name=name, kind="ingredient", metrics={"heldout": values},
                    note="; ".join(part for part in (fates.get(name, "left out"), labels[name]) if part),
                )
                for name, values in own.items()
            ),
            Row(name="mean of ingredients", kind="mean", metrics={"heldout": average}),
            row("best single", "best", self.members[0].short),
            *(
                row(soup_name(key), "soup", soup.note or f"{len(soup.members)} averaged")
                for key, soup in soups.items()
            ),
        ]  # fmt: skip

    def _fates(self, soups: Mapping[str, Soup], steps: Sequence[Step], recipe: str) -> dict[str, str]:
        """Say of each ingredient what became of it: in the greedy search, or in another recipe's soup."""
        soup = soups[recipe]
        if recipe != "greedy":
            return {name: f"share {value:.3f}" for name, value in soup.coefficients.items()} or dict.fromkeys(
                soup.members, "in the soup"
            )
        fates: dict[str, str] = {}
        for number, step in enumerate(steps):
            relation = "<" if self.sign > 0 else ">"
            fates[step.name] = (
                ("kept: the best" if number == 0 else "kept")
                if step.kept
                else f"left out: soup {self.sign * step.soup_score:.4f} {relation} {self.sign * step.to_reach:.4f}"
            )
        return fates

    def _decision(self, step: Step) -> Decision:
        return Decision(
            name=step.name, own_score=self.sign * step.own_score, soup_score=self.sign * step.soup_score,
            to_reach=None if math.isinf(step.to_reach) else self.sign * step.to_reach, kept=step.kept,
            action=step.action, evaluated=step.evaluated,
        )  # fmt: skip

    def _metrics(self, values: Mapping[str, float], remembering: Sequence[str]) -> dict[str, float]:
        """Return metrics with the one that selects first, without those that remember other models."""
        kept = {key: value for key, value in values.items() if key not in remembering}
        return {self.monitor: kept.pop(self.monitor), **kept}

    def _check_repeats(self) -> list[str]:
        """Validate the worst ingredient, the best, and the worst again: metrics that remember earlier models show.

        Returns:
            The metrics, other than the one that selects, that say something else of the same weights.

        Raises:
            ConfigError: the metric that selects says something else the second time, or than when the ingredients were
                made.
        """
        tried = [self.members[-1], self.members[0], self.members[-1]]
        weights = {record.fingerprint: self.pool.weights(record.fingerprint) for record in tried}
        found = [self.evaluation.validate(weights[record.fingerprint]) for record in tried]
        values, then = [one[self.monitor] for one in found], [record.heldout(self.monitor) for record in tried]
        way_out = "Fix the split, or name another metric: ++ingredient.monitor=…"
        if not _close(values[0], values[2]):
            raise ConfigError(
                f"{self.monitor} of the same weights is {values[0]:.4f} at first and {values[2]:.4f} after another model was "
                f"validated, so it cannot choose a soup: it remembers earlier validations (a best-so-far), or the validation "
                f"data are drawn anew each time. {way_out}"
            )
        for record, before, now in zip(tried, then, values, strict=True):
            if not math.isclose(before, now, rel_tol=0.01, abs_tol=0.005):  # another machine may round one sample over
                raise ConfigError(
                    f"{self.monitor} of ingredient {record.short} was {before:.4f} when it was made and is {now:.4f} now, so "
                    f"it cannot choose a soup: the validation data have changed, or the metric remembers the fit. {way_out}"
                )
        for record, one in zip(tried[1:], found[1:], strict=True):
            self._known.setdefault(hash_weights(weights[record.fingerprint]), one)
        return [
            key
            for key in found[0]
            if key != self.monitor
            and (
                not _close(found[0][key], found[2].get(key, math.nan))
                or any(
                    not math.isclose(
                        record.metrics["heldout"].get(key, math.nan), one[key], rel_tol=0.01, abs_tol=0.005
                    )
                    for record, one in zip(tried, found, strict=True)
                )
            )
        ]

    def _warnings(self, remembering: Sequence[str]) -> list[str]:
        """Return what a careful reader must know of the ingredients."""
        read: list[Weights] = []
        for record in self.members:
            with self.pool.store(record.fingerprint) as store:
                read.append({name: store.read(name) for name in running_statistics(store)})
        gaps = {record.short: statistics_gaps(read[0], own) for record, own in zip(self.members, read, strict=True)}
        caution = averaged_statistics(gaps, remedy=_UPDATE)
        found = [caution.message] if caution else []
        if remembering:
            found.append(
                f"Not shown, because they remember the models that were validated before, or differ from one validation to "
                f"the next: {', '.join(remembering)}."
            )
        if failed := [record for record in self.members if AFTERWARDS in record.notes]:
            found.append(
                f"The program failed after the fit of {', '.join(record.short for record in failed)}, whose weights were "
                f"kept: {failed[0].notes[AFTERWARDS]}"
            )
        fits = max(int(record.notes.get("fits", 1)) for record in self.members)
        if fits > 1 and self.program.spec.fit == "last":
            found.append(
                f"The program calls trainer.fit {fits} times on one module; the ingredients are the weights after the last. "
                f"Another call counts with ++ingredient.fit=1, 2, …"
            )
        if extra := extra_state(self.evaluation.fit.module):
            shown = ", ".join(extra[:3]) + (", …" if len(extra) > 3 else "")
            found.append(
                f"The module keeps state that is no tensor of weights ({shown}). It is neither averaged nor in the soup's "
                f"file: load that with strict=False."
            )
        return found


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-6) or (math.isnan(one) and math.isnan(other))


def _labels(members: Sequence[Ingredient]) -> dict[str, str]:
    """Return the settings that tell ingredients apart, for people."""
    configs = {record.short: record.determinants.get("config", {}) for record in members}
    keys, _ = differences(configs)
    flat = {name: flatten(config) for name, config in configs.items()}
    return {
        name: " ".join(f"{key.rpartition('.')[2]}={values[key]}" for key in keys[:_SHOWN] if key in values)
        for name, values in flat.items()
    }
