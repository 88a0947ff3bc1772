"""Names, paths and errors are shown as they are, whatever they look like."""

from pathlib import Path

import pytest
from rich.console import Console

from soups.launch.failures import Failed, reasons, tell_failures
from soups.launch.progress import SweepProgress
from soups.launch.terminal import show_end
from soups.stores.pool import Failure, Ingredient, Pool

MARKUP = ["[/data/plots]", "[red]", "[bold]x[/]", "[link=file]", "a[0]", "\\[x]"]


def console() -> Console:
    return Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123


@pytest.mark.parametrize("text", MARKUP)
def test_no_error_is_read_as_markup(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    shown = console()
    show_end(f"sentence {text}", [f"warning {text}"], tmp_path, shown)
    assert tell_failures(shown, {"a" * 64: Failed(f"lr={text}", f"ValueError: {text}")}) == 3
    found = shown.export_text()
    assert found.count(text) == 4, found


@pytest.mark.parametrize("text", MARKUP)
def test_neither_are_the_lines_of_a_sweep(text: str, tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    pool.add(Ingredient(fingerprint="a" * 64, determinants={}, metrics={"heldout": {text: 0.5}}), {})
    display = SweepProgress(
        pool, ["a" * 64, "b" * 64], {"a" * 64: f"one {text}", "b" * 64: f"two {text}"}, 0, describe=lambda r: text
    )
    display.console = console()
    with display.running():
        pool.fail(Failure(fingerprint="b" * 64, error=f"ValueError: {text}", determinants={}))
    found = display.console.export_text()
    assert found.count(text) >= 4, found


def test_the_same_error_is_told_once() -> None:
    long = "RuntimeError: size mismatch\n" + "\n".join(f"line {number}" for number in range(18))
    failed = {f"{number:064x}": Failed(f"lr={number}", long.replace("line 3", f"line {number}")) for number in range(8)}
    (told,) = reasons(failed)
    assert told.startswith("8 of them (00000000 lr=0") and told.count("size mismatch") == 1 and ", …" in told
    other = {**failed, "f" * 64: Failed("lr=9", "KeyError: 'x'")}
    assert len(reasons(other)) == 2 and reasons(other)[1] == "ffffffff lr=9: KeyError: 'x'"
    shown = console()
    assert tell_failures(shown, {}) == 0 and tell_failures(shown, other) == 3
    assert "9 ingredients failed and are not in the soup" in shown.export_text()
