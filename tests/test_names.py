"""One name for one thing: no public class name occurs twice, and no metaphor of the kitchen is left."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = [path for path in sorted((ROOT / "soups").rglob("*.py")) if "callbacks" not in path.parts]
# A callback bears the name of the average that it brings to Lightning.
ADAPTED = {"EMA", "SWA", "LAWA", "PostHocEMA"}


def classes(path: Path) -> list[str]:
    return [
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]


def test_no_public_class_name_occurs_twice() -> None:
    where: dict[str, list[str]] = defaultdict(list)
    for path in [*PACKAGE, *sorted((ROOT / "callbacks").glob("*.py"))]:
        for name in classes(path):
            where[name].append(str(path.relative_to(ROOT)))
    twice = {name: paths for name, paths in where.items() if len(paths) > 1 and name not in ADAPTED}
    assert not twice
    assert all(len(where[name]) <= 2 for name in ADAPTED)


def test_names_are_the_fields() -> None:
    metaphors = re.compile(r"\b(kitchen|cook\w*|closing|bodies|told|Several|chef|taste\w*)\b", re.IGNORECASE)
    found = {
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in PACKAGE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and metaphors.search(node.name.replace("_", " "))
    }
    found |= {str(path.relative_to(ROOT)) for path in PACKAGE if metaphors.search(path.stem.replace("_", " "))}
    assert not found
