"""Images of several domains with one left out: DomainBed's setting, as held-out selection and an OOD split."""

from __future__ import annotations

from pathlib import Path

from soups.errors import DataError, did_you_mean
from soups.tasks.data import Splits
from soups.tasks.image_folder import draw_share, read_classes, read_images
from soups.tasks.images import FileImages


def image_domains(
    root: str,
    leave_out: str,
    heldout: float = 0.2,
    test: float = 0.2,
    split_seed: int = 0,
) -> Splits:
    """Return images below `root/<domain>/<class>/<image>` as a task that generalises to a domain it never saw.

    Each other domain is split at random, by class, into train, held-out and test; their parts are put together. Selection
    therefore sees the training domains alone, as in DiWA (arXiv:2205.09739) and DomainBed (arXiv:2007.01434, "training-
    domain validation"). The domain that is left out is the only OOD split, whole, under its own name.

    Args:
        root: the folder of domains, all with the same classes.
        leave_out: the domain to generalise to.
        heldout, test: shares of each class in each other domain.
        split_seed: of the random split.

    Raises:
        DataError: no such folder or domain, fewer than two domains, or classes that differ between domains.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"data.root={root} is not a folder. Give the folder that holds one folder a domain.")
    domains = sorted(place.name for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
    if leave_out not in domains:
        raise DataError(
            f"data.leave_out={leave_out}: there is no such domain below {root}; {did_you_mean(leave_out, domains)}"
        )
    seen = [name for name in domains if name != leave_out]
    if not seen:
        raise DataError(f"{root} has the domain {leave_out} alone: nothing is left to train on.")
    classes = read_classes(folder / seen[0])
    parts: dict[str, list[FileImages]] = {"train": [], "heldout": [], "test": []}
    for name in seen:
        if (other := read_classes(folder / name)) != classes:
            raise DataError(
                f"The domains {seen[0]} and {name} have different classes: "
                f"{', '.join(sorted(set(classes) ^ set(other)))}. All domains need the same class folders."
            )
        rest = read_images(folder / name, classes)
        drawn, rest = draw_share(rest, heldout, split_seed, "heldout")
        parts["heldout"].append(drawn)
        drawn, rest = draw_share(rest, test / (1 - heldout), split_seed, "test")
        parts["test"].append(drawn)
        parts["train"].append(rest)
    together = {name: _together(folder, found) for name, found in parts.items()}
    shifted = read_images(folder / leave_out, classes)
    return Splits(together["train"], together["heldout"], together["test"], tuple(classes), {leave_out: shifted})


def _together(root: Path, parts: list[FileImages]) -> FileImages:
    files = [file for part in parts for file in part.files]
    return FileImages(root, files, [label for part in parts for label in part.labels.tolist()])
