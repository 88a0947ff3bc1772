"""Overrides that are misspelt or would do nothing: refused in one sentence, before anything is computed."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from soups.errors import ConfigError
from soups.fitting.run import run_of
from soups.launch.hydra_errors import check_hydra, nearest_names
from soups.launch.ignored import decides_fit, refuse_ignored
from soups.launch.settings import UserError, configuration_of
from soups.launch.sweep import plan, run_sweep
from soups.soup_making.soup import options_of_run
from tests.launch.conftest import ROOT

FOLDER = ["pool=folder", "pool.path=x", "+soup=greedy", "tracking=off"]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"), nearest_names():
        return compose("train", list(overrides), return_hydra_config=True)


def no_data() -> Any:
    raise AssertionError("the data were built")


def checked(*overrides: str) -> None:
    """What a command does with its overrides before it computes anything."""
    config = composed(*overrides)
    check_hydra(config.hydra)
    configuration = configuration_of(config)
    if configuration.soup is not None:
        options_of_run(run_of(configuration))
    refuse_ignored([text for text in overrides if not text.lstrip("+").startswith("hydra")], configuration, no_data)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # Misspelt, with and without +.
        ("task.label_smooting=0.1", "task.label_smooting is no setting: did you mean 'label_smoothing'"),
        ("taks.label_smoothing=0.1", "taks is no setting: did you mean 'task'"),
        ("start.optimizer.lrr=1", "start.optimizer.lrr is no setting: did you mean 'lr'"),
        ("seed.x=1", "there is no seed.x"),
        ("+soup=greedy soup.tie=paper", "soup.tie is no setting: did you mean 'ties'"),
        ("+soup=greedy +soup.tie=paper", "soup.tie is no option of the recipe greedy: did you mean 'ties'"),
        ("+soup=uniform +soup.racing=0", "soup.racing is no option of the recipe uniform"),
        ("+soup=greedy +soup.start=x", "soup.start is no option of the recipe greedy"),
        ("+soup=greedy soup.metric=acuracy", "soup.metric=acuracy must be accuracy or loss"),
        ("+soup=learned soup.per=layer", "soup.per=layer: Allowed: 'model', 'tensor'"),
        ("+soup=top_k soup.k=many", "soup.k=many: Input should be a valid integer"),
        ("+soup=ties soup.method=tiess", "soup.method=tiess: did you mean 'ties'"),
        ("+soup=ties +soup.parameters.densty=[0.2,0.3]", "densty"),
        ("+soup=greedy +sweep.sise=3", "sweep.sise is no setting: did you mean 'size'"),
        ("+hydra.foo=1", "hydra.foo is no setting"),
        ("+hydra.run.dri=x", "hydra.run.dri is no setting: did you mean 'dir'"),
        ("hydra.run.dri=x", "hydra.run.dri is no setting: did you mean 'dir'"),
        ("hydra/launcher=ray_local +hydra.launcher.job=2", "hydra.launcher.job is no setting of hydra_plugins.soups"),
        # Known, and without effect.
        ("sweep.size=3", "sweep.size would be ignored: this is one fine-tune"),
        ("sweep.space.optimizer.lr=1", "sweep.space.optimizer.lr would be ignored: this is one fine-tune"),
        ("start.epochs=0 start.optimizer.lr=1e-3", "start.optimizer.lr would be ignored: start.epochs=0"),
        ("tracking=off tracking.project=mine", "tracking.project would be ignored: tracking.mode=off"),
        ("+soup=greedy sweep.method=grid sweep.size=4", "sweep.size would be ignored: sweep.method=grid"),
        ("+soup=greedy sweep.method=grid sweep.seed=4", "sweep.seed would be ignored: sweep.method=grid"),
        ("+soup=greedy soup.grid=5", "soup.grid would be ignored: soup.landscape=false"),
        ("+soup=greedy soup.batchnorm_batches=5", "soup.batchnorm_batches would be ignored: soup.batchnorm=average"),
        *(
            (" ".join([*FOLDER, one]), f"{one.partition('=')[0]} would be ignored: pool=folder fine-tunes nothing")
            for one in (
                "optimizer.lr=1e-3", "optimizer=sgd", "seed=3", "callbacks=[ema]", "ingredient.weights=ema",
                "start.epochs=2", "augment.flip=true", "trainer.max_epochs=3", "trainer.precision=16-mixed",
                "task.label_smoothing=0.1", "sweep.size=3", "model.pretrained=false", "augment=null",
            )
        ),
    ],
)  # fmt: skip
def test_refused_in_one_sentence(overrides: str, message: str) -> None:
    with pytest.raises((ConfigError, UserError), match=re.escape(message)) as caught:
        checked(*overrides.split())
    assert "\n" not in str(caught.value).strip(), "one sentence"


@pytest.mark.parametrize(
    "overrides",
    [
        "optimizer.lr=1e-3 seed=4 trainer.threads=2",
        "optimizer=sgd optimizer.momentum=0.5 callbacks=[ema,lawa] ingredient.weights=ema",
        "+soup=greedy sweep.size=0",
        "+soup=greedy sweep.size=4 sweep.seed=2 soup.landscape=true soup.grid=4 soup.racing=0",
        "+soup=greedy sweep.method=grid sweep.space.seed=null",
        "+soup=uniform soup.batchnorm=reestimate soup.batchnorm_batches=4",
        "+soup=wise_ft soup.start=probe soup.points=3",
        " ".join([*FOLDER, "loader.eval_batch_size=9", "task.channels_last=false", "trainer.accelerator=cpu"]),
        " ".join([*FOLDER, "data=movies", "model=minilm", "soup.exclude=[a]"]),
        "hydra.job.name=mine hydra.run.dir=/tmp/x",
    ],
)  # fmt: skip
def test_settings_that_reach_something_pass(overrides: str) -> None:
    checked(*overrides.split())


def test_the_augmentation_of_texts_would_do_nothing() -> None:
    class Kind:
        augmented = False

    class Data:
        train = Kind()

    configuration = configuration_of(composed("data=movies", "model=minilm", "augment.magnitude=9"))
    with pytest.raises(ConfigError, match=r"augment\.magnitude would be ignored: the data are texts"):
        refuse_ignored(["augment.magnitude=9"], configuration, lambda: Data())  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("key", "decides"),
    [
        ("optimizer.lr", True), ("optimizer", True), ("seed", True), ("task.freeze_batchnorm", True),
        ("trainer.max_epochs", True), ("trainer.precision", True), ("trainer.threads", False),
        ("trainer.devices", False), ("trainer.check_val_every_n_epoch", False), ("loader.batch_size", True),
        ("loader.workers", False), ("tracking.project", False), ("paths.output", False), ("soup.recipe", False),
        ("sweep.size", False), ("pool.path", False), ("callbacks", True), ("ingredient.weights", True),
    ],
)  # fmt: skip
def test_what_a_sweep_may_vary(key: str, decides: bool) -> None:
    assert decides_fit(key, configuration_of(composed())) == decides
    if key == "trainer.check_val_every_n_epoch":
        assert decides_fit(key, configuration_of(composed("callbacks=[ema]"))), "with callbacks it may decide"


class Context:
    """Hydra's context, as far as sweeps use it: configurations are composed as Hydra does it for a job."""

    class config_loader:
        @staticmethod
        def load_sweep_config(config: DictConfig, overrides: list[str]) -> DictConfig:
            return composed(*overrides)


