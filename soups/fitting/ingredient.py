"""One fine-tune: from the base model to a finished ingredient in the pool."""

from __future__ import annotations

import time
from typing import Any, cast

import lightning.pytorch as lightning
from torch import Tensor

from soups.errors import SoupError
from soups.evaluation import predict, score
from soups.fitting.configuration import Configuration
from soups.fitting.environment import kind_of_processes, needs_processes, versions
from soups.fitting.progress import History, ReportProgress
from soups.fitting.quiet import quiet
from soups.fitting.run import Run, run_of
from soups.fitting.spec import RAW, FitSpec, fingerprint
from soups.fitting.task import evaluation_batches
from soups.fitting.tracking import close_logger, fit_logger
from soups.fitting.training import ran_on, train
from soups.stores.pool import Failure, Ingredient
from soups.tasks.classification import Classification
from soups.worker import Message, run_in_processes


class FitMessage(Message):
    """A fit of an ingredient, for the processes that train it."""

    configuration: Configuration
    show_progress: bool


def fine_tune(run: Run, show_progress: bool = True) -> Ingredient:
    """Return the ingredient of a run's settings: from the pool if it is there, else fine-tuned now.

    With several devices the fit runs in processes of its own, started from one small program that knows only this
    ingredient, so that Lightning's child processes repeat the fit and not the sweep around it.

    Args:
        run: the settings, with their data and base model.
        show_progress: draw a progress bar for this fit; a sweep draws one for all.

    Raises:
        SoupError: unreadable data, a pool that cannot be written, a fit that diverged.
    """
    pool, name = run.pool, fingerprint(run.spec)
    if name in pool:
        return pool.ingredient(name)
    pool.check_writable()
    try:
        if needs_processes(run.layout.devices):
            message = FitMessage(configuration=run.configuration, show_progress=show_progress)
            run_in_processes(fit_in_ranks, message, reuse=kind_of_processes(run.layout.devices))
        else:
            fit(run, show_progress)
    except Exception as error:
        why = str(error) if isinstance(error, SoupError) else f"{type(error).__name__}: {error}"
        pool.fail(Failure(fingerprint=name, error=why, determinants=run.spec.determinants()))
        raise
    return pool.ingredient(name)


def fit_in_ranks(message: FitMessage) -> None:
    """Fine-tune in this process, one of the ranks."""
    quiet()
    fit(run_of(message.configuration), message.show_progress)


def fit(run: Run, show_progress: bool = True) -> None:
    """Fine-tune in this process (one of the ranks) and let rank 0 add the result to the pool."""
    began = time.perf_counter()
    spec, layout, pool, splits = run.spec, run.layout, run.pool, run.splits
    name, settings = fingerprint(spec), run.configuration.plain()
    logger = fit_logger(layout, name, {**settings, "determinants": spec.determinants()})
    history = History()
    watching = [ReportProgress(pool, name), history]
    network, trainer = train(spec, layout, run.base_model.weights, splits, watching, logger, show_progress)
    fitted = time.perf_counter()
    logits = _validated(spec, trainer, len(splits.heldout))
    if logits is None:
        device = trainer.strategy.root_device
        heldout = evaluation_batches(splits.heldout, network, spec.loader.size, layout.loader)
        logits = predict(network.module.to(device), heldout, device)
    numbers = score(logits, splits.heldout.labels)
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in network.module.state_dict().items()}
    if trainer.is_global_zero:
        record = Ingredient(
            fingerprint=name,
            determinants=spec.determinants(),
            config=settings,
            start=spec.base_model,
            split=run.split,
            metrics={"heldout": {"accuracy": numbers.accuracy, "loss": numbers.loss, "count": numbers.count}},
            durations={"fit": fitted - began, "total": time.perf_counter() - began},
            versions=versions(),
            layout=ran_on(trainer),
            notes={"train_loss": float(cast(Any, trainer.callback_metrics.get("train/loss", float("nan"))))},
            history=history.values,
        )
        added: Ingredient | None = None
        try:
            added = pool.add(record, weights)
            pool.add_predictions(added.weights, splits.heldout.digest(), logits)
        finally:
            close_logger(logger, added)
    trainer.strategy.barrier("ingredient")


def _validated(spec: FitSpec, trainer: lightning.Trainer, count: int) -> Tensor | None:
    """Return held-out logits that the fit's last validation made of the finished weights, or None.

    With callbacks, what was validated can be an average; in lower precision, it is not what `predict` computes.
    """
    module = trainer.lightning_module
    if (
        spec.callbacks
        or spec.keep != RAW
        or spec.trainer.precision != "32-true"
        or not isinstance(module, Classification)
    ):
        return None
    return module.validated_logits(count)
