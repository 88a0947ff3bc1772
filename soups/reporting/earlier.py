"""Reports that earlier versions of this program wrote, brought into the present form when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

_KINDS = {"start": "start", "mean of ingredients": "mean", "best single": "best"}


def current_row(value: Any) -> Any:
    """Return a row whose accuracies and losses are kept by split under `metrics`."""
    if not isinstance(value, Mapping):
        return value
    row = dict(cast(Mapping[str, Any], value))
    accuracy, loss = row.pop("accuracy", None) or {}, row.pop("loss", None) or {}
    if "metrics" not in row:
        splits = dict.fromkeys([*accuracy, *loss])
        named = {"accuracy": accuracy, "loss": loss}
        row["metrics"] = {
            split: {name: values[split] for name, values in named.items() if split in values} for split in splits
        }
    return row


def current_report(value: Any) -> Any:
    """Return a soup's report with a name, a `mode`, versions and a pool, all soups' in one form."""
    if not isinstance(value, Mapping):
        return value
    report = dict(cast(Mapping[str, Any], value))
    if "monitor" in report and "splits" not in report:
        report = _of_another_program(report)
    report.setdefault("mode", "min" if report.get("metric") == "loss" else "max")
    recipe = report.pop("recipe", None)
    lineage = cast(Mapping[str, Any], report.get("lineage") or {})
    for key, known in (("name", recipe), ("versions", lineage.get("versions")), ("pool", lineage.get("pool"))):
        if known and key not in report:
            report[key] = known
    return report


def _of_another_program(report: dict[str, Any]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for row in cast(list[dict[str, Any]], report.get("rows", [])):
        name = str(row.get("name", ""))
        kind = _KINDS.get(name, "soup" if name.endswith(" soup") else "ingredient")
        metrics = {split: row[split] for split in ("heldout", "test") if row.get(split)}
        rows.append({"name": name, "kind": kind, "metrics": metrics, "note": row.get("note", "")})
    splits = dict.fromkeys((split for row in rows for split in row["metrics"]), 0)
    lineage = {key: report.get(key) for key in ("start", "soup", "versions", "pool")}
    kept = ("fingerprint", "recipe", "mode", "members", "ingredients", "seconds", "warnings")
    return {
        **{key: report[key] for key in kept if key in report},
        "metric": report["monitor"], "rows": rows, "splits": splits, "steps": [], "lineage": lineage,
    }  # fmt: skip
