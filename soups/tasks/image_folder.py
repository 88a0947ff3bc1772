"""Anyone's images: a folder with one folder a class, already split or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from soups.errors import DataError
from soups.seeding import generator
from soups.tasks.data import Samples, Splits
from soups.tasks.images import FileImages, with_corruptions

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp")
HELDOUT_NAMES = ("heldout", "val", "validation")


def image_folder(
    root: str,
    heldout: float = 0.2,
    test: float = 0.2,
    corruptions: Sequence[str] = ("blur", "rotation", "noise"),
    severity: int = 3,
    split_seed: int = 0,
) -> Splits:
    """Return the images below `root` as a task.

    Two layouts are understood. `root/<class>/<image>` is split at random, by class, into train, held-out and test.
    `root/train/<class>/<image>` with `heldout` (or `val`) and `test` beside it is taken as it is; a missing held-out or
    test split is drawn from train, and every folder named `ood…` becomes an out-of-distribution split of that name.

    Args:
        root: the folder.
        heldout, test: shares of each class, in (0, 1), where a split must be drawn.
        corruptions: names from `soups.tasks.images.CORRUPTIONS`, applied to the test split as further OOD splits.
        severity: of the corruptions, 1 to 5.
        split_seed: of the random split and the corruptions.

    Raises:
        DataError: no folder, no classes, a class with too few images, or classes that differ between splits.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"data.root={root} is not a folder. Give the folder that holds one folder of images a class.")
    presplit = (folder / "train").is_dir()
    base = folder / "train" if presplit else folder
    classes = read_classes(base)
    rest = read_images(base, classes)
    given = {
        "heldout": next((folder / name for name in HELDOUT_NAMES if presplit and (folder / name).is_dir()), None),
        "test": folder / "test" if presplit and (folder / "test").is_dir() else None,
    }
    chosen: dict[str, FileImages] = {}
    for number, (name, share) in enumerate((("heldout", heldout), ("test", test))):
        place = given[name]
        if place is not None:
            chosen[name] = read_images(place, classes)
        else:
            # The second share is of what the first draw has left.
            left = share / (1 - heldout) if number == 1 and given["heldout"] is None else share
            chosen[name], rest = draw_share(rest, left, split_seed, name)
    ood: dict[str, Samples] = {
        place.name: read_images(place, classes) for place in sorted(folder.glob("ood*")) if presplit and place.is_dir()
    }
    splits = Splits(rest, chosen["heldout"], chosen["test"], tuple(classes), ood)
    return with_corruptions(splits, corruptions, severity, split_seed)


def read_classes(folder: Path) -> list[str]:
    """Return the names of the class folders in a folder.

    Raises:
        DataError: there are fewer than two.
    """
    classes = sorted(place.name for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
    if len(classes) < 2:
        raise DataError(
            f"{folder} holds {len(classes)} class folders; at least two are needed, each with its images: "
            f"{folder}/<class>/<image>."
        )
    return classes


def read_images(folder: Path, classes: list[str]) -> FileImages:
    """Return the images in the class folders of a folder.

    Raises:
        DataError: there are none, or folders of other classes.
    """
    present = {place.name for place in folder.iterdir() if place.is_dir() and not place.name.startswith(".")}
    if unknown := sorted(present - set(classes)):
        raise DataError(
            f"{folder} has classes that the train split lacks: {', '.join(unknown)}. Rename or remove them."
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in ENDINGS)
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(ENDINGS)}).")
    return FileImages(folder, files, labels)


def draw_share(images: FileImages, share: float, seed: int, name: str) -> tuple[FileImages, FileImages]:
    """Split off a share of each class; return it and the rest.

    Raises:
        DataError: the share is not in (0, 1), or a class is too small to have an image on both sides.
    """
    if not 0 < share < 1:
        raise DataError(f"data.{name}={share} must be a share between 0 and 1, and data.heldout + data.test below 1.")
    drawn: list[int] = []
    kept: list[int] = []
    for label in images.labels.unique().tolist():
        indices = (images.labels == label).nonzero().flatten()
        order = indices[torch.randperm(len(indices), generator=generator(seed, name, label))].tolist()
        count = max(1, round(share * len(order)))
        if count >= len(order):
            raise DataError(
                f"A class below {images.root} has {len(order)} image(s): too few to draw a {name} split from it. Add "
                f"images, or provide the split as a folder ({images.root}/train, …/heldout, …/test)."
            )
        drawn += order[:count]
        kept += order[count:]

    def pick(indices: list[int]) -> FileImages:
        return FileImages(images.root, [images.files[i] for i in indices], [int(images.labels[i]) for i in indices])

    return pick(sorted(drawn)), pick(sorted(kept))
