"""Labelled images: where they come from, how they are corrupted and augmented, and how they become a model's input."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transform

from soups.errors import ConfigError, DataError, did_you_mean
from soups.seeding import derive_seed, generator
from soups.stores.files import fingerprint, sha256_file
from soups.tasks.data import Batch, Input, Keys, Samples, Splits


class Images(Samples):
    """A sequence of labelled images."""

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Return image `index` as uint8 (3, H, W)."""


class TensorImages(Images):
    """Images in memory: uint8 (N, 1 or 3, H, W), labels int64 (N,)."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def image(self, index: int) -> Tensor:
        """Return image `index`; a grey one gets three equal channels."""
        return self.images[index].expand(3, -1, -1)

    def digest(self) -> str:
        """Hash every byte."""
        content = hashlib.sha256(self.images.contiguous().numpy().tobytes())
        content.update(self.labels.numpy().tobytes())
        return content.hexdigest()

    def identities(self) -> list[str]:
        """Hash the pixels of each image."""
        return [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest() for image in self.images]

    def take(self, indices: Tensor) -> TensorImages:
        """Return the images at `indices`, int64 (M,)."""
        return TensorImages(self.images[indices], self.labels[indices])


def each_once(images: TensorImages) -> TensorImages:
    """Return images without copies, in their order; one that stands there with two labels is left out."""
    first: dict[str, int] = {}
    unclear: set[str] = set()
    for number, identity in enumerate(images.identities()):
        at = first.setdefault(identity, number)
        if int(images.labels[at]) != int(images.labels[number]):
            unclear.add(identity)
    return images.take(torch.tensor([number for identity, number in first.items() if identity not in unclear]))


class FileImages(Images):
    """Images in files, decoded when asked for. The digest covers relative names, sizes and labels, not the pixels."""

    def __init__(self, root: Path, files: Sequence[Path], labels: Sequence[int]) -> None:
        self.root = root
        self.files = list(files)
        self.labels = torch.tensor(list(labels), dtype=torch.int64)

    def image(self, index: int) -> Tensor:
        """Decode image `index`.

        Raises:
            DataError: the file is absent, truncated or no image.
        """
        from PIL import Image, UnidentifiedImageError

        path = self.files[index]
        try:
            with Image.open(path) as picture:
                return transform.pil_to_tensor(picture.convert("RGB"))
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise DataError(
                f"Cannot read the image {path}: {error}. Replace or remove the file, and run the same command again; "
                f"finished ingredients are kept unless the list of files changes."
            ) from error

    def digest(self) -> str:
        """Hash names, sizes and labels."""
        rows = [
            [file.relative_to(self.root).as_posix(), file.stat().st_size, label]
            for file, label in zip(self.files, self.labels.tolist(), strict=True)
        ]
        return fingerprint(rows)

    def identities(self) -> list[str]:
        """Hash the bytes of each file."""
        return [sha256_file(file) for file in self.files]

    def take(self, indices: Tensor) -> FileImages:
        """Return the images at `indices`, int64 (M,)."""
        chosen = indices.tolist()
        return FileImages(self.root, [self.files[index] for index in chosen], self.labels[indices].tolist())


def _noise(image: Tensor, severity: int, source: torch.Generator) -> Tensor:
    values = image.float() + 255 * 0.05 * severity * torch.randn(image.shape[-2:], generator=source)
    return values.round().clamp(0, 255).to(torch.uint8)


def _rotation(image: Tensor, severity: int, source: torch.Generator) -> Tensor:
    sign = 1.0 if torch.rand((), generator=source) < 0.5 else -1.0
    return transform.rotate(image, sign * 8.0 * severity, interpolation=v2.InterpolationMode.BILINEAR)


def _blur(image: Tensor, severity: int, source: torch.Generator) -> Tensor:
    del source
    sigma = 0.4 * severity * max(image.shape[-2:]) / 28
    return transform.gaussian_blur(image, [2 * int(3 * sigma) + 3] * 2, [sigma, sigma])


def _contrast(image: Tensor, severity: int, source: torch.Generator) -> Tensor:
    del source
    return transform.adjust_contrast(image, (1.0, 0.8, 0.6, 0.45, 0.3, 0.2)[severity])


def _pixelate(image: Tensor, severity: int, source: torch.Generator) -> Tensor:
    del source
    size = list(image.shape[-2:])
    small = [max(2, round(side * (1.0, 0.6, 0.5, 0.4, 0.3, 0.25)[severity])) for side in size]
    return transform.resize(transform.resize(image, small, antialias=True), size)


CORRUPTIONS = {
    "noise": _noise,
    "blur": _blur,
    "rotation": _rotation,
    "contrast": _contrast,
    "pixelate": _pixelate,
}


class CorruptedImages(Images):
    """Another set's images under a corruption, after ImageNet-C (arXiv:1903.12261): the same pixels on every run.

    Args:
        source: the clean images.
        kind: one of `CORRUPTIONS`.
        severity: 1 (mild) to 5.
        seed: for the corruptions that are random.

    Raises:
        DataError: an unknown kind, or a severity outside 1 to 5.
    """

    def __init__(self, source: Images, kind: str, severity: int = 3, seed: int = 0) -> None:
        if kind not in CORRUPTIONS:
            raise DataError(f"There is no corruption {kind!r}: {did_you_mean(kind, CORRUPTIONS)}")
        if not 1 <= severity <= 5:
            raise DataError(f"The severity of corruption {kind!r} is {severity}; it must be 1, 2, 3, 4 or 5.")
        self.source, self.kind, self.severity, self.seed = source, kind, severity, seed
        self.labels = source.labels

    def image(self, index: int) -> Tensor:
        """Return the corrupted image `index`."""
        random = generator(self.seed, "corruption", self.kind, index)
        return CORRUPTIONS[self.kind](self.source.image(index), self.severity, random)

    def digest(self) -> str:
        """Hash the source's digest and the corruption's settings."""
        return fingerprint([self.source.digest(), self.kind, self.severity, self.seed])

    def identities(self) -> list[str]:
        """Return the source's identities with the corruption's settings."""
        return [f"{one} {self.kind} {self.severity} {self.seed}" for one in self.source.identities()]

    def take(self, indices: Tensor) -> CorruptedImages:
        """Refuse: what is random in a corruption depends on an image's place in its source.

        Raises:
            DataError: always.
        """
        raise DataError("Part of a corrupted split cannot be taken: take part of its source, and corrupt that.")


def with_corruptions(splits: Splits, kinds: Sequence[str], severity: int, seed: int) -> Splits:
    """Return `splits` with a corrupted copy of the test split for each of `kinds` among the OOD splits."""
    test = splits.test
    if not isinstance(test, Images):
        raise DataError(f"Only images can be corrupted; the test split holds {type(test).__name__}.")
    corrupted = {kind: CorruptedImages(test, kind, severity, seed) for kind in kinds}
    return Splits(splits.train, splits.heldout, splits.test, splits.classes, {**splits.ood, **corrupted})


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image.

    Attributes:
        num_ops, magnitude: RandAugment (arXiv:1909.13719): operations an image, and strength on torchvision's 0–30 scale.
        min_crop: smallest share of the area that a random crop keeps; 1 means no cropping.
        flip: mirror half of the images left to right.
    """

    num_ops: int = 0
    magnitude: int = 0
    min_crop: float = 1.0
    flip: bool = False

    def transform(self, size: int) -> v2.Compose:
        """Return the transform for images of `size` pixels a side."""
        steps: list[torch.nn.Module] = []
        if self.min_crop < 1:
            steps.append(v2.RandomResizedCrop(size, scale=(self.min_crop, 1.0), antialias=True))
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        if self.num_ops and self.magnitude:
            interpolation = v2.InterpolationMode.BILINEAR
            steps.append(v2.RandAugment(self.num_ops, self.magnitude, interpolation=interpolation))
        return v2.Compose([*steps, v2.Identity()])


