"""`+protocol=rewarded_soups_trl`: a causal language model tuned to each reward by a trainer of TRL, and the weights between."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soups.errors import ConfigError, WeightsError
from soups.fitting.environment import device_for
from soups.fitting.progress import StepFile
from soups.fitting.schema import build
from soups.protocols.execution import Notes, Operation, Output, Work
from soups.protocols.plan import Node, Plan
from soups.protocols.rewarded_soups.interpolation import Shares, label, preference
from soups.protocols.rewarded_soups.page import ParetoFront
from soups.protocols.rewarded_soups.plan import RewardedNodes, interpolation, rewarded_nodes
from soups.protocols.rewarded_soups_trl.plan import CompletionScoring, TRLConfiguration, TunedPolicy
from soups.protocols.rewarded_soups_trl.trainer import (
    REPORTED,
    check_fields,
    find_reward,
    read_prompts,
    reporter,
    require_trl,
    trainer_classes,
)
from soups.protocols.runner import ProtocolRunner
from soups.reporting.page import Page
from soups.stores.files import fingerprint, replacing_folder
from soups.stores.pool import Pool
from soups.tasks.completion_rewards import Reward
from soups.tasks.completions import complete, room, tokenise_prompts
from soups.tasks.network import from_hub
from soups.tasks.text_models import load_config, load_tokenizer, quiet_loading
from soups.weights import Weights

# Raise it when a change of this code changes the weights or the rewards that the same settings give.
TRL_VERSION = 1


class HistoryNotes(Notes):
    """What the trainer logged: numbers by name, one entry a logged step."""

    history: list[dict[str, float]]


class ExampleNotes(Notes):
    """A few completions, each with its prompt."""

    examples: list[dict[str, Any]]


class RewardedSoupsTRL(ProtocolRunner[TRLConfiguration]):
    """The protocol of `conf/protocol/rewarded_soups_trl.yaml`.

    Raises:
        ConfigError: a setting that does not make sense, or TRL is not installed.
        soups.errors.DataError: prompts that cannot be read.
    """

    name = "rewarded_soups_trl"
    Configuration = TRLConfiguration

    def __init__(self, configuration: TRLConfiguration) -> None:
        super().__init__(configuration)
        own = self.own = configuration.protocol
        self.rewards = {name: dict(section) for name, section in own.rewards.items() if section is not None}
        if len(self.rewards) < 2:
            raise ConfigError(f"protocol.rewards needs two rewards or more, and has {len(self.rewards)}.")
        require_trl()
        self.trainer, self.config = trainer_classes(own.trainer, own.args)
        self.options = {key: value for key, value in own.trainer.items() if key != "_target_"}
        self.args = {key: value for key, value in own.args.items() if key != "_target_"}
        check_fields(self.config, self.args, bool(own.study.multi_objective))
        for name, section in self.rewards.items():
            find_reward(section, f"protocol.rewards.{name}")
        sources = {"train": own.prompts.train, "test": own.prompts.test}
        self.prompts = {part: read_prompts(source, part) for part, source in sources.items()}
        self.nodes: RewardedNodes = rewarded_nodes(own.study, self._parameters, self._scoring(), len(self.rewards))
        self.start = Node("score", "scores", self._scoring(), (), "scores of the start")
        self.exported = [preference(given, len(self.rewards)) for given in own.export]
        if unknown := [label(shares) for shares in self.exported if shares not in self.nodes.soups]:
            raise ConfigError(f"protocol.export has {unknown[0]}, which is not among protocol.study.shares.")

    def _parameters(self, shares: Shares) -> TunedPolicy:
        return TunedPolicy(
            trl_version=TRL_VERSION,
            model=self.own.model,
            trainer=[self.trainer.__module__, self.trainer.__qualname__, self.options],
            args={key: value for key, value in self.args.items() if key not in REPORTED},
            adapter=self.own.adapter,
            rewards=list(self.rewards.items()),
            prompts=fingerprint(self.prompts["train"]),
            shares=shares,
            seed=self.configuration.seed,
        )

    def _scoring(self) -> CompletionScoring:
        return CompletionScoring(
            trl_version=TRL_VERSION,
            model=self.own.model,
            loading=self._loading(),
            rewards=list(self.rewards.items()),
            prompts=fingerprint(self.prompts["test"]),
            generation=self.own.generation.model_dump(),
            seed=self.configuration.seed,
        )

    def plan(self) -> Plan:
        """Return the plan."""
        return Plan((*self.nodes.plan().targets, self.start))

    @property
    def shown(self) -> dict[str, Any]:
        """Settings that decide the report alone."""
        return {"export": [list(shares) for shares in self.exported]}

    def operations(self) -> Mapping[str, Operation]:
        """Return the operations that the plan names."""
        return {"policy": self._policy, "interpolate": interpolation, "scores": self._scores}

    def page(self, plan: Plan, pool: Pool) -> Page:
        """Return the report."""
        found = self.nodes

        def values(node: Node) -> tuple[float, ...]:
            metrics = pool.ingredient(node.fingerprint).metrics["test"]
            return tuple(metrics[name] for name in self.rewards)

        front = ParetoFront(
            rewards=list(self.rewards),
            unit="",
            start=values(self.start),
            ends=[values(node) for node in found.ends],
            soups={shares: values(node) for shares, node in found.soups.items()},
            references={shares: values(node) for shares, node in found.references.items()},
        )
        prompts, samples = len(self.prompts["test"]), self.own.generation.samples
        scored = [self.start, *found.ends, *found.soups.values(), *found.references.values()]
        note = f"Mean rewards of {samples} completions of each of {prompts} test prompts, drawn with one seed for all models."
        cautions: list[str] = []
        if prompts > 1:
            by_prompt = torch.stack([pool.weights(node.fingerprint)["rewards"].double().mean(dim=2) for node in scored])
            errors = (by_prompt.std(dim=2) / math.sqrt(prompts)).amax(dim=0).tolist()
            listed = ", ".join(f"{name} {error:.3g}" for name, error in zip(self.rewards, errors, strict=True))
            note += f" Standard errors over prompts, at most: {listed}."
        known = {fingerprint(row["prompt"]) for row in self.prompts["train"]}
        if seen := sum(fingerprint(row["prompt"]) in known for row in self.prompts["test"]):
            cautions.append(f"{seen} of the {prompts} test prompts are training prompts too.")
        return front.page(pool, found, note, cautions)

    def export(self, plan: Plan, pool: Pool, folder: Path) -> None:
        """Write the models of `export` as folders that transformers and TRL load."""
        for shares in self.exported:
            place = folder / f"policy_{label(shares).removeprefix('λ = ').replace(', ', '_')}"
            if place.is_dir():
                continue
            model: Any = self._network(pool.weights(self.nodes.soups[shares].inputs[0].fingerprint))
            with replacing_folder(place) as scratch:
                model.save_pretrained(scratch)
                self._tokenizer().save_pretrained(scratch)

    def _device(self) -> torch.device:
        return device_for(self.configuration.devices)

    def _set_threads(self) -> None:
        if threads := self.configuration.trainer.threads:
            torch.set_num_threads(threads)

    def _loading(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained`, TRL's: float32 unless the user says otherwise."""
        return {"dtype": "float32", **(self.args.get("model_init_kwargs") or {})}

    def _hub(self) -> dict[str, Any]:
        """Return the arguments of loading that tokenizers and configurations take too."""
        return {key: value for key, value in self._loading().items() if key in ("revision", "trust_remote_code")}

    def _tokenizer(self) -> Any:
        return load_tokenizer(self.own.model, **self._hub())

    def _built_rewards(self) -> list[Reward]:
        return [
            Reward(name, find_reward(section, f"protocol.rewards.{name}")()) for name, section in self.rewards.items()
        ]

    def _network(self, weights: Weights | None) -> torch.nn.Module:
        """Return the model with some weights, or those that it was pretrained with."""
        from transformers import AutoModelForCausalLM

        quiet_loading()
        model = from_hub(
            self.own.model, lambda: AutoModelForCausalLM.from_pretrained(self.own.model, **self._loading())
        )
        if weights is not None:
            wanted = dict(model.named_parameters())
            if wanted.keys() != weights.keys():
                name = min(wanted.keys() ^ weights.keys())
                raise WeightsError(
                    f"The policy and {self.own.model} do not have the same parameters: {name} is in one of them."
                )
            with torch.no_grad():
                for name, parameter in wanted.items():
                    parameter.copy_(weights[name])
        return model

    def _policy(self, work: Work) -> Output:
        """Tune the model to one reward, or to Σ λᵢ Rᵢ."""
        parameters = work.read(TunedPolicy)
        shares, seed = parameters.shares, parameters.seed
        self._set_threads()
        rewards = self._built_rewards()
        given = [reward for reward, share in zip(rewards, shares, strict=True) if share == 1] or rewards
        # A temporary folder of its own: nothing that a trainer writes outlives the fit.
        with tempfile.TemporaryDirectory(prefix="soups-trl-") as folder, warnings.catch_warnings():
            # TRL calls what transformers will rename; that is not for our users to act on.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            weights, history = self._tune(work, folder, seed, given, shares)
        last = next((row for row in reversed(history) if "reward" in row), {})
        return Output(weights, {"train": {"reward": last["reward"]}} if last else {}, HistoryNotes(history=history))

    def _tune(
        self, work: Work, folder: str, seed: int, rewards: Sequence[Reward], shares: Shares
    ) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        from datasets import Dataset
        from transformers import PrinterCallback, ProgressCallback

        quiet_loading()
        tokenizer = self._tokenizer()
        values: dict[str, Any] = {
            "report_to": "none",
            "disable_tqdm": True,
            **self.args,
            "output_dir": folder,
            "save_strategy": "no",
            "seed": seed,
            "use_cpu": self._device().type == "cpu",
        }
        if len(rewards) > 1:
            values["reward_weights"] = list(shares)
        more = {
            **self.options,
            **({"peft_config": build(self.own.adapter, "protocol.adapter")} if self.own.adapter else {}),
        }
        progress = StepFile(work.pool, work.node.fingerprint)
        try:
            config: Any = self.config(**values)
            longest = room(
                load_config(self.own.model, **self._hub()), int(getattr(config, "max_completion_length", 0) or 0)
            )
            tokenise_prompts(tokenizer, self.prompts["train"], longest)  # a short word before the trainer's long one
            trainer: Any = from_hub(
                self.own.model,
                lambda: self.trainer(
                    model=self.own.model,
                    reward_funcs=list(rewards),
                    args=config,
                    train_dataset=Dataset.from_list(self.prompts["train"]),
                    processing_class=tokenizer,
                    callbacks=[reporter(progress)],
                    **more,
                ),
            )
        except (ImportError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.trainer.__name__} refuses protocol.trainer or protocol.args: {error}") from error
        if values["disable_tqdm"]:
            for callback in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(callback)
        try:
            trainer.train()
        finally:
            progress.remove()
        if trainer.state.global_step < 1:
            raise ConfigError(
                f"{self.trainer.__name__} made no step: {len(self.prompts['train'])} prompts do not fill a batch of "
                f"protocol.args, or it has no steps."
            )
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self.own.adapter:
            model = model.merge_and_unload()
        history = [
            {key: float(value) for key, value in row.items() if isinstance(value, int | float) and math.isfinite(value)}
            for row in trainer.state.log_history
        ]
        weights = {name: parameter.detach().cpu().clone().contiguous() for name, parameter in model.named_parameters()}
        return weights, history

    def _scores(self, work: Work) -> Output:
        """Give every test prompt the rewards of its completions, float32 (rewards, prompts, samples)."""
        self._set_threads()
        model = self._network(work.tensors("policy") if work.node.inputs else None).to(self._device())
        seed = work.read(CompletionScoring).seed
        rows = self.prompts["test"]
        written = complete(model, self._tokenizer(), rows, seed=seed, **self.own.generation.model_dump())
        found = torch.tensor([reward(**written.arguments()) for reward in self._built_rewards()])
        means = {name: float(mean) for name, mean in zip(self.rewards, found.double().mean(dim=1), strict=True)}
        few = zip(written.rows[:3], written.texts[:3], strict=True)
        examples = [{"prompt": row["prompt"], "completion": text} for row, text in few]
        return Output(
            {"rewards": found.view(len(self.rewards), len(rows), -1)},
            {"test": means},
            ExampleNotes(examples=examples),
        )
