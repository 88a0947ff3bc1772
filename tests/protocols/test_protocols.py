"""Every protocol's configuration composes and has a card; every leaf of it decides results, the report, or only the layout."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from soups.errors import ConfigError
from soups.fitting import fingerprint
from soups.launch.settings import Settings
from soups.protocols import Node, ProtocolRunner, build_protocol
from soups.protocols.plan import Parameters
from tests.launch.conftest import ROOT, compose_settings
from tests.tiny_text import write_writer

NAMES = sorted(path.stem for path in (ROOT / "conf" / "protocol").glob("*.yaml"))
HERE = "tests.protocols.test_protocols"
# Where and how a command runs: these decide nothing.
LAYOUT = {
    "trainer": ("accelerator", "devices", "strategy", "num_nodes", "threads", "deterministic", "benchmark", "profiler",
                "detect_anomaly", "check_val_every_n_epoch", "limit_val_batches", "val_check_interval"),
    "loader": ("eval_batch_size", "workers"),
    "tracking": ("mode", "project", "entity", "group"),
    "pool": ("path", "format", "state", "prefix", "cache"),
    "paths": ("output",),
    "protocol": ("repository",),
}  # fmt: skip
# Of TRL's arguments, those that only say what is logged.
LOGGED = ("report_to",)


def words(prompts: list[str], completions: list[str], scale: float = 1.0, **more: Any) -> list[float]:
    """A reward."""
    return [scale * len(text.split()) for text in completions]


def settings_of(name: str, place: Path, *more: str) -> Settings:
    own: list[str] = []
    if name == "rewarded_soups_trl":
        pytest.importorskip("trl", reason="pip install 'soups[trl]'")
        (place / "train.txt").write_text("the film was\nso it was\n")
        (place / "test.txt").write_text("the end\nthe actor\n")
        own = [
            f"protocol.model={write_writer(place / 'gpt2')}", "protocol.rewards.rating.model=none",
            "~protocol.rewards.rating.model", f"protocol.rewards.rating._target_={HERE}.words",
            "+protocol.rewards.rating.scale=2.0", f"protocol.prompts.train={place}/train.txt",
            f"protocol.prompts.test={place}/test.txt",
        ]  # fmt: skip
    return compose_settings([f"+protocol={name}", f"pool.path={place}/pool", *own, *more])


def named(program: ProtocolRunner[Any]) -> str:
    """Return what names a run of a protocol: its plan's results and its report."""
    return program.fingerprint(program.plan())


def leaves(tree: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*place, key))
        elif key != "_target_":
            yield (*place, key), value


def others_of(place: tuple[str, ...], value: Any) -> list[Any]:
    """Return other values of a leaf, of which at least one is allowed."""
    return [given for given in _candidates(value) if given != value]


def _candidates(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2, max(1, value - 1)]
    if isinstance(value, float):
        return [value * 0.5, value + 0.1]
    if isinstance(value, list):
        return [value[:-1], [0.4], [1]]
    if value is None:
        return [
            1,
            0.5,
            "other",
            {"num_ops": 1, "magnitude": 5},
            {"tolerance": 0.1},
            [0.4],
            {"_target_": f"{HERE}.words"},
        ]
    others = {"adamw": "sgd", "cosine": "constant", "one": "all", "rebase": "refuse", "synchronous": "asynchronous",
              "linear": "median", "32-true": "bf16-mixed", "movies": "amazon", "mean": "library", "raw": "ema"}  # fmt: skip
    return [others.get(str(value), f"{value}x"), "movies", "median"]