class Batches(Dataset[Batch]):
    """Images as model input. Indexed by a list of (epoch, index), so that one call makes one batch.

    Each training image is augmented by a generator of its own, seeded by (seed, epoch, index): neither the number of
    loader workers nor the number of processes changes what the model sees.

    Args:
        images: the source.
        size: side of the square input in pixels.
        mean, std: normalisation by channel, for values in [0, 1].
        augmentation: for training; None for evaluation.
        seed: of the augmentation.
    """

    def __init__(
        self,
        images: Images,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.images, self.size, self.seed = images, size, seed
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)
        self._augment = augmentation.transform(size) if augmentation else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, keys: Keys) -> Batch:
        """Return float32 (B, 3, size, size) and int64 (B,)."""
        inputs = torch.stack([self._one(epoch, index) for epoch, index in keys])
        return inputs, self.images.labels[[index for _, index in keys]]

    def _one(self, epoch: int, index: int) -> Tensor:
        image = self.images.image(index)
        if self._augment is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(derive_seed(self.seed, "augment", epoch, index))
                image = self._augment(image)
        if image.shape[-2:] != (self.size, self.size):
            image = transform.center_crop(transform.resize(image, [self.size], antialias=True), [self.size, self.size])
        return (image.float() / 255 - self.mean) / self.std


@dataclass(frozen=True)
class ImageInput(Input):
    """Float images (B, 3, size, size), normalised.

    Attributes:
        mean, std: by channel, for values in [0, 1].
    """

    mean: Sequence[float]
    std: Sequence[float]

    def dataset(
        self, samples: Samples, size: int, augment: Mapping[str, Any] | None = None, seed: int = 0
    ) -> Dataset[Batch]:
        """Return images of `size` pixels a side; `augment` holds the fields of `Augmentation`."""
        if not isinstance(samples, Images):
            raise ConfigError(
                f"This model reads images, but the data are {type(samples).__name__}: choose another model=… or data=…"
            )
        augmentation = None if augment is None else Augmentation(**augment)
        return Batches(samples, size, self.mean, self.std, augmentation, seed)
