"""`soups pool ls|show|diff|rm|gc`: list, compare and remove the ingredients of a pool."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soups.commands.running import console, readable, reported, warn

if TYPE_CHECKING:
    from soups.stores.pool import Pool
    from soups.stores.records import Ingredient

app = typer.Typer(
    help="List, compare and remove the ingredients of a pool.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Where = Annotated[str, typer.Argument(metavar="POOL", help="The pool: a folder, or an fsspec URL (s3://…).")]
Output = Annotated[
    Path, typer.Option(help="The folder of finished soups (paths.output); their ingredients are in use.")
]


@app.command("ls")
def list_(place: Where, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the ingredients, best first, with held-out accuracy, differing settings, age and size; list failed runs."""
    with reported():
        from soups.errors import StorageError
        from soups.reporting import differences

        pool = _open(place)
        records: list[Ingredient] = []
        damaged: list[str] = []
        for name in pool.names():
            try:
                records.append(pool.ingredient(name))
            except StorageError as error:
                damaged.append(str(error))
        records.sort(key=lambda record: -_heldout(record))
        keys, _ = differences({record.short: record.determinants for record in records})
        failures = pool.failures()
        if as_json:
            content = [_brief(record, keys) for record in records]
            failed = [{"fingerprint": item.fingerprint, "error": item.error} for item in failures]
            typer.echo(
                json.dumps({"pool": place, "ingredients": content, "failed": failed, "damaged": damaged}, indent=2)
            )
            return
        if records:
            console.print(_table(records, keys))
        total = readable(sum(record.file_bytes for record in records))
        count = f"{len(records)} ingredient{'' if len(records) == 1 else 's'}"
        console.print(f"{count} in {place}, {total}" if records else f"No ingredients in {place}", markup=False)
        for failure in failures:
            console.print(f"failed: {failure.fingerprint[:8]}  {failure.error}", markup=False, style="yellow")
        for problem in damaged:
            warn(problem)


@app.command()
def show(
    place: Where,
    name: Annotated[str, typer.Argument(help="An ingredient's fingerprint, or its first characters.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole record as JSON.")] = False,
) -> None:
    """Show one ingredient's record."""
    with reported():
        pool = _open(place)
        record = pool.ingredient(pool.find(name))
        if as_json:
            typer.echo(record.model_dump_json(indent=2))
            return
        from rich.text import Text

        from soups.reporting import flatten

        rows: dict[str, Any] = {
            "fingerprint": record.fingerprint, "weights": record.weights, "start": record.start, "split": record.split,
            "created": f"{record.created} ({_age(record)} ago)", "size": readable(record.file_bytes),
            **{f"{split} {key}": value for split, values in record.metrics.items() for key, value in values.items()},
            **{f"{key}, s": round(value, 2) for key, value in record.durations.items()},
        }  # fmt: skip
        hidden = ("start", "split", "training_version")
        settings = {key: value for key, value in flatten(record.determinants).items() if key not in hidden}
        sections = [section for section in (rows, settings, record.layout, record.versions) if section]
        width = max(len(key) for section in sections for key in section)
        for number, section in enumerate(sections):
            if number:
                console.print()
            for key, value in section.items():  # whole lines, so that a hash can be copied
                text = Text.assemble((f"{key:<{width}}  ", "dim"), Text.from_markup(_cell(value)))
                console.print(text, soft_wrap=True, highlight=False)


