"""`+protocol=btm`: Branch-Train-Merge with small character models on real domains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from soups.launch.progress import ReportProgress
from soups.launch.settings import Settings
from soups.launch.tracking import node_run
from soups.protocols import Node, Operation, Output, Plan, Work
from soups.protocols.branch_train_merge import Branching, Family, Layout, domain_posterior, layout, mixture_loss
from soups.reporting.page import Curves, Page, Table
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


class BranchTrainMerge:
    """The protocol of `conf/protocol/btm.yaml`; the arguments are `Branching`'s.

    Raises:
        ConfigError: a setting that does not make sense.
    """

    name = "btm"

    def __init__(
        self,
        settings: Settings,
        domains: Sequence[str],
        text: Mapping[str, Any],
        model: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        steps: int,
        seed_shares: Sequence[float],
        samples: int = 100,
        decay: float = 0.3,
        seed: int = 0,
    ) -> None:
        self.settings = settings
        self.study = Branching(domains, text, model, optimizer, steps, seed_shares, samples, decay, seed)
        self.study.check()

    def layout(self) -> Layout:
        """Return the plan's nodes by what they mean."""
        return layout(self.study)

    def plan(self) -> Plan:
        """Return the plan."""
        return self.layout().plan()

    def operations(self) -> Mapping[str, Operation]:
        """Return what the plan asks for."""
        return {
            "lm.train": self._train,
            "lm.posterior": self._posterior,
            "lm.mean": _mean,
            "lm.score": self._score,
            "lm.ensemble": self._ensemble,
        }

    def _train(self, work: Work) -> Output:
        parameters = work.parameters
        options = dict(parameters["optimizer"])
        batch, clip = int(options.pop("batch")), options.pop("clip")
        model = _model(parameters, parameters["initial_seed"])
        if work.node.inputs:
            model.load_state_dict(work.tensors(0))
        texts = [_text(parameters, name).train for name in parameters["domains"]]
        # Equally many windows of each domain; the loader's order mixes them.
        count = parameters["steps"] * batch
        shares = [count // len(texts) + (number < count % len(texts)) for number in range(len(texts))]
        parts = [
            random_windows(text, share, model.context, parameters["seed"], "windows", name)
            for text, share, name in zip(texts, shares, parameters["domains"], strict=True)
        ]
        order = generator(parameters["seed"], "order")
        loader = DataLoader(ConcatDataset(parts), batch_size=batch, shuffle=True, generator=order)
        settings = self.settings["trainer"]
        if settings.get("threads"):
            torch.set_num_threads(int(settings["threads"]))
        with node_run(self.settings, work) as logger:
            trainer = lightning.Trainer(
                max_epochs=1, accelerator=settings["accelerator"], devices=1, precision=settings["precision"],
                gradient_clip_val=clip, callbacks=[ReportProgress(work.pool, work.node.fingerprint)],
                logger=logger or False, log_every_n_steps=10, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(LanguageModelling(model, options), loader)
        if trainer.interrupted:
            raise KeyboardInterrupt
        return Output({name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()})

    def _posterior(self, work: Work) -> Output:
        parameters = work.parameters
        dev = _text(parameters, parameters["domain"]).heldout
        models = [_loaded(work, number) for number in range(len(work.node.inputs))]
        found = torch.stack([_log_likelihoods(model, dev, parameters["samples"]).sum(1) for model in models])
        return Output({"weights": domain_posterior(found, parameters["decay"])})

    def _score(self, work: Work) -> Output:
        model, windows = _loaded(work, 0), work.parameters["text"]["windows"]
        return Output(
            metrics={
                domain: _metrics(-float(_log_likelihoods(model, _text(work.parameters, domain).test, windows).mean()))
                for domain in work.parameters["domains"]
            }
        )

    def _ensemble(self, work: Work) -> Output:
        weights, domain = work.tensors(0)["weights"], work.parameters["domain"]
        models = [_loaded(work, number) for number in range(1, len(work.node.inputs))]
        test, windows = _text(work.parameters, domain).test, work.parameters["text"]["windows"]
        loss = mixture_loss(torch.stack([_log_likelihoods(model, test, windows) for model in models]), weights)
        return Output(metrics={domain: _metrics(loss)}, notes={"weights": weights.tolist()})

    def losses(self, pool: Pool) -> dict[str, dict[str, float]]:
        """Return the test loss in nats a character by way and domain."""
        nodes, domains = self.layout(), list(self.study.domains)

        def of(node: Node, domain: str) -> float:
            return pool.ingredient(node.fingerprint).metrics[domain]["loss"]

        def family(one: Family) -> dict[str, dict[str, float]]:
            label = f"{one.share:.0%} seed"
            return {
                f"{label}: own expert": {domain: of(one.expert[domain], domain) for domain in domains},
                f"{label}: ensemble by posterior": {domain: of(one.ensemble[domain], domain) for domain in domains},
                f"{label}: average by posterior": {
                    domain: of(one.posterior_average[domain], domain) for domain in domains
                },
                f"{label}: uniform average": {domain: of(one.uniform, domain) for domain in domains},
            }

        rows = {"dense": {domain: of(nodes.dense, domain) for domain in domains}}
        for one in nodes.families:
            rows |= family(one)
        return rows

    def page(self, plan: Plan, pool: Pool) -> Page:
        """Return the report: perplexities of every way to use the experts."""
        domains, losses = list(self.study.domains), self.losses(pool)
        means = {name: math.exp(sum(row.values()) / len(row)) for name, row in losses.items()}
        shares = sorted(self.study.seed_shares)
        ways = ("own expert", "ensemble by posterior", "average by posterior", "uniform average")
        series: dict[str, list[float | None]] = {
            way: [means[f"{share:.0%} seed: {way}"] for share in shares] for way in ways
        }
        series["dense"] = [means["dense"]] * len(shares)
        best = min(means, key=lambda name: means[name])
        return Page(
            title="Branch-Train-Merge",
            subject="protocol",
            summary=f"Lowest mean test perplexity: {best} ({means[best]:.2f} a character); dense {means['dense']:.2f} (one seed).",
            parts=[
                Table(
                    title="Branch-Train-Merge: test perplexity a character",
                    columns=["model", *domains, "mean"],
                    rows=[[name, *(math.exp(row[domain]) for domain in domains), means[name]] for name, row in losses.items()],
                    highlight=[list(losses).index(best)],
                    note="Mean: of the losses, then exponentiated. All rows have the same number of training steps in all.",
                ),
                Curves(
                    title="Perplexity against the seed phase", x_label="share of the budget in the seed phase, %",
                    y_label="mean test perplexity", x=[100 * share for share in shares], series=series,
                ),
            ],
            lineage={node.label: pool.ingredient(node.fingerprint).weights for node in plan.nodes.values() if node.kind == "train"},
        )  # fmt: skip


def _metrics(loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": math.exp(loss)}


def _text(parameters: Mapping[str, Any], domain: str) -> Corpus:
    return corpus(domain, parameters["text"]["characters"])


@torch.inference_mode()
def _log_likelihoods(model: Transformer, text: Tensor, count: int) -> Tensor:
    """Return the log-probability, float64 (count, context), in nats of each character in windows spread over a text."""
    windows = spread_windows(text, count, model.context)
    batches = torch.stack([windows[number] for number in range(count)]).split(64)
    return -torch.cat([token_losses(model.eval(), batch).double() for batch in batches])


def _model(parameters: Mapping[str, Any], seed: int = 0) -> Transformer:
    return Transformer(**parameters["model"], seed=seed)


def _loaded(work: Work, number: int) -> Transformer:
    model = _model(work.parameters)
    model.load_state_dict(work.tensors(number))
    return model


def _mean(work: Work) -> Output:
    """Average experts: uniformly, or by the posterior that is the first input; in float64."""
    first = int(work.parameters["weighted"])
    models = [work.tensors(number) for number in range(first, len(work.node.inputs))]
    weights = work.tensors(0)["weights"] if first else torch.full((len(models),), 1 / len(models), dtype=torch.float64)
    return Output(
        {
            name: sum(
                (w * m[name].double() for w, m in zip(weights, models, strict=True)), torch.zeros_like(tensor).double()
            ).to(tensor.dtype)
            for name, tensor in models[0].items()
        }
    )