def with_leaf(settings: Settings, place: tuple[str, ...], value: Any) -> Settings:
    other = copy.deepcopy(settings)
    branch = other
    for key in place[:-1]:
        branch = branch[key]
    branch[place[-1]] = value
    return other


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_decides_something_or_is_layout(name: str, tmp_path: Path) -> None:
    settings = settings_of(name, tmp_path)
    base = named(build_protocol(settings))
    ignored: list[str] = []
    checked = 0
    for place, value in leaves(settings):
        section, leaf = place[0], place[-1]
        if leaf in LAYOUT.get(section, ()) or (section == "protocol" and leaf in LOGGED):
            layout = [given for given in others_of(place, value) if not isinstance(given, dict | list)][:1]
            for given in layout:
                try:
                    assert named(build_protocol(with_leaf(settings, place, given))) == base, (place, given)
                except ConfigError:
                    continue
            continue
        if place[:3] == ("protocol", "prompts", "train") or place[:3] == ("protocol", "prompts", "test"):
            continue  # by content, below
        answers: list[str] = []
        for given in others_of(place, value):
            try:
                answers.append(named(build_protocol(with_leaf(settings, place, given))))
            except (ConfigError, OSError):
                continue  # refused, with the key's name
        checked += 1
        if answers and base in answers:
            ignored.append(".".join(place))
        # A null leaf that no value is allowed for is a section that the protocol does not read.
        if not answers and value is not None:
            ignored.append(f"{'.'.join(place)} (no other value was allowed)")
    assert ignored == [], ignored
    assert checked > 8


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_in_a_plan_is_named_by_the_one_fingerprint(name: str, tmp_path: Path) -> None:
    """What changes the fingerprint of a fit changes its node, and so do the average it leaves and its callbacks."""

    def fits(program: ProtocolRunner[Any]) -> dict[str, Node]:
        nodes = program.plan().nodes.values()
        return {node.label: node for node in nodes if hasattr(node.parameters, "fit")}

    program = build_protocol(settings_of(name, tmp_path))
    trained = fits(program)
    if name in ("btm", "rewarded_soups_trl"):
        assert not trained, "their fits are not those of train.py"
        return
    assert trained
    for node in trained.values():
        assert isinstance(node.parameters, Parameters)
        assert node.determinants["parameters"]["fit"]["weights"] == "raw"
        assert len(fingerprint(node.parameters.fit)) == 64
    seen: list[set[str]] = []
    for more in (
        [], ["callbacks=[ema]"], ["callbacks=[ema]", "ingredient.weights=ema"], ["+trainer.precision=bf16-mixed"],
        ["optimizer.weight_decay=0.5"], ["callbacks=[ema]", "callbacks.ema.settings.decay=0.9"],
    ):  # fmt: skip
        more = [one.replace("+trainer.precision", "trainer.precision") for one in more]
        try:
            other = fits(build_protocol(settings_of(name, tmp_path, *more)))
        except Exception as error:
            if "ema.settings" in more[-1]:
                continue  # where the callback's section has another shape
            raise error
        assert other.keys() == trained.keys()
        seen.append({node.fingerprint for node in other.values()})
    for number, one in enumerate(seen):
        for two in seen[number + 1 :]:
            assert not one & two, "no fit of one is taken for the other's"


@pytest.mark.parametrize("name", NAMES)
def test_settings_that_a_protocol_does_not_read_are_refused_by_name(name: str, tmp_path: Path) -> None:
    settings = settings_of(name, tmp_path)
    for place, value, message in (
        (("start",), {"epochs": 9}, r"start\.epochs is no setting of \+protocol="),
        (("sweep",), {"size": 4}, r"sweep\.size is no setting of"),
        (("soup",), {"recipe": "greedy"}, r"soup\.recipe is no setting of"),
        (("trainer", "precison"), "16-mixed", r"trainer\.precison is no setting of .*did you mean 'precision'|Allowed"),
        (("pool", "pth"), "x", r"pool\.pth is no setting of .*did you mean 'path'"),
        (("protocol", "wrong"), 1, r"protocol\.wrong is no setting of"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_protocol(with_leaf(settings, place, value))
    if name in ("btm", "rewarded_soups_trl"):
        for section, given in (("optimizer", {"lr": 1.0}), ("model", {"name": "x"}), ("loader", {"batch_size": 8})):
            with pytest.raises(ConfigError, match=rf"{section}\.\w+ is no setting of"):
                build_protocol(with_leaf(settings, (section,), given))
        with pytest.raises(ConfigError, match=r"trainer\.devices is no setting of .*'accelerator'"):
            build_protocol(with_leaf(settings, ("trainer", "devices"), 2))


@pytest.mark.parametrize("name", ["cold_fusion", "fusing", "ratatouille", "lo_fi", "warm", "rewarded_soups"])
def test_a_plan_is_the_same_wherever_it_runs(name: str, tmp_path: Path) -> None:
    def names(*more: str) -> list[str]:
        return list(build_protocol(settings_of(name, tmp_path, *more)).plan().nodes)

    base = names()
    elsewhere = names(
        "trainer.devices=2", "trainer.strategy=ddp", "trainer.threads=3", "tracking=off", f"paths.output={tmp_path}/x"
    )
    assert base == elsewhere and len(base) > 10
    assert base != names("seed=1")


def test_every_configuration_has_a_card_and_the_other_way_round() -> None:
    cards = (ROOT / "soups" / "protocols" / "README.md").read_text()
    assert [name for name in NAMES if f"+protocol={name}" not in cards] == []
    assert {"cold_fusion", "fusing", "ratatouille", "lo_fi", "btm"} <= set(NAMES)


def test_what_is_no_protocol_says_so(tmp_path: Path) -> None:
    settings = settings_of("lo_fi", tmp_path)
    with pytest.raises(ConfigError, match=r"must be a class derived from soups\.protocols\.ProtocolRunner"):
        build_protocol(with_leaf(settings, ("protocol", "_target_"), f"{HERE}.words"))
    with pytest.raises(ConfigError, match="cannot be imported"):
        build_protocol(with_leaf(settings, ("protocol", "_target_"), "soups.protocols.recycling.run.LoFy"))