class Launcher:
    def launch(self, *arguments: Any, **named: Any) -> Any:
        raise AssertionError("something was launched")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("+sweep.space.trainer.profiler='choice(a,b)'", "trainer.profiler is swept, but it decides no weights"),
        ("+sweep.space.loader.workers='choice(0,1)'", "loader.workers is swept, but it decides no weights"),
        ("+sweep.space.optimizer.lrr='choice(1,2)'", "optimizer.lrr is no setting: did you mean 'lr'"),
        ("+sweep.space.start.seed='choice(1,2)'", "would have another base model or other data"),
        ("+sweep.space.task.freeze_batchnorm='choice(false)'", "would have another base model or other data"),
        ("+sweep.space.data.split_seed='choice(1,2)'", "would have another base model or other data"),
        ("sweep.space.optimizer.lr='interval(-2.0,-1.0)'", "must be a positive number"),
    ],
)
def test_a_search_space_is_checked_before_anything_is_computed(
    overrides: list[str], space: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soups.fitting.run.ensure_probe", lambda *a: pytest.fail("computed"))
    arguments = [*overrides, "+soup=greedy", "sweep.size=3", space]
    with pytest.raises(UserError, match=re.escape(message)):
        run_sweep(composed(*arguments), Context(), Launcher(), arguments)  # type: ignore[arg-type]


def varied(*arguments: str) -> dict[str, set[str]]:
    """The values of each key among the points of a sweep, as the sweeper sees these arguments."""
    plain = [text for text in arguments if "interval" not in text or "'" in text]
    _, points = plan(composed("+soup=greedy", *plain), ["+soup=greedy", *arguments])
    found: dict[str, set[str]] = {}
    for point in points:
        assert len({text.partition("=")[0] for text in point}) == len(point), "a key is drawn twice"
        for text in point:
            found.setdefault(text.partition("=")[0], set()).add(text.partition("=")[2])
    return found


@pytest.mark.parametrize(
    "text",
    [
        "sweep.space.optimizer.lr=tag(log, interval(8e-5, 9e-5))",
        "sweep.space.optimizer.lr='tag(log, interval(8e-5, 9e-5))'",
        "sweep.space.optimizer.lr=interval(8e-5, 9e-5)",
        "sweep.space.optimizer={lr: 'interval(8e-5, 9e-5)'}",
    ],
)
def test_an_entry_of_the_search_space_is_replaced(text: str) -> None:
    found = varied(text)
    assert "sweep.space.optimizer.lr" not in found
    assert len(found["optimizer.lr"]) == 8 and all(8e-5 <= float(value) <= 9e-5 for value in found["optimizer.lr"])
    assert set(found) == set(varied()), "the other entries stay"


def test_every_way_to_say_what_varies(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("sweep.space.task.label_smoothing=choice(0.3,0.4)", "task.label_smoothing=0.3,0.4"):
        _, points = plan(composed("+soup=greedy"), ["+soup=greedy", text])
        values = {dict(one.split("=", 1) for one in point)["task.label_smoothing"] for point in points}
        assert values == {"0.3", "0.4"}
    _, points = plan(composed("+soup=greedy"), ["+soup=greedy", "seed=7", "optimizer=adamw,sgd"])
    names = {text.partition("=")[0] for text in points[0]}
    assert "seed" not in names and {"optimizer", "optimizer.lr"} <= names, "a group keeps the entries inside it"
    with pytest.raises(ConfigError, match=r"sweep\.space\.optimizer\.lr would be ignored: optimizer\.lr is given too"):
        plan(composed("+soup=greedy"), ["+soup=greedy", "optimizer.lr=1", "sweep.space.optimizer.lr=choice(1,2)"])


def test_hydra_is_as_it_was_after_the_block() -> None:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    before: Callable[..., Any] = ConfigLoaderImpl.load_configuration
    with nearest_names():
        assert ConfigLoaderImpl.load_configuration is not before
    assert ConfigLoaderImpl.load_configuration is before
    GlobalHydra.instance().clear()
