"""What goes to W&B when online, where tests cannot go: artifacts and lineage, on a run that notes what it is given."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from soups.cli import app
from soups.errors import ConfigError
from soups.tracking import finish_ingredient, log_soup, weights_and_biases
from soups.tracking.weights_and_biases import ingredient_artifact
from soups.tracking.workspace import as_json, metrics_of, report, sections, workspace

wandb = pytest.importorskip("wandb")
INGREDIENT = {
    "fingerprint": "ab" * 32, "weights": "cd" * 32, "determinants": {"optimizer": {"lr": 1e-4}},
    "metrics": {"heldout": {"accuracy": 0.9, "loss": 0.3, "count": 100}}, "created": "today", "layout": {"host": "secret"},
}  # fmt: skip


class Run:
    """Notes what is logged."""

    def __init__(self, offline: bool) -> None:
        self.offline = offline
        self.summary: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.used: list[Any] = []
        self.made: list[Any] = []

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def define_metric(self, name: str, step_metric: str) -> None:
        self.logged.append({"metric": name, "over": step_metric})

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def use_artifact(self, artifact: Any) -> None:
        self.used.append(artifact)

    def log_artifact(self, artifact: Any) -> None:
        self.made.append(artifact)


@pytest.mark.parametrize("offline", [True, False])
def test_the_soup_descends_from_its_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    run, own = Run(offline), Run(offline)
    monkeypatch.setattr(weights_and_biases, "start_run", lambda *_: run)
    weights, page = tmp_path / "soup.safetensors", tmp_path / "report.html"
    weights.write_bytes(b"weights")
    page.write_text("<!doctype html><title>t</title>")
    finish_ingredient(own, INGREDIENT, {"fit": 2.0})
    log_soup(
        {"mode": "offline" if offline else "online"}, tmp_path, "greedy-soup-1", "pool", {"seed": 0}, {"test/accuracy": 0.9},
        {"results": (["model"], [["a"]])}, [{"soup_score": 0.5, "kept": True}], {}, {"soup": "ef" * 32}, weights, page, [INGREDIENT],
    )  # fmt: skip
    assert own.summary == {"heldout/accuracy": 0.9, "heldout/loss": 0.3, "seconds/fit": 2.0}
    assert {"search/step": 1, "search/soup_score": 0.5, "search/kept": True} in run.logged
    assert run.summary == {"test/accuracy": 0.9}
    if offline:  # artifacts cannot be read back there
        assert own.made == run.made == run.used == []
        return
    (used,), (soup,), (made,) = run.used, run.made, own.made
    assert (used.name, used.type) == ("ingredient-" + "ab" * 8, "ingredient")
    assert used.digest == made.digest, "one version, whichever run was first"
    assert soup.type == "soup" and list(soup.manifest.entries) == ["soup.safetensors"]
    assert soup.metadata == {"soup": "ef" * 32}


def test_an_ingredients_artifact_holds_what_decides_it_and_nothing_private() -> None:
    artifact = ingredient_artifact(INGREDIENT)
    entry = artifact.manifest.entries["record.json"]
    kept = json.loads(Path(entry.local_path).read_text())
    assert set(kept) == {"fingerprint", "weights", "determinants", "metrics"}
    other = ingredient_artifact({**INGREDIENT, "weights": "00" * 32})
    assert (
        other.digest != artifact.digest
        and ingredient_artifact({**INGREDIENT, "created": "later"}).digest == artifact.digest
    )


def test_the_dashboard_names_every_panel_without_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces")
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    target = tmp_path / "workspace.json"
    done = CliRunner().invoke(app, ["dashboard", "soups", "--entity", "team", "--dry-run", "--out", str(target)])
    assert done.exit_code == 0, done.output
    made = json.loads(target.read_text())
    assert (made["entity"], made["project"], made["displayName"]) == ("team", "soups", "Soups")
    shown = made["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in shown] == list(sections())
    assert [len(section["panels"]) for section in shown] == [len(panels) for panels in sections().values()]
    text = json.dumps(made)
    for name in set().union(*(metrics_of(panels) for panels in sections().values())):
        assert name.removeprefix("config:").split(".")[0] in text
    assert "config:optimizer.value.lr" in text and "summary:ood/accuracy" in text
    assert as_json(workspace("soups", "team"))["project"] == "soups"
    assert "--dry-run" in CliRunner().invoke(app, ["dashboard", "soups", "--out", str(target)]).output


def test_the_report_template_has_the_same_panels() -> None:
    pytest.importorskip("wandb_workspaces")
    grids = [block for block in report("soups", "team").blocks if type(block).__name__ == "PanelGrid"]
    assert [metrics_of(grid.panels) for grid in grids] == [metrics_of(panels) for panels in sections().values()]
    assert [grid.runsets[0].name for grid in grids] == list(sections())


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[dashboard\]'"):
        sections()
