"""Printed characters, drawn from the outlines of the fonts that come with matplotlib (DejaVu, STIX, Computer Modern).

Three questions with labels of their own: the writing system of a character, which of 26 Latin letters it is (whatever its
case, accents and typeface), and the style of its typeface.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soups.errors import DataError, did_you_mean
from soups.seeding import generator
from soups.tasks.data import Splits
from soups.tasks.images import TensorImages, each_once

SIDE = 28
SCRIPTS = (
    "LATIN",
    "GREEK",
    "CYRILLIC",
    "ARMENIAN",
    "GEORGIAN",
    "ARABIC",
    "CANADIAN",
    "MATHEMATICAL",
    "TIFINAGH",
    "LAO",
)
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
# Files of the fonts, by style.
STYLES = {
    "sans": ("DejaVuSans", "cmss10"),
    "sans bold": ("DejaVuSans-Bold",),
    "sans oblique": ("DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    "mono": ("DejaVuSansMono", "DejaVuSansMono-Bold", "cmtt10"),
    "serif": ("DejaVuSerif", "STIXGeneral", "cmr10"),
    "serif bold": ("DejaVuSerif-Bold", "STIXGeneralBol", "cmb10"),
    "serif italic": (
        "DejaVuSerif-Italic",
        "DejaVuSerif-BoldItalic",
        "STIXGeneralItalic",
        "STIXGeneralBolIta",
        "cmti10",
    ),
}
TASKS = ("script", "letter", "style")


def glyphs(task: str, train: int = 2000, heldout: int = 500, test: int = 1500, split_seed: int = 0) -> Splits:
    """Return a task on printed characters.

    Args:
        task: "script", "letter" or "style".
        train, heldout, test: sizes of the splits, drawn without overlap from the distinct images.
        split_seed: of the draw.

    Raises:
        DataError: an unknown task, or too few images.
    """
    if task not in TASKS:
        raise DataError(f"There is no task {task!r} on printed characters: {did_you_mean(task, TASKS)}")
    images, classes = _images(task)
    total = len(images)
    if min(train, heldout, test) < 1 or train + heldout + test > total:
        raise DataError(
            f"data.train + data.heldout + data.test = {train} + {heldout} + {test}, but there are {total} characters; each "
            f"split needs at least one image and together they cannot exceed that."
        )
    order = torch.randperm(total, generator=generator(split_seed, "split", task))[: train + heldout + test]
    parts = [images.take(part) for part in order.split([train, heldout, test])]
    return Splits(parts[0], parts[1], parts[2], classes)


@lru_cache(maxsize=3)
def _images(task: str) -> tuple[TensorImages, tuple[str, ...]]:
    """Return each distinct image once, and the classes; images that belong to two classes are left out."""
    classes = {"script": SCRIPTS, "letter": LETTERS, "style": tuple(STYLES)}[task]
    pixels: list[torch.Tensor] = []
    labels: list[int] = []
    for style, files in STYLES.items():
        for file in files:
            for code in _codes(file):
                name = unicodedata.name(chr(code), "")
                label = style if task == "style" else _label(task, name)
                if label in classes and (task != "style" or _label("letter", name) in LETTERS):
                    pixels.append(_drawn(file, code))
                    labels.append(classes.index(label))
    return each_once(TensorImages(torch.stack(pixels)[:, None], torch.tensor(labels))), classes


def _label(task: str, name: str) -> str:
    """Return the script or the Latin letter that a character's Unicode name says, "" where it says none.

    >>> _label("letter", "LATIN SMALL LETTER E WITH ACUTE"), _label("script", "GREEK SMALL LETTER ALPHA")
    ('E', 'GREEK')
    """
    words = name.split()
    if task == "script":
        return words[0] if words else ""
    is_letter = len(words) >= 4 and words[0] == "LATIN" and words[1] in ("SMALL", "CAPITAL") and words[2] == "LETTER"
    return words[3] if is_letter else ""


@lru_cache(maxsize=32)
def _codes(file: str) -> tuple[int, ...]:
    from fontTools.ttLib import TTFont  # pyright: ignore[reportMissingTypeStubs]

    font: Any = TTFont(_path(file), lazy=True)
    return tuple(sorted(code for code in font.getBestCmap() if code > 32))


@lru_cache(maxsize=32)
def _font(file: str) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(str(_path(file)), 22)


def _path(file: str) -> Path:
    import matplotlib as mpl

    return Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{file}.ttf"


def _drawn(file: str, code: int) -> torch.Tensor:
    """Draw a character white on black, centred: uint8 (28, 28)."""
    from PIL import Image, ImageDraw

    picture = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(picture).text((SIDE / 2, SIDE / 2), chr(code), fill=255, font=_font(file), anchor="mm")
    return torch.from_numpy(np.asarray(picture).copy())
