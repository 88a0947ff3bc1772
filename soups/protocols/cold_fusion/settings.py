"""The settings of `+protocol=cold_fusion`; `conf/protocol/cold_fusion.yaml` explains them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from soups.errors import ConfigError, did_you_mean
from soups.fitting.schema import Count, CountOrNone, Flag, Must, Positive, Section, Target
from soups.fitting.spec import Augment, Task
from soups.protocols.cold_fusion.plan import ColdFusionStudy, Mode
from soups.protocols.cold_fusion.records import Policy
from soups.protocols.runner import FittingConfiguration


class HeldoutCheck(Section):
    """What fusers check.

    Attributes:
        tolerance: how far below the base's the mean held-out accuracy of a contribution's linear probes may be, in [0, 1].
        tasks: names of the tasks that the probes are fitted to; null for all.
    """

    tolerance: Annotated[float, Field(ge=0, le=1, strict=True), Must("an accuracy between 0 and 1")]
    tasks: list[str] | None = None


class PolicySettings(Section):
    """The repository's policy, as `Policy` has it; the quorum is `per_round`, and `heldout` gives a score to compare."""

    ELSEWHERE: ClassVar[dict[str, str]] = {
        "quorum": "is set by protocol.per_round; leave it out.",
        "tolerance": "needs a score to compare: write protocol.policy.heldout={tolerance: …}.",
    }

    method: str = "linear"
    parameters: dict[str, Any] = Field(default_factory=dict[str, Any])
    clip: Positive | None = None
    max_norm: Positive | None = 4.0
    stale: Literal["rebase", "refuse"] = "rebase"
    max_age: CountOrNone | None = None
    heldout: Annotated[HeldoutCheck | None, Must("{tolerance: 0.02}, which says how far a score may fall")] = None

    def policy(self) -> Policy:
        """Return the policy, but for its quorum."""
        values = self.model_dump(exclude={"heldout"})
        return Policy(**values, tolerance=self.heldout.tolerance if self.heldout else 0.0)


class ColdFusionSettings(Section):
    """The section `protocol`.

    Attributes:
        mode, rounds, per_round, fine_tuned, shots: see `ColdFusionStudy`.
        contributors: processes in asynchronous mode, 4 when null; synchronous rounds have one a task.
        tasks: `data` sections of the contributors' tasks, by name; null takes one out.
        unseen: `data` sections of tasks that nobody contributes.
        policy: of the repository.
        multitask: train the multitask reference.
        repository: folder or URL of the repository; beside the pool's results when null.
    """

    mode: Mode = "synchronous"
    rounds: Count = 3
    per_round: int = 3
    contributors: Count | None = None
    tasks: dict[str, Target | None]
    unseen: dict[str, Target | None]
    policy: PolicySettings = Field(default_factory=PolicySettings)
    fine_tuned: list[int] = Field(default_factory=lambda: [0, -1])
    shots: Count = 50
    multitask: Flag = True
    repository: str | None = None

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        if self.contributors is not None and self.mode == "synchronous":
            raise ValueError("protocol.contributors would do nothing with protocol.mode=synchronous: leave it out.")
        return self


class ColdFusionConfiguration(FittingConfiguration):
    """All settings; those of fits hold for every task."""

    task: Task
    augment: Augment | None = None
    protocol: ColdFusionSettings

    def study(self) -> ColdFusionStudy:
        """Return the study.

        Raises:
            ConfigError: a held-out check of tasks that there are not.
        """
        own = self.protocol
        seen = {name: self.fit(data) for name, data in own.tasks.items() if data is not None}
        # As many passes over the data, in all, as the contributors make.
        passes = max(1, round(own.rounds * own.per_round / max(1, len(seen))))
        return ColdFusionStudy(
            seen=seen,
            unseen={name: self.fit(data) for name, data in own.unseen.items() if data is not None},
            rounds=own.rounds,
            per_round=own.per_round,
            policy=own.policy.policy(),
            seed=self.seed,
            fine_tuned=own.fine_tuned,
            shots=own.shots,
            multitask_epochs=passes * (self.trainer.max_epochs or 1) if own.multitask else 0,
            mode=own.mode,
            contributors=own.contributors or 4,
            checked=_checked(own.policy.heldout, list(seen)),
        )


def _checked(check: HeldoutCheck | None, tasks: list[str]) -> list[str]:
    """Return the names of the checked tasks; none without a check."""
    if check is None:
        return []
    chosen = tasks if check.tasks is None else check.tasks
    for name in chosen:
        if name not in tasks:
            raise ConfigError(
                f"protocol.policy.heldout.tasks: {name!r} is none of protocol.tasks; {did_you_mean(name, tasks)}"
            )
    if not chosen:
        raise ConfigError("protocol.policy.heldout.tasks is empty; leave it out for all tasks.")
    return chosen
