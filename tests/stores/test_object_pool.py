"""The pool on an object store: moto's S3 server on loopback, read and written through s3fs as a real one is."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from soups.errors import StorageError
from soups.stores.pool import Pool
from soups.stores.records import Failure, Ingredient
from soups.stores.shared import SharedFolder
from soups.weights import hash_weights
from tests.stores.s3 import bucket_url, s3_server

__all__ = ["bucket_url", "s3_server"]  # fixtures

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.count": torch.tensor(3)}


def record(letter: str = "a") -> Ingredient:
    metrics = {"heldout": {"accuracy": 0.5}}
    return Ingredient(fingerprint=letter * 64, determinants={"lr": 0.1}, metrics=metrics)


@pytest.fixture
def other_machine(bucket_url: str) -> Iterator[Pool]:
    """The same pool, through a client that shares nothing with the first one."""
    pool = Pool(bucket_url)
    fsspec.filesystem("s3").clear_instance_cache()
    yield Pool(bucket_url)
    assert pool.url == bucket_url


def test_an_ingredient_comes_back_as_it_went_in(bucket_url: str, other_machine: Pool) -> None:
    pool = Pool(bucket_url)
    assert pool.ingredients() == [] and "a" * 64 not in pool
    pool.check_writable()
    added = pool.add(record(), WEIGHTS)
    assert other_machine.ingredients() == [added], "seen from another client at once, without a stale listing"
    found = other_machine.weights(added.fingerprint, verify=True)
    assert found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)
    assert pool.start("b" * 64) is None
    pool.add_start(record("b"), WEIGHTS)
    start = other_machine.start("b" * 64)
    assert start is not None and start[0].weights == added.weights


def test_failures_predictions_and_progress(bucket_url: str, other_machine: Pool) -> None:
    pool = Pool(bucket_url)
    pool.fail(Failure(fingerprint="a" * 64, error="diverged", determinants={}))
    failure = other_machine.failure("a" * 64)
    assert failure is not None and failure.error == "diverged"
    pool.add(record(), WEIGHTS)
    assert other_machine.failure("a" * 64) is None
    logits = torch.arange(6.0).reshape(3, 2)
    assert other_machine.predictions("w" * 64, "s" * 64) is None
    pool.add_predictions("w" * 64, "s" * 64, logits)
    stored = other_machine.predictions("w" * 64, "s" * 64)
    assert stored is not None and torch.equal(stored, logits)
    assert other_machine.progress("a" * 64) is None
    for step in (1, 2):
        pool.report_progress("a" * 64, {"step": step, "total": 4})
    assert other_machine.progress("a" * 64) == {"step": 2, "total": 4}
    pool.forget_progress("a" * 64)
    pool.forget_progress("a" * 64)
    assert other_machine.progress("a" * 64) is None


def test_two_machines_that_make_the_same_ingredient_cannot_mix(
    bucket_url: str, other_machine: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has looked before the other wrote; their bits differ, as on other hardware. One whole ingredient is kept."""
    first, second = Pool(bucket_url), other_machine
    ours, theirs = WEIGHTS, {**WEIGHTS, "layer.weight": WEIGHTS["layer.weight"] + 1e-6}
    create = SharedFolder.create

    def after_the_other(self: SharedFolder, name: str, content: bytes) -> bool:
        monkeypatch.setattr(SharedFolder, "create", create)
        second.add(record(), theirs)
        return create(self, name, content)

    monkeypatch.setattr(SharedFolder, "create", after_the_other)
    kept = first.add(record(), ours)
    assert kept.weights == hash_weights(theirs), "who creates the record first, exclusively, is whom the store keeps"
    assert hash_weights(first.weights("a" * 64, verify=True)) == kept.weights


@pytest.mark.parametrize("broken", ["put_file", "pipe_file"])
def test_a_storage_that_fails_half_way_leaves_no_ingredient(
    broken: str, bucket_url: str, other_machine: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(bucket_url)
    kept = pool.add(record("b"), WEIGHTS)

    def lost(*arguments: Any, **options: Any) -> None:
        raise ConnectionResetError("the connection was lost")

    monkeypatch.setattr(pool.folder.files, broken, lost)
    with pytest.raises(
        StorageError, match=rf"Cannot write the pool {bucket_url}.*the connection was lost.*same command"
    ):
        pool.add(record(), WEIGHTS)
    monkeypatch.undo()
    assert "a" * 64 not in other_machine and other_machine.ingredients() == [kept]
    pool.add(record(), WEIGHTS)
    assert {found.short[0] for found in other_machine.ingredients()} == {"a", "b"}
    other_machine.weights("a" * 64, verify=True)


def test_a_cut_off_object_is_named(bucket_url: str, other_machine: Pool) -> None:
    pool = Pool(bucket_url)
    added = pool.add(record(), WEIGHTS)
    path = f"{pool.folder.root}/ingredients/{added.fingerprint}/{added.file}"
    pool.folder.files.pipe_file(path, pool.folder.files.cat_file(path)[:-9])
    with pytest.raises(StorageError, match=r"bytes; \d+ were written. Remove the folder"):
        other_machine.weights(added.fingerprint)


def test_unreachable_and_unknown_places(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Pool("s3://no-such-bucket/pool")
    with pytest.raises(
        StorageError, match=r"Cannot write the pool s3://no-such-bucket/pool: .*run the same command again"
    ):
        missing.check_writable()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    silent = Pool("s3://bucket/elsewhere")
    silent.folder.files.retries = 1
    with pytest.raises(StorageError, match=r"Cannot read the pool s3://bucket/elsewhere: .*127\.0\.0\.1:9"):
        silent.ingredients()
    fsspec.filesystem("s3").clear_instance_cache()


def test_credentials_are_not_in_the_pool(bucket_url: str, tmp_path: Path) -> None:
    pool = Pool(bucket_url)
    pool.add(record(), WEIGHTS)
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    for path in pool.folder.files.find(str(pool.folder.root)):
        assert secret not in pool.folder.files.cat_file(path)
