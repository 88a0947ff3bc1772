"""`+protocol=rewarded_soups_trl`: a causal language model tuned to each reward by a trainer of TRL, and everything between."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soups.errors import ConfigError, WeightsError, did_you_mean
from soups.fitting.schema import build
from soups.launch.front import Front
from soups.launch.progress import StepFile
from soups.launch.settings import Settings, device_count
from soups.launch.start import device_for
from soups.protocols import Node, Operation, Output, Plan, Work
from soups.protocols.rewarded import Layout, Shares, Study, interpolation, label, layout, preference, shares_of
from soups.reporting.page import Page
from soups.stores.files import fingerprint, replacing_folder
from soups.stores.pool import Pool
from soups.tasks.completion_rewards import Reward
from soups.tasks.completions import Row, check_rows, complete, prompt_file, room, tokenise_prompts
from soups.tasks.network import from_hub
from soups.tasks.text_models import load_config, load_tokenizer, quiet_loading
from soups.weights import Weights

# Raise it when a change of this module changes the weights or the rewards that the same settings give.
TRL_VERSION = 1

# Arguments of every trainer that tunes to rewards.
NEEDED = ("model", "reward_funcs", "args", "train_dataset", "processing_class", "callbacks")

# Fields of TRL's configuration that the protocol sets itself, and what to use instead.
OURS = {
    "output_dir": "a fit writes into a temporary folder, and its result into the pool",
    "save_strategy": "a killed fit is done again",
    "resume_from_checkpoint": "a killed fit is done again",
    "push_to_hub": "results are in the pool, and protocol.export writes models",
    "seed": "use protocol.study.seed",
    "reward_weights": "they are the λ of protocol.study",
    "use_cpu": "use trainer.accelerator",
}
# Those that decide nothing of the result.
SHOWN = ("report_to", "run_name", "project", "disable_tqdm", "log_completions", "num_completions_to_print", "log_level")


class RewardedSoupsTRL:
    """The protocol of `conf/protocol/rewarded_soups_trl.yaml`.

    Args:
        settings: all settings; `trainer.accelerator` and `trainer.threads` say on what fits run.
        study: fields of `soups.protocols.rewarded.Study`.
        model: a folder or Hub name of a causal language model, the start of all fits.
        trainer: `_target_`, a trainer that takes `NEEDED`, and further arguments of it.
        args: fields of its configuration; `_target_` names the class where it is not the trainer's name with Config.
        rewards: two or more by name: `_target_`, a function with TRL's signature whose further arguments follow, or a class
            that is built from them and called so. Null leaves one out.
        prompts: "train" and "test": files (`soups.tasks.completions.prompt_file`), or `_target_` with arguments.
        generation: of the completions that policies are judged by; arguments of `soups.tasks.completions.complete`.
        adapter: `_target_: peft.LoraConfig` with its arguments; merged into the weights after the fit. Null tunes all.
        export: preferences of `study.shares` whose models are written as Hugging Face folders.

    Raises:
        ConfigError: a setting that does not make sense, or TRL is not installed.
        soups.errors.DataError: prompts that cannot be read.
    """

    name = "rewarded_soups_trl"

    def __init__(
        self,
        settings: Settings,
        study: Mapping[str, Any],
        model: str,
        trainer: Mapping[str, Any],
        args: Mapping[str, Any],
        rewards: Mapping[str, Mapping[str, Any] | None],
        prompts: Mapping[str, Any],
        generation: Mapping[str, Any],
        adapter: Mapping[str, Any] | None = None,
        export: Sequence[float | Sequence[float]] = (),
    ) -> None:
        self.settings, self.study, self.model = settings, Study(**study), str(model)
        self.rewards = {name: dict(section) for name, section in rewards.items() if section is not None}
        self.adapter = dict(adapter) if adapter else None
        self.generation = dict(generation)
        if len(self.rewards) < 2:
            raise ConfigError(f"protocol.rewards needs two rewards or more, and has {len(self.rewards)}.")
        if device_count(settings) > 1:
            raise ConfigError(
                "A fit of TRL runs on one device: trainer.devices=1. Several fits run at once with a launcher, "
                "hydra/launcher=joblib."
            )
        require_trl()
        self.trainer, self.config = trainer_classes(trainer, args)
        self.options = {key: value for key, value in trainer.items() if key != "_target_"}
        self.args = {key: value for key, value in args.items() if key != "_target_"}
        self._check_args()
        for name, section in self.rewards.items():
            find(section, f"protocol.rewards.{name}")
        self.prompts = {part: read_prompts(prompts.get(part), part) for part in ("train", "test")}
        self.export_shares = [preference(given, len(self.rewards)) for given in export]
        if unknown := [label(shares) for shares in self.export_shares if shares not in self.layout().soups]:
            raise ConfigError(f"protocol.export has {unknown[0]}, which is not among protocol.study.shares.")

    def _check_args(self) -> None:
        for key in self.args:
            if key in OURS:
                raise ConfigError(f"protocol.args.{key} cannot be set: {OURS[key]}.")
        fields = {field.name for field in dataclasses.fields(self.config) if field.init}
        if unknown := sorted(set(self.args) - fields):
            raise ConfigError(
                f"protocol.args.{unknown[0]} is no setting of {self.config.__name__}: {did_you_mean(unknown[0], fields)}"
            )
        if self.study.multi_objective and "reward_weights" not in fields:
            raise ConfigError(
                f"{self.config.__name__} has no reward_weights, so there is no multi-objective reference with it: "
                f"protocol.study.multi_objective=[]"
            )

    def layout(self) -> Layout:
        """Return the nodes of fits, interpolations and their rewards."""
        common = {
            "trl_version": TRL_VERSION,
            "model": self.model,
            "trainer": [self.trainer.__module__, self.trainer.__qualname__, self.options],
            "args": {key: value for key, value in self.args.items() if key not in SHOWN},
            "adapter": self.adapter,
            "rewards": list(map(list, self.rewards.items())),
            "prompts": fingerprint(self.prompts["train"]),
        }
        return layout(self.study, common, self._scoring(), len(self.rewards))

    def _scoring(self) -> dict[str, Any]:
        return {
            "trl_version": TRL_VERSION,
            "model": self.model,
            "loading": self._loading(),
            "rewards": list(map(list, self.rewards.items())),
            "prompts": fingerprint(self.prompts["test"]),
            "generation": self.generation,
            "seed": self.study.seed,
        }

    def start(self) -> Node:
        """Return the node of the start's rewards."""
        return Node("score", "scores", self._scoring(), (), "scores of the start")

    def plan(self) -> Plan:
        """Return the plan."""
        return Plan((*self.layout().plan().targets, self.start()))

    def operations(self) -> Mapping[str, Operation]:
        """Return what the plan's nodes do."""
        return {"policy": self._policy, "interpolate": interpolation, "scores": self._scores}

    def _loading(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained`, TRL's: float32 unless the user says otherwise."""
        return {"dtype": "float32", **(self.args.get("model_init_kwargs") or {})}

    def _hub(self) -> dict[str, Any]:
        """Return those of them that tokenizers and configurations take too."""
        return {key: value for key, value in self._loading().items() if key in ("revision", "trust_remote_code")}

    def _tokenizer(self) -> Any:
        return load_tokenizer(self.model, **self._hub())

    def _built_rewards(self) -> list[Reward]:
        return [Reward(name, find(section, f"protocol.rewards.{name}")()) for name, section in self.rewards.items()]

    def _network(self, weights: Weights | None) -> torch.nn.Module:
        """Return the model with some weights, or those that it was pretrained with."""
        from transformers import AutoModelForCausalLM

        quiet_loading()
        model = from_hub(self.model, lambda: AutoModelForCausalLM.from_pretrained(self.model, **self._loading()))
        if weights is not None:
            wanted = dict(model.named_parameters())
            if wanted.keys() != weights.keys():
                name = min(wanted.keys() ^ weights.keys())
                raise WeightsError(
                    f"The policy and {self.model} do not have the same parameters: {name} is in one of them."
                )
            with torch.no_grad():
                for name, parameter in wanted.items():
                    parameter.copy_(weights[name])
        return model

    def _policy(self, work: Work) -> Output:
        """Tune the model to one reward, or to Σ λᵢ Rᵢ."""
        shares, seed = shares_of(work), int(work.parameters["seed"])
        if threads := self.settings["trainer"].get("threads"):
            torch.set_num_threads(int(threads))
        rewards = self._built_rewards()
        given = [reward for reward, share in zip(rewards, shares, strict=True) if share == 1] or rewards
        # A temporary folder of its own: nothing that a trainer writes outlives the fit.
        with tempfile.TemporaryDirectory(prefix="soups-trl-") as folder, warnings.catch_warnings():
            # TRL calls what transformers will rename; that is not for our users to act on.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            weights, history = self._tune(work, folder, seed, given, shares)
        last = next((row for row in reversed(history) if "reward" in row), {})
        return Output(weights, {"train": {"reward": last["reward"]}} if last else {}, {"history": history})

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
            "use_cpu": device_for(self.settings).type == "cpu",
        }
        if len(rewards) > 1:
            values["reward_weights"] = list(shares)
        more = {**self.options, **({"peft_config": build(self.adapter, "protocol.adapter")} if self.adapter else {})}
        progress = StepFile(work.pool, work.node.fingerprint)
        try:
            config: Any = self.config(**values)
            longest = room(
                load_config(self.model, **self._hub()), int(getattr(config, "max_completion_length", 0) or 0)
            )
            tokenise_prompts(tokenizer, self.prompts["train"], longest)  # a short word before the trainer's long one
            trainer: Any = from_hub(
                self.model,
                lambda: self.trainer(
                    model=self.model,
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
        if self.adapter:
            model = model.merge_and_unload()
        history = [
            {key: float(value) for key, value in row.items() if isinstance(value, int | float) and math.isfinite(value)}
            for row in trainer.state.log_history
        ]
        weights = {name: parameter.detach().cpu().clone().contiguous() for name, parameter in model.named_parameters()}
        return weights, history

    def _scores(self, work: Work) -> Output:
        """Give every test prompt the rewards of its completions, float32 (rewards, prompts, samples)."""
        if threads := self.settings["trainer"].get("threads"):
            torch.set_num_threads(int(threads))
        model = self._network(work.tensors(0) if work.node.inputs else None).to(device_for(self.settings))
        seed = int(work.parameters["seed"])
        rows = self.prompts["test"]
        written = complete(model, self._tokenizer(), rows, seed=seed, **self.generation)
        found = torch.tensor([reward(**written.arguments()) for reward in self._built_rewards()])
        means = {name: float(mean) for name, mean in zip(self.rewards, found.double().mean(dim=1), strict=True)}
        few = zip(written.rows[:3], written.texts[:3], strict=True)
        examples = [{"prompt": row["prompt"], "completion": text} for row, text in few]
        return Output(
            {"rewards": found.view(len(self.rewards), len(rows), -1)}, {"test": means}, {"examples": examples}
        )

    def page(self, plan: Plan, pool: Pool) -> Page:
        """Return the report."""
        del plan
        found = self.layout()

        def values(node: Node) -> tuple[float, ...]:
            metrics = pool.ingredient(node.fingerprint).metrics["test"]
            return tuple(metrics[name] for name in self.rewards)

        front = Front(
            rewards=list(self.rewards),
            unit="",
            start=values(self.start()),
            ends=[values(node) for node in found.ends],
            soups={shares: values(node) for shares, node in found.soups.items()},
            references={shares: values(node) for shares, node in found.references.items()},
        )
        prompts, samples = len(self.prompts["test"]), int(self.generation["samples"])
        scored = [self.start(), *found.ends, *found.soups.values(), *found.references.values()]
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
        del plan
        found = self.layout()
        for shares in self.export_shares:
            place = folder / f"policy_{label(shares).removeprefix('λ = ').replace(', ', '_')}"
            if place.is_dir():
                continue
            model: Any = self._network(pool.weights(found.soups[shares].inputs[0].fingerprint))
            with replacing_folder(place) as scratch:
                model.save_pretrained(scratch)
                self._tokenizer().save_pretrained(scratch)


def require_trl() -> None:
    """Check that TRL can be imported.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("trl") is None:
        raise ConfigError("protocol=rewarded_soups_trl needs TRL, which is not installed: pip install 'soups[trl]'")


def trainer_classes(trainer: Mapping[str, Any], args: Mapping[str, Any]) -> tuple[type[Any], type[Any]]:
    """Return the classes of a trainer and of its configuration, GRPOConfig for GRPOTrainer.

    Raises:
        ConfigError: there are no such classes, or the trainer does not tune to rewards.
    """
    target = str(trainer.get("_target_", ""))
    found = _imported(target, "protocol.trainer._target_")
    taken = inspect.signature(found).parameters if inspect.isclass(found) else {}
    if missing := [name for name in NEEDED if name not in taken]:
        raise ConfigError(
            f"protocol.trainer._target_={target} takes no {missing[0]}, so it does not tune a model to rewards. "
            f"trl.GRPOTrainer and trl.RLOOTrainer do."
        )
    if unknown := sorted(set(trainer) - set(taken) - {"_target_"}):
        raise ConfigError(
            f"protocol.trainer.{unknown[0]} is no argument of {target}: {did_you_mean(unknown[0], taken)}"
        )
    if clash := sorted(set(trainer) & {*NEEDED, "peft_config"}):
        raise ConfigError(f"protocol.trainer.{clash[0]} is set by the protocol: use its other settings.")
    name = str(args.get("_target_", target.removesuffix("Trainer") + "Config"))
    config = _imported(name, "protocol.args._target_")
    if not dataclasses.is_dataclass(config) or not isinstance(config, type):
        raise ConfigError(
            f"protocol.args._target_={name} must be a configuration class of TRL, such as trl.GRPOConfig."
        )
    return found, config


def _imported(target: str, where: str) -> Any:
    module, _, attribute = target.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}={target!r} cannot be imported: {error}.") from error


def find(section: Mapping[str, Any], where: str) -> Callable[[], Callable[..., Any]]:
    """Return what makes a reward: a function with the section's arguments bound, or an object of a class built from them.

    Raises:
        ConfigError: it cannot be imported, or takes no such argument.
    """
    target = _imported(str(section.get("_target_", "")), f"{where}._target_")
    values = {key: value for key, value in section.items() if key != "_target_"}
    if inspect.isclass(target):
        return lambda: build(dict(section), where)
    return lambda: functools.partial(target, **values) if values else target


def read_prompts(source: Any, part: str) -> list[Row]:
    """Return the prompts of a part from a file's name or a `_target_`.

    Raises:
        ConfigError: neither is given.
        soups.errors.DataError: the prompts cannot be had.
    """
    where = f"protocol.prompts.{part}"
    if isinstance(source, str):
        return prompt_file(source)
    if not isinstance(source, Mapping) or "_target_" not in source:
        raise ConfigError(f"{where}={source!r} must be a file of prompts, or a section with _target_.")
    found: Any = build({str(key): value for key, value in source.items()}, where)
    return check_rows(list(found), where)


def reporter(progress: StepFile) -> Any:
    """Return a callback of transformers that keeps a file of progress."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            progress.write(int(state.global_step), int(state.max_steps))

    return Reporter()
