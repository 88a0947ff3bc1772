"""Orange's tab-separated files: three lines of header (names, types, roles), then one row a text."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from soups.errors import DataError, did_you_mean


def read_tab(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the values of some columns of each row.

    Args:
        path: a `.tab` file.
        columns: names from the first line.

    Raises:
        DataError: the file has no such column.
    """
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines, delimiter="\t")
        names = next(rows)
        for column in columns:
            if column not in names:
                raise DataError(f"{path} has no column {column!r}: {did_you_mean(column, names)}")
        places = [names.index(column) for column in columns]
        for row in islice(rows, 2, None):
            if row:  # some files end in an empty line
                yield tuple(row[place] for place in places)
