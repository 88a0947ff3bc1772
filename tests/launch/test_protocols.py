"""Every protocol has a file, a configuration that composes, and a card; what does not decide results is not in a plan."""

from pathlib import Path

import pytest

from soups.errors import ConfigError
from soups.launch.protocol import build_program
from tests.launch.conftest import ROOT, compose_settings

NAMES = sorted(path.stem for path in (ROOT / "conf" / "protocol").glob("*.yaml"))


def test_every_configuration_has_a_card_and_the_other_way_round() -> None:
    cards = (ROOT / "soups" / "protocols" / "README.md").read_text()
    assert [name for name in NAMES if f"+protocol={name}" not in cards] == []
    assert {"cold_fusion", "fusing", "ratatouille", "lo_fi", "btm"} <= set(NAMES)


@pytest.mark.parametrize("name", ["cold_fusion", "fusing", "ratatouille", "lo_fi", "btm"])
def test_a_plan_is_the_same_wherever_it_runs(name: str, tmp_path: Path) -> None:
    def names(*more: str) -> list[str]:
        settings = compose_settings([f"+protocol={name}", f"pool.path={tmp_path}", *more])
        return list(build_program(settings).plan().nodes)

    base = names()
    elsewhere = names(
        "trainer.devices=2", "trainer.strategy=ddp", "trainer.threads=3", "tracking=off", f"paths.output={tmp_path}/x"
    )
    assert base == elsewhere and len(base) > 10
    assert not set(base) & set(names("seed=1")) or name in ("cold_fusion", "lo_fi"), "a seed makes other fits"
    assert base != names("seed=1")


def test_what_is_no_protocol_says_so() -> None:
    settings = compose_settings(
        ["+protocol=lo_fi", "protocol._target_=soups.launch.bodies.fit_parameters", "~protocol.nodes"]
    )
    with pytest.raises(ConfigError, match="must make an object with name, plan"):
        build_program(settings)
    settings = compose_settings(["+protocol=lo_fi", "protocol._target_=soups.launch.recycling.LoFy"])
    with pytest.raises(ConfigError, match="cannot be imported"):
        build_program(settings)
