"""`+protocol=btm`: Branch-Train-Merge with small character models on real domains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import lightning.pytorch as lightning
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from soups.fitting.configuration import Devices
from soups.fitting.schema import Count, Section
from soups.protocols.branch_train_merge.mixture import domain_posterior, mixture_loss
from soups.protocols.branch_train_merge.page import branch_page, losses_by_way
from soups.protocols.branch_train_merge.plan import (
    BranchNodes,
    BranchSettings,
    CharacterModel,
    DomainText,
    PosteriorParameters,
    ScoreParameters,
    TrainParameters,
    branch_nodes,
)
from soups.protocols.execution import Notes, Operation, Output, Work
from soups.protocols.fits import node_run, report_progress
from soups.protocols.plan import Node, Plan
from soups.protocols.runner import ProtocolConfiguration, ProtocolRunner
from soups.reporting.page import Page
from soups.seeding import generator
from soups.stores.pool import Pool
from soups.tasks.language_modelling import (
    Corpus,
    LanguageModelling,
    Transformer,
    corpus,
    random_windows,
    spread_windows,
    token_losses,
)
from soups.weights import RunningSum


class SmallTrainer(Section):
    """The settings of Lightning's Trainer that these fits read; each runs on one device."""

    accelerator: str = "auto"
    threads: Count | None = None
    precision: str = "32-true"


class BranchConfiguration(ProtocolConfiguration):
    """All settings of the protocol."""

    trainer: SmallTrainer
    protocol: BranchSettings

    @property
    def devices(self) -> Devices:
        """Where fits run."""
        return Devices(accelerator=self.trainer.accelerator, threads=self.trainer.threads)


class EnsembleNotes(Notes):
    """The experts' weights, in the order of the domains."""

    weights: list[float]


class BranchTrainMerge(ProtocolRunner[BranchConfiguration]):
    """The protocol of `conf/protocol/btm.yaml`.

    Raises:
        ConfigError: a setting that does not make sense.
    """

    name = "btm"
    Configuration = BranchConfiguration

    def __init__(self, configuration: BranchConfiguration) -> None:
        super().__init__(configuration)
        self.nodes: BranchNodes = branch_nodes(
            configuration.protocol, configuration.seed, configuration.trainer.precision
        )

    def plan(self) -> Plan:
        """Return the plan."""
        return self.nodes.plan()

    def operations(self) -> Mapping[str, Operation]:
        """Return the operations that the plan names."""
        return {
            "lm.train": self._train,
            "lm.posterior": _posterior,
            "lm.mean": _mean,
            "lm.score": _score,
            "lm.ensemble": _ensemble,
        }

    def losses(self, pool: Pool) -> dict[str, dict[str, float]]:
        """Return the test loss in nats a character by way and domain."""
        return losses_by_way(self.nodes, self.configuration.protocol.domains, pool)

    def page(self, plan: Plan, pool: Pool) -> Page:
        """Return the report."""
        return branch_page(self.nodes, self.configuration.protocol.domains, plan, pool)

    def _train(self, work: Work) -> Output:
        parameters = work.read(TrainParameters)
        options = parameters.optimizer
        model = _model(parameters.model, parameters.initial_seed)
        if work.node.inputs:
            model.load_state_dict(work.tensors("start"))
        texts = [_text(parameters.text, name).train for name in parameters.domains]
        # Equally many windows of each domain; the loader's order mixes them.
        count = parameters.steps * options.batch
        shares = [count // len(texts) + (number < count % len(texts)) for number in range(len(texts))]
        parts = [
            random_windows(text, share, model.context, parameters.seed, "windows", name)
            for text, share, name in zip(texts, shares, parameters.domains, strict=True)
        ]
        order = generator(parameters.seed, "order")
        loader = DataLoader(ConcatDataset(parts), batch_size=options.batch, shuffle=True, generator=order)
        own = self.configuration.trainer
        if own.threads:
            torch.set_num_threads(own.threads)
        with node_run(self.configuration, work) as logger:
            trainer = lightning.Trainer(
                max_epochs=1, accelerator=own.accelerator, devices=1, precision=parameters.precision,  # pyright: ignore[reportArgumentType]
                gradient_clip_val=options.clip, callbacks=[report_progress(work)], logger=logger or False,
                log_every_n_steps=10, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            settings = {key: value for key, value in options.shallow().items() if key not in ("batch", "clip")}
            trainer.fit(LanguageModelling(model, settings), loader)
        if trainer.interrupted:
            raise KeyboardInterrupt
        return Output({name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()})


def _posterior(work: Work) -> Output:
    parameters = work.read(PosteriorParameters)
    development = _text(parameters.text, parameters.domain).heldout
    models = _loaded(work, work.node.inputs_of("experts"), parameters.model)
    found = torch.stack([_log_likelihoods(model, development, parameters.samples).sum(1) for model in models])
    return Output({"weights": domain_posterior(found, parameters.decay)})


def _score(work: Work) -> Output:
    parameters = work.read(ScoreParameters)
    (model,) = _loaded(work, work.node.inputs_of("model"), parameters.model)
    windows = parameters.text.windows
    return Output(
        metrics={
            domain: _metrics(-float(_log_likelihoods(model, _text(parameters.text, domain).test, windows).mean()))
            for domain in parameters.domains
        }
    )


def _ensemble(work: Work) -> Output:
    parameters = work.read(ScoreParameters)
    weights = work.tensors("posterior")["weights"]
    models = _loaded(work, work.node.inputs_of("experts"), parameters.model)
    metrics: dict[str, dict[str, float]] = {}
    for domain in parameters.domains:
        test = _text(parameters.text, domain).test
        found = torch.stack([_log_likelihoods(model, test, parameters.text.windows) for model in models])
        metrics[domain] = _metrics(mixture_loss(found, weights))
    return Output(metrics=metrics, notes=EnsembleNotes(weights=weights.tolist()))


def _mean(work: Work) -> Output:
    """Average experts: by the posterior where there is one, else uniformly."""
    experts = work.node.inputs_of("experts")
    weighted = bool(work.node.inputs_of("posterior"))
    weights: list[float] = work.tensors("posterior")["weights"].tolist() if weighted else [1.0] * len(experts)
    total = RunningSum()
    for node, weight in zip(experts, weights, strict=True):
        total.add(work.pool.weights(node.fingerprint), where=node.label, factor=weight)
    return Output(total.mean())


def _metrics(loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": math.exp(loss)}


def _text(text: DomainText, domain: str) -> Corpus:
    return corpus(domain, text.characters)


@torch.inference_mode()
def _log_likelihoods(model: Transformer, text: Tensor, count: int) -> Tensor:
    """Return the log-probability, float64 (count, context), in nats of each character in windows spread over a text."""
    windows = spread_windows(text, count, model.context)
    batches = torch.stack([windows[number] for number in range(count)]).split(64)
    return -torch.cat([token_losses(model.eval(), batch).double() for batch in batches])


def _model(sizes: CharacterModel, seed: int = 0) -> Transformer:
    return Transformer(**sizes.shallow(), seed=seed)


def _loaded(work: Work, nodes: Sequence[Node], sizes: CharacterModel) -> list[Transformer]:
    models = [_model(sizes) for _ in nodes]
    for model, node in zip(models, nodes, strict=True):
        model.load_state_dict(work.pool.weights(node.fingerprint))
    return models
