"""Overrides that a command would ignore: each is an error that names the override and the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from soups.errors import ConfigError
from soups.fitting.configuration import Configuration, Devices
from soups.fitting.schema import Section
from soups.launch.hydra_errors import keys_of
from soups.soup_making.options import SoupOptions
from soups.tasks.data import Splits

# A rule: whether a key is meant, and why the key would do nothing; None when the rule does not apply.
Rule = tuple[Callable[[str], bool], str]


def refuse_ignored(overrides: Sequence[str], configuration: Configuration, splits: Callable[[], Splits]) -> None:
    """Check that every override of the main job reaches something.

    Args:
        overrides: of the command line, without Hydra's own.
        configuration: composed with them.
        splits: builds the data, which is asked for when an override concerns their augmentation.

    Raises:
        ConfigError: the first override that would be ignored, and why.
    """
    keys = keys_of(overrides)
    refuse(keys, _rules(configuration))
    augmented = under("augment", "start.augment")
    if any(augmented(key) for key in keys) and not splits().train.augmented:
        refuse(keys, [(augmented, "the data are texts, which are not augmented.")])


def refuse(keys: Iterable[str], rules: Sequence[Rule]) -> None:
    """Check keys against rules.

    Raises:
        ConfigError: the first key that a rule is about.
    """
    for key in keys:
        for concerns, reason in rules:
            if concerns(key):
                raise ConfigError(f"{key} would be ignored: {reason}")


def under(*sections: str) -> Callable[[str], bool]:
    """Return a test for keys that name one of these sections or settings, or something inside it.

    >>> test = under("start.augment", "sweep")
    >>> test("sweep.size"), test("sweep"), test("start.augment.flip"), test("start"), test("sweeper.x")
    (True, True, True, False, False)
    """
    return lambda key: any(key == section or key.startswith(f"{section}.") for section in sections)


def reads_only(*sections: str) -> Callable[[str], bool]:
    """Return a test for keys that are none of these sections or settings, nor inside one, nor a section around one."""
    inside = under(*sections)
    return lambda key: not inside(key) and not any(section.startswith(f"{key}.") for section in sections)


# What scoring checkpoints made elsewhere reads.
_OF_CHECKPOINTS = (
    "model", "data", "loader", "task.channels_last", "tracking", "pool", "paths", "soup", "experiment", "hydra",
    *(f"trainer.{name}" for name in Devices.model_fields),
)  # fmt: skip


def _rules(configuration: Configuration) -> list[Rule]:
    rules: list[Rule] = []
    soup, sweep, start = configuration.soup, configuration.sweep, configuration.start
    if configuration.pool.format == "checkpoints":
        why = "pool=folder fine-tunes nothing, it only averages and scores the checkpoints that are there."
        rules += [(reads_only(*_OF_CHECKPOINTS), why), (under("model.pretrained"), why)]
    if soup is None:
        rules.append(
            (under("sweep"), "this is one fine-tune. A sweep that ends in a soup is asked for by +soup=greedy.")
        )
    else:
        rules += SoupOptions.read(soup).ignored()
        if sweep and sweep.method == "grid":
            rules.append(
                (under("sweep.seed"), "sweep.method=grid draws nothing; sweep.method=random does, with this seed.")
            )
            if sweep.size:
                rules.append(
                    (under("sweep.size"), "sweep.method=grid takes every combination, however many there are.")
                )
    if not start.epochs:
        rules.append(
            (under("start.optimizer", "start.augment"), "start.epochs=0, so there are no shared epochs to train.")
        )
    if configuration.tracking.mode == "off":
        rules.append(
            (
                under("tracking.project", "tracking.entity", "tracking.group"),
                "tracking.mode=off, so nothing is tracked.",
            )
        )
    return rules


def refuse_swept_layout(keys: Iterable[str], configuration: Configuration) -> None:
    """Check that every key of a search space decides the weights of an ingredient.

    Raises:
        ConfigError: naming one that only says where or how a fit runs, or what becomes of it.
    """
    for key in keys:
        if not decides_fit(key, configuration):
            raise ConfigError(
                f"{key} is swept, but it decides no weights: all its values would give one ingredient. Take it out of the "
                f"search space, or set it for the whole command: {key}=…"
            )


def decides_fit(key: str, configuration: Configuration) -> bool:
    """Tell whether a setting, or a whole group, is part of what decides a fit's weights."""
    fit = configuration.fit
    section, _, leaf = key.partition(".")
    parts: dict[str, tuple[Section | None, ...]] = {
        "trainer": (fit.trainer, fit.validation),
        "loader": (fit.loader,),
    }
    if section in parts and leaf:
        return any(leaf.partition(".")[0] in type(part).model_fields for part in parts[section] if part is not None)
    return section in ("model", "data", "optimizer", "trainer", "callbacks", "seed", "task", "ingredient", "start",
                       "loader", "augment", "experiment")  # fmt: skip