@app.command()
def diff(
    place: Where,
    first: Annotated[str, typer.Argument(help="An ingredient.")],
    second: Annotated[str, typer.Argument(help="Another ingredient.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the settings and metrics of two ingredients. (`soups diff` compares weights.)"""
    with reported():
        from soups.reporting import differences, flatten

        pool = _open(place)
        one, other = (pool.ingredient(pool.find(name)) for name in (first, second))
        flat = [flatten(record.determinants) for record in (one, other)]
        keys, _ = differences({"a": one.determinants, "b": other.determinants})
        metrics = [flatten(record.metrics) for record in (one, other)]
        if as_json:
            settings = {key: [values.get(key) for values in flat] for key in keys}
            numbers = {
                key: [values.get(key) for values in metrics] for key in dict.fromkeys([*metrics[0], *metrics[1]])
            }
            same = one.weights == other.weights
            typer.echo(json.dumps({"settings": settings, "metrics": numbers, "same_weights": same}, indent=2))
            return
        from rich.table import Table

        table = Table("", one.short, other.short, "difference", box=None)
        for key in keys:
            table.add_row(key, *(_cell(values[key]) if key in values else "–" for values in flat), "")
        table.add_section()
        for key in dict.fromkeys([*metrics[0], *metrics[1]]):
            a, b = (values.get(key) for values in metrics)
            table.add_row(key, _cell(a), _cell(b), "" if a is None or b is None else f"{b - a:+.4g}")
        console.print(table)
        if one.weights == other.weights:
            console.print("Their weights are the same, bit by bit.")


@app.command()
def rm(
    place: Where,
    names: Annotated[list[str], typer.Argument(help="Ingredients: fingerprints, or their first characters.")],
    output: Output = Path("outputs"),
    force: Annotated[bool, typer.Option("--force", help="Also remove ingredients of finished soups.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove the named ingredients. Remove none if one is missing or belongs to a finished soup under --output."""
    with reported():
        from soups.errors import StorageError
        from soups.stores.garbage import lineages, needed_by

        pool = _open(place)
        found = list(dict.fromkeys(pool.find(name) for name in names))
        if not force:
            soups = lineages(output)
            needed = {name: folders for name in found if (folders := needed_by(name, soups))}
            if needed:
                lines = "; ".join(
                    f"{name[:8]} is in {', '.join(str(folder) for folder in folders)}"
                    for name, folders in needed.items()
                )
                raise StorageError(
                    f"Finished soups came from these ingredients: {lines}. Nothing was removed; --force does."
                )
        short = ", ".join(name[:8] for name in found)
        if not yes and not typer.confirm(f"Remove {short} from {place}?"):
            raise typer.Exit(1)
        for name in found:
            pool.remove(name)
        console.print(
            f"Removed {short}. `soups pool gc {place}` removes their predictions.", soft_wrap=True, markup=False
        )


@app.command()
def gc(
    place: Where,
    output: Output = Path("outputs"),
    older_than: Annotated[
        float,
        typer.Option(help="Remove only files last written this many hours ago; running fits may need newer ones."),
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files; remove nothing.")] = False,
) -> None:
    """Remove unused files: remains of killed runs, free locks, outdated failures, predictions of absent weights."""
    with reported():
        from soups.errors import ConfigError
        from soups.stores.garbage import leftovers, remove

        if older_than < 0:
            raise ConfigError(f"--older-than {older_than} must be a number of hours, at least 0.")
        pool = _open(place)
        items, notes = leftovers(pool, output, 3600 * older_than)
        for note in notes:
            warn(note)
        reasons: dict[str, list[int]] = {}
        for item in items:
            reasons.setdefault(item.reason, []).append(item.size)
            if dry_run:
                console.print(f"{item.path}  {item.reason}, {readable(item.size)}", soft_wrap=True, markup=False)
        freed = sum(item.size for item in items) if dry_run else remove(pool, items)
        what = ", ".join(f"{len(sizes)} {reason}" for reason, sizes in reasons.items())
        verb = "Would remove" if dry_run else "Removed"
        console.print(
            f"{verb} {what}: {readable(freed)}" if items else "Nothing to remove.", soft_wrap=True, markup=False
        )


def _open(place: str) -> Pool:
    """Open a pool to look at: one that is not there is a mistake here, not a pool to be made."""
    from soups.errors import StorageError
    from soups.stores.pool import Pool

    pool = Pool(place)
    if not pool.folder.exists():
        raise StorageError(f"There is no pool at {place}.")
    return pool


def _heldout(record: Ingredient) -> float:
    return record.metrics.get("heldout", {}).get("accuracy", float("-inf"))


def _brief(record: Ingredient, keys: list[str]) -> dict[str, Any]:
    from soups.reporting import flatten

    settings = flatten(record.determinants)
    return {
        "fingerprint": record.fingerprint, "heldout": record.metrics.get("heldout", {}),
        "settings": {key: settings[key] for key in keys if key in settings},
        "created": record.created, "bytes": record.file_bytes, "seconds": record.durations.get("total"),
    }  # fmt: skip


def _table(records: list[Ingredient], keys: list[str]) -> Any:
    from rich.table import Table

    from soups.reporting import flatten

    table = Table(box=None)
    table.add_column("ingredient", no_wrap=True)
    table.add_column("held-out", justify="right", no_wrap=True)
    settings = {record.short: flatten(record.determinants) for record in records}
    for key in keys:
        # In a narrow terminal the heading folds, the values do not.
        width = max(len(_cell(values[key])) for values in settings.values() if key in values)
        table.add_column(key.rpartition(".")[2], overflow="fold", min_width=min(24, width))
    table.add_column("age", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for record in records:
        score = _heldout(record)
        shown = f"{score:.2%}" if score >= 0 else "–"
        own = settings[record.short]
        values = (_cell(own[key]) if key in own else "–" for key in keys)
        table.add_row(record.short, shown, *values, _age(record), readable(record.file_bytes))
    return table


def _cell(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(value if isinstance(value, str) else json.dumps(value))


def _age(record: Ingredient) -> str:
    try:
        passed = datetime.now(UTC) - datetime.fromisoformat(record.created)
    except ValueError:
        return "–"
    for unit, length in (("d", timedelta(days=1)), ("h", timedelta(hours=1)), ("min", timedelta(minutes=1))):
        if passed >= length:
            return f"{passed // length} {unit}"
    return f"{max(0, int(passed.total_seconds()))} s"
