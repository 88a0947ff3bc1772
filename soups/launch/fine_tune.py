"""One fine-tune: from the shared start to a finished ingredient in the pool."""

from __future__ import annotations

import time
from typing import Any, cast

from torch import Tensor

from soups.errors import SoupError
from soups.evaluation import predict, score
from soups.fitting.spec import fingerprint
from soups.launch.progress import History, ReportProgress
from soups.launch.quiet import quiet
from soups.launch.settings import (
    Settings,
    build_splits,
    check,
    device_count,
    fit_of,
    launched_outside,
    open_pool,
    processes,
    versions,
)
from soups.launch.start import ensure_start, evaluation_batches
from soups.launch.tracking import close_logger, ingredient_logger
from soups.launch.training import layout, train
from soups.stores.pool import Failure, Ingredient
from soups.tasks.data import Splits
from soups.worker import Message, run_in_processes


class FitMessage(Message):
    """A fit of an ingredient, for the processes that train it."""

    settings: Settings
    show_progress: bool


def fine_tune(settings: Settings, show_progress: bool = True) -> Ingredient:
    """Return the ingredient of these settings: from the pool if it is there, else fine-tuned now.

    With several devices the fit runs in processes of its own, started from one small program that knows only this
    ingredient, so that Lightning's child processes repeat the fit and not the sweep around it.

    Args:
        settings: the resolved configuration.
        show_progress: draw a progress bar for this fit; a sweep draws one for all.

    Raises:
        SoupError: a mistake in the settings, unreadable data, a pool that cannot be written, a fit that diverged.
    """
    check(settings)
    pool = open_pool(settings)
    splits = build_splits(settings)
    start, start_weights = ensure_start(settings, splits)
    spec = fit_of(settings).on(split=splits.hash(), base_model=start.weights)
    name, determined = fingerprint(spec), spec.determinants()
    if name in pool:
        return pool.ingredient(name)
    pool.check_writable()
    try:
        if device_count(settings) > 1 and not launched_outside():
            message = FitMessage(settings=settings, show_progress=show_progress)
            run_in_processes(fit_in_ranks, message, reuse=processes(settings))
        else:
            fit(settings, splits, start, start_weights, show_progress)
    except SoupError as error:
        pool.fail(Failure(fingerprint=name, error=str(error), determinants=determined))
        raise
    except Exception as error:
        pool.fail(Failure(fingerprint=name, error=f"{type(error).__name__}: {error}", determinants=determined))
        raise
    return pool.ingredient(name)


def fit_in_ranks(message: FitMessage) -> None:
    """Fine-tune in this process, one of the ranks."""
    quiet()
    splits = build_splits(message.settings)
    fit(message.settings, splits, *ensure_start(message.settings, splits), show_progress=message.show_progress)


def fit(
    settings: Settings,
    splits: Splits,
    start: Ingredient,
    start_weights: dict[str, Tensor],
    show_progress: bool = True,
) -> None:
    """Fine-tune in this process (one of the ranks) and let rank 0 add the result to the pool."""
    began = time.perf_counter()
    pool = open_pool(settings)
    spec = fit_of(settings).on(split=splits.hash(), base_model=start.weights)
    name, determined = fingerprint(spec), spec.determinants()
    logger = ingredient_logger(settings, name, determined)
    history = History()
    watching = [ReportProgress(pool, name), history]
    network, trainer = train(settings, splits, start_weights, watching, logger, show_progress)
    fitted = time.perf_counter()
    device = trainer.strategy.root_device
    heldout = evaluation_batches(settings, splits.heldout, network)
    logits = predict(network.module.to(device), heldout, device)
    numbers = score(logits, splits.heldout.labels)
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in network.module.state_dict().items()}
    if trainer.is_global_zero:
        record = Ingredient(
            fingerprint=name,
            determinants=determined,
            config=settings,
            start=start.weights,
            split=splits.hash(),
            metrics={"heldout": {"accuracy": numbers.accuracy, "loss": numbers.loss, "count": numbers.count}},
            durations={"fit": fitted - began, "total": time.perf_counter() - began},
            versions=versions(),
            layout=layout(trainer),
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
