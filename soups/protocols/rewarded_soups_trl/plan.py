"""The settings of `+protocol=rewarded_soups_trl` and the parameters of its nodes; the plan is that of rewarded soups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field

from soups.fitting.configuration import Devices
from soups.fitting.schema import Count, Positive, Section, Target
from soups.protocols.plan import Parameters
from soups.protocols.rewarded_soups.plan import Preference, RewardedStudy
from soups.protocols.runner import ProtocolConfiguration


class Prompts(Section):
    """Prompts to train on and to judge by: files (`soups.tasks.completions.prompt_file`), or `_target_` with arguments."""

    train: str | Target
    test: str | Target


class Generation(Section):
    """How completions are drawn; further fields of transformers' `GenerationConfig` may follow, such as top_p."""

    model_config = ConfigDict(extra="allow", frozen=True)

    samples: Count
    batch_size: Count = 16
    max_new_tokens: Count = 64
    temperature: Positive = 1.0


class TRLSettings(Section):
    """The section `protocol`.

    Attributes:
        study: preferences to interpolate for, and those with a reference.
        model: a folder or Hub name of a causal language model, the start of all fits.
        trainer: `_target_`, a trainer that takes `trainer.NEEDED`, and further arguments of it.
        args: fields of its configuration; `_target_` names the class where it is not the trainer's name with Config.
        rewards: two or more by name: `_target_`, a function with TRL's signature whose further arguments follow, or a class
            that is built from them and called so. Null leaves one out.
        prompts: of training and judging.
        generation: of the completions that policies are judged by.
        adapter: `_target_: peft.LoraConfig` with its arguments; merged into the weights after the fit. Null tunes all.
        export: preferences of `study.shares` whose models are written as Hugging Face folders.
    """

    study: RewardedStudy = Field(default_factory=RewardedStudy)
    model: str
    trainer: Target
    args: dict[str, Any]
    rewards: dict[str, Target | None]
    prompts: Prompts
    generation: Generation
    adapter: Target | None = None
    export: list[Preference] = Field(default_factory=list[Preference])


class DeviceTrainer(Section):
    """The settings of `trainer` that fits by TRL read; each runs on one device. The others are `protocol.args`."""

    accelerator: str = "auto"
    threads: Count | None = None


class TRLConfiguration(ProtocolConfiguration):
    """All settings of the protocol."""

    trainer: DeviceTrainer
    protocol: TRLSettings

    @property
    def devices(self) -> Devices:
        """Where fits run."""
        return Devices(accelerator=self.trainer.accelerator, threads=self.trainer.threads)


class TunedPolicy(Parameters):
    """Of ``policy``.

    Attributes:
        trl_version: of our code.
        model: folder or Hub name.
        trainer: module, name and further arguments of the trainer.
        args: fields of its configuration that decide the result.
        adapter: section of the adapter.
        rewards: names and sections, in their order.
        prompts: hash of the training prompts.
        shares: λ.
        seed: of the fit.
    """

    trl_version: int
    model: str
    trainer: list[Any]
    args: dict[str, Any]
    adapter: Target | None
    rewards: list[tuple[str, Target]]
    prompts: str
    shares: tuple[float, ...]
    seed: int


class CompletionScoring(Parameters):
    """Of ``scores``: as of ``policy``, and how the model is loaded and its completions are drawn."""

    trl_version: int
    model: str
    loading: dict[str, Any]
    rewards: list[tuple[str, Target]]
    prompts: str
    generation: Mapping[str, Any]
    seed: int
