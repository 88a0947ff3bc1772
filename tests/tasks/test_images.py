"""Splits do not overlap, batches do not depend on workers or ranks, corruptions are fixed, bad images are named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from soups.errors import DataError
from soups.tasks.data import OrderedBatches, ShuffledBatches
from soups.tasks.image_domains import image_domains
from soups.tasks.image_folder import image_folder
from soups.tasks.images import (
    CORRUPTIONS,
    Augmentation,
    Batches,
    CorruptedImages,
    TensorImages,
)

MEAN = STD = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def images() -> TensorImages:
    bunch = load_digits()
    pixels = torch.from_numpy((bunch.images * 15).astype(np.uint8))[:40, None]
    return TensorImages(pixels, torch.from_numpy(bunch.target[:40]).long())


def write_folder(root: Path, counts: dict[str, int]) -> Path:
    bunch = load_digits()
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        label = int(name.rpartition("/")[2])
        for number, picture in enumerate(bunch.images[bunch.target == label][:count]):
            Image.fromarray((picture * 15).astype(np.uint8)).resize((16, 16)).save(root / name / f"{number}.png")
    return root


def test_normalisation_is_the_formula(images: TensorImages) -> None:
    inputs, labels = Batches(images, 8, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))[[(0, 3), (0, 1)]]
    pixel = images.images[3, 0, 4, 4].item() / 255
    expected = [(pixel - mean) / std for mean, std in ((0.1, 0.5), (0.2, 0.6), (0.3, 0.7))]
    assert inputs[0, :, 4, 4].tolist() == pytest.approx(expected)
    assert labels.tolist() == [images.labels[3].item(), images.labels[1].item()]


def test_augmentation_depends_on_seed_epoch_and_index_only(images: TensorImages) -> None:
    augmentation = Augmentation(num_ops=2, magnitude=15, min_crop=0.6, flip=True)

    def batch(keys: list[tuple[int, int]], seed: int = 0) -> torch.Tensor:
        return Batches(images, 16, MEAN, STD, augmentation, seed)[keys][0]

    alone, among = batch([(1, 5)])[0], batch([(1, 2), (1, 5), (1, 7)])[1]
    assert torch.equal(alone, among)
    assert not torch.equal(alone, batch([(2, 5)])[0]) and not torch.equal(alone, batch([(1, 5)], seed=1)[0])
    state = torch.random.get_rng_state()
    batch([(1, 5)])
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is left as it was"


def test_workers_do_not_change_what_the_model_sees(images: TensorImages) -> None:
    def epoch(workers: int) -> list[torch.Tensor]:
        dataset = Batches(images, 8, MEAN, STD, Augmentation(1, 10), 3)
        sampler = ShuffledBatches(len(dataset), 16, seed=3)
        sampler.set_epoch(1)
        return [inputs for inputs, _ in DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=workers)]

    assert all(torch.equal(one, two) for one, two in zip(epoch(0), epoch(2), strict=True))


@settings(deadline=None)
@given(length=st.integers(8, 100), batch=st.integers(4, 40), world=st.integers(1, 4), epoch=st.integers(0, 3))
def test_ranks_share_each_global_training_batch(length: int, batch: int, world: int, epoch: int) -> None:
    def of(rank: int, world: int) -> list[list[tuple[int, int]]]:
        sampler = ShuffledBatches(length, batch, 7, rank, world)
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler))
        return list(sampler)

    single = of(0, 1)
    parts = [of(rank, world) for rank in range(world)]
    for number, whole in enumerate(single):
        assert sorted(key for part in parts for key in part[number]) == sorted(whole)
    seen = [index for whole in single for _, index in whole]
    assert len(set(seen)) == len(seen) and all(key[0] == epoch for whole in single for key in whole)


@settings(deadline=None)
@given(length=st.integers(1, 200), batch=st.integers(1, 50), world=st.integers(1, 5))
def test_evaluation_counts_every_sample_once(length: int, batch: int, world: int) -> None:
    parts = [list(OrderedBatches(length, batch, rank, world)) for rank in range(world)]
    seen = sorted(index for part in parts for keys in part for _, index in keys)
    assert seen == list(range(length))
    assert all(len(keys) <= max(batch, 2) for part in parts for keys in part)
    if length >= world:
        assert len({len(part) for part in parts}) == 1, "ranks must stay in step"


def test_a_batch_smaller_than_the_devices() -> None:
    with pytest.raises(DataError, match="there are 4 devices: raise it to at least 4"):
        ShuffledBatches(100, 2, 0, 0, 4)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_are_fixed_and_grow(images: TensorImages, kind: str) -> None:
    distance = []
    images = TensorImages(torch.nn.functional.interpolate(images.images, 28), images.labels)
    for severity in (1, 3, 5):
        corrupted = CorruptedImages(images, kind, severity, seed=1)
        assert torch.equal(corrupted.image(4), CorruptedImages(images, kind, severity, seed=1).image(4))
        assert corrupted.image(4).dtype == torch.uint8 and corrupted.image(4).shape == (3, 28, 28)
        change = [(corrupted.image(i).float() - images.image(i).float()).abs().mean() for i in range(20)]
        distance.append(float(torch.stack(change).mean()))
    assert 0 < distance[0] < distance[2]
    assert corrupted.digest() != images.digest()


def test_unknown_corruption_and_severity(images: TensorImages) -> None:
    with pytest.raises(DataError, match="did you mean 'blur'"):
        CorruptedImages(images, "blurr")
    with pytest.raises(DataError, match="must be 1, 2, 3, 4 or 5"):
        CorruptedImages(images, "blur", 6)


def test_an_unsplit_folder_is_split_by_class_without_overlap(tmp_path: Path) -> None:
    write_folder(tmp_path, {"0": 20, "1": 10})
    splits = image_folder(str(tmp_path), heldout=0.2, test=0.3)
    files = [set(part.files) for part in (splits.train, splits.heldout, splits.test)]  # type: ignore[attr-defined]
    assert [len(part) for part in files] == [15, 6, 9]
    assert len(set.union(*files)) == 30
    assert splits.heldout.labels.bincount().tolist() == [4, 2] and splits.test.labels.bincount().tolist() == [6, 3]
    again = image_folder(str(tmp_path), heldout=0.2, test=0.3)
    assert again.hash() == splits.hash()
    assert image_folder(str(tmp_path), 0.2, 0.3, split_seed=1).hash() != splits.hash()
    assert splits.classes == ("0", "1") and set(splits.ood) == {"blur", "rotation", "noise"}


def test_a_split_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/0": 6, "train/1": 6, "val/0": 2, "val/1": 2, "ood_scan/0": 3, "ood_scan/1": 3})
    splits = image_folder(str(tmp_path), test=0.3, corruptions=[])
    assert (len(splits.train), len(splits.heldout), len(splits.test)) == (8, 4, 4)
    assert list(splits.reported()) == ["test", "ood_scan"]


def test_mistakes_in_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        image_folder(str(tmp_path / "absent"))
    with pytest.raises(DataError, match="holds 0 class folders"):
        image_folder(str(tmp_path))
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        image_folder(str(tmp_path))
    write_folder(tmp_path / "few", {"0": 1, "1": 5})
    with pytest.raises(DataError, match=r"has 1 image\(s\): too few"):
        image_folder(str(tmp_path / "few"))
    write_folder(tmp_path / "odd", {"train/0": 5, "train/1": 5, "test/2": 2})
    with pytest.raises(DataError, match="classes that the train split lacks: 2"):
        image_folder(str(tmp_path / "odd"))


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"0": 5, "1": 5})
    splits = image_folder(str(tmp_path), corruptions=[])
    broken = splits.train.files[2]  # type: ignore[attr-defined]
    broken.write_bytes(broken.read_bytes()[:30])
    with pytest.raises(DataError, match=f"Cannot read the image {broken}"):
        Batches(splits.train, 16, MEAN, STD)[[(0, 2)]]


def test_the_split_hash_covers_what_selects_and_not_what_reports(tmp_path: Path) -> None:
    write_folder(tmp_path, {"0": 10, "1": 10})
    first, second = image_folder(str(tmp_path)), image_folder(str(tmp_path), corruptions=["noise"])
    assert first.hash() == second.hash()


def test_one_domain_is_left_out_and_the_others_are_split_each(tmp_path: Path) -> None:
    counts = {
        f"{domain}/{label}": size for domain, size in (("art", 10), ("photo", 20), ("sketch", 6)) for label in (0, 1)
    }
    root = write_folder(tmp_path / "domains", counts)
    splits = image_domains(str(root), leave_out="sketch")
    assert splits.classes == ("0", "1") and list(splits.ood) == ["sketch"]
    assert len(splits.ood["sketch"]) == 12
    sizes = {"train": splits.train, "heldout": splits.heldout, "test": splits.test}
    assert {name: len(part) for name, part in sizes.items()} == {"train": 36, "heldout": 12, "test": 12}
    names = [
        {file.relative_to(root).as_posix() for file in part.files} for part in (*sizes.values(), splits.ood["sketch"])
    ]
    assert sum(map(len, names)) == len(set.union(*names)) == 72, "no image is in two splits"
    assert all(name.startswith(("art/", "photo/")) for part in names[:3] for name in part)
    assert sum(name.startswith("art/") for name in names[1]) == 4, "each domain gives its share"
    assert image_domains(str(root), leave_out="sketch").hash() == splits.hash()
    assert image_domains(str(root), leave_out="sketch", split_seed=1).hash() != splits.hash()
    with pytest.raises(DataError, match="did you mean 'sketch'"):
        image_domains(str(root), leave_out="skech")
    (root / "art" / "2").mkdir()
    with pytest.raises(DataError, match="art and photo have different classes: 2"):
        image_domains(str(root), leave_out="sketch")
    alone = write_folder(tmp_path / "alone", {"art/0": 5, "art/1": 5})
    with pytest.raises(DataError, match="nothing is left to train on"):
        image_domains(str(alone), leave_out="art")
