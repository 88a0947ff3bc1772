"""The repository: pushes, rounds, strangers and damage; every result against a closed form."""

import json
from pathlib import Path

import pytest
import torch

from soups.errors import ConfigError, StorageError, WeightsError
from soups.protocols.cold_fusion import Policy, Repository, replay
from soups.stores import write_safetensors
from soups.stores.tokenizer import tokenizer_hash
from tests.tiny_text import tokenizer


def model(value: float = 0.0, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    encoder = {
        "embed.weight": torch.ones(5, 3),
        "layer.weight": torch.full((4, 3), value),
        "layer.bias": torch.zeros(4),
    }
    return {**encoder, "position_ids": torch.arange(7), **more}


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "repo") if request.param == "folder" else f"memory://{tmp_path.name}-{id(request)}/repo"


def make(url: str, **policy) -> Repository:
    return Repository.create(url, model(), Policy(**{"quorum": 2, "max_norm": None, **policy}), frozen=["embed.*"])


def test_a_round_is_the_mean_of_the_pushed_weights_and_heads_stay_at_home(url: str) -> None:
    repository = make(url)
    base, weights = repository.pull()
    assert base.number == 0 and set(weights) == set(model())
    one = repository.push(model(1.0, **{"head.weight": torch.ones(2, 4)}), base, "alice", {"task": "two classes"})
    assert repository.fuse() is None, "one contribution is below the quorum"
    repository.push(model(4.0, **{"head.weight": torch.ones(9, 4)}), 0, "bob")
    assert {record.contributor for record in repository.pending()} == {"alice", "bob"}
    record = repository.fuse()
    assert record is not None and record.number == 1 and repository.pending() == []
    after, weights = Repository(url).pull()
    assert after.number == 1 and set(weights) == set(model()), "no head has got in"
    assert torch.equal(weights["layer.weight"], torch.full((4, 3), 2.5))
    assert torch.equal(weights["embed.weight"], torch.ones(5, 3)) and weights["position_ids"].dtype == torch.int64
    assert repository.fuse() is None, "nothing is counted twice"
    assert torch.equal(repository.pull(0)[1]["layer.weight"], torch.zeros(4, 3))
    assert repository.pushed()[[r.id for r in repository.pushed()].index(one.id)].note == {"task": "two classes"}
    assert [(r.number, r.same, r.accepted) for r in replay(repository)] == [(1, True, 2)]


def test_the_same_push_twice_is_one_contribution(url: str) -> None:
    repository = make(url)
    first, second = (repository.push(model(1.0), 0, "alice") for _ in range(2))
    assert first == second and len(repository.pushed()) == 1
    assert repository.push(model(1.0), 0, "bob").id != first.id


def test_float64_sums_in_one_order_whatever_the_order_of_arrival(tmp_path: Path) -> None:
    """Values whose float32 sum depends on the order: the fused base is the correctly rounded mean."""
    values = [1e8, 1.0, -1e8, 3.0, 1e-3]
    exact = torch.tensor(values, dtype=torch.float32).double().mean().float()
    hashes = set()
    for number, order in enumerate(([0, 1, 2, 3, 4], [4, 2, 0, 1, 3])):
        repository = make(str(tmp_path / str(number)), quorum=5)
        for index in order:
            repository.push(model(values[index]), 0, f"contributor {index}")
        record = repository.fuse()
        assert record is not None
        hashes.add(record.result)
        assert torch.equal(repository.pull()[1]["layer.weight"], torch.full((4, 3), float(exact)))
    assert len(hashes) == 1


def test_a_stale_contribution_is_rebased_or_refused(tmp_path: Path) -> None:
    for stale, expected in (("rebase", 10.0 + (2.0 + 3.0) / 2), ("refuse", None)):
        repository = make(str(tmp_path / stale), stale=stale)
        repository.push(model(10.0), 0, "a")
        repository.push(model(10.0), 0, "b")
        assert repository.fuse() is not None
        repository.push(model(2.0), 0, "late")  # an update of +2 on base 0
        repository.push(model(13.0), 1, "fresh")  # an update of +3 on base 1
        record = repository.fuse()
        if expected is None:
            assert record is None and len(repository.pending()) == 2
            repository.push(model(15.0), 1, "fresh too")
            record = repository.fuse()
            assert record is not None
            refused = [verdict for verdict in record.verdicts if not verdict.accepted]
            assert [(v.contributor, v.reason) for v in refused] == [("late", "stale: it started 1 rounds ago")]
            expected = (13.0 + 15.0) / 2
        assert torch.equal(repository.pull()[1]["layer.weight"], torch.full((4, 3), expected))
        assert all(result.same for result in replay(repository))
    repository = make(str(tmp_path / "age"), max_age=0, quorum=1)
    repository.push(model(1.0), 0, "a")
    repository.fuse()
    repository.push(model(1.5), 0, "b")
    repository.push(model(1.0), 1, "c")
    record = repository.fuse()
    assert record is not None and "0 are allowed" in next(v.reason for v in record.verdicts if v.contributor == "b")


def test_a_round_of_one_contribution_is_that_contribution(url: str) -> None:
    """Both are one object, whatever order their tensors came in: the round must not write over the push."""
    start = {f"{'zyx'[number]}.{'w' * (number + 1)}": torch.full((40**number,), 1.0) for number in range(3)}
    repository = Repository.create(url, start, Policy(quorum=1))
    pushed = repository.push({name: tensor + 1 for name, tensor in start.items()}, 0, "a")
    record = repository.fuse()
    assert record is not None and record.result == pushed.weights
    assert repository.folder.size(f"objects/{record.result}.safetensors") == pushed.nbytes
    assert [result.same for result in replay(repository)] == [True]


def test_strangers_are_told_what_does_not_fit(url: str, tmp_path: Path) -> None:
    repository = make(url)
    bigger = {**model(), "layer.weight": torch.zeros(8, 3)}
    with pytest.raises(WeightsError, match=r"'layer.weight' has shape \(8, 3\), \(4, 3\) was expected"):
        repository.push(bigger, 0, "x")
    with pytest.raises(WeightsError, match=r"'layer.bias' is BF16, F32 was expected"):
        repository.push({name: t.bfloat16() if t.is_floating_point() else t for name, t in model().items()}, 0, "x")
    with pytest.raises(WeightsError, match=r"'embed.weight' is frozen .*another vocabulary"):
        repository.push({**model(), "embed.weight": torch.ones(6, 3)}, 0, "x")
    with pytest.raises(WeightsError, match=r"'embed.weight' is frozen"):
        repository.push({**model(), "embed.weight": torch.zeros(5, 3)}, 0, "x")
    with pytest.raises(WeightsError, match="2 of 2 tensors are missing"):
        repository.push({f"bert.{name}": tensor for name, tensor in model().items()}, 0, "x")
    assert (
        repository.push({f"bert.{name}": t for name, t in model(1.0).items()}, 0, "x", prefix="bert.").contributor
        == "x"
    )
    with pytest.raises(WeightsError, match="non-finite"):
        repository.push(model(float("nan")), 0, "x")
    with pytest.raises(StorageError, match="never had the base 7; it has 0 to 0"):
        repository.push(model(), 7, "x")
    assert len(repository.pushed()) == 1
    with pytest.raises(StorageError, match="no base 3"):
        repository.pull(3)
    with pytest.raises(StorageError, match="soups cold init"):
        Repository(str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match="did you mean 'median'"):
        Repository.create(str(tmp_path / "other"), model(), Policy(method="medain"))
    with pytest.raises(StorageError, match="another repository: its policy differ"):
        make(url, quorum=3)
    assert make(url).manifest == repository.manifest, "the same again opens it"


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    for name, vocabulary in (("base", "a b c"), ("same", "a b c"), ("other", "c b a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(vocabulary))
        write_safetensors(tmp_path / name / "model.safetensors", model())
    repository = Repository.create(tmp_path / "repo", tmp_path / "base")
    assert repository.push(tmp_path / "same", 0, "x").contributor == "x"
    with pytest.raises(WeightsError, match="another tokenizer"):
        repository.push(tmp_path / "other", 0, "x")
    (tmp_path / "other" / "tokenizer.json").write_text('{"vocab": ')
    with pytest.raises(StorageError, match=r"tokenizer\.json is no JSON .* damaged"):
        repository.push(tmp_path / "other", 0, "x")


def test_a_tokenizer_that_was_used_is_still_the_same(tmp_path: Path) -> None:
    """Fast tokenizers save how they last padded and cut; that changes no token's id, another vocabulary does."""
    fast = tokenizer(tmp_path / "base")
    fast(["a film", "good"], padding=True, truncation=True, max_length=4)
    fast.save_pretrained(tmp_path / "used")
    files = [(tmp_path / name / "tokenizer.json").read_text() for name in ("base", "used")]
    assert files[0] != files[1] and tokenizer_hash(tmp_path / "base") == tokenizer_hash(tmp_path / "used")
    fast.add_tokens(["plots"])
    fast.save_pretrained(tmp_path / "more")
    assert tokenizer_hash(tmp_path / "more") != tokenizer_hash(tmp_path / "base")
    assert tokenizer_hash(tmp_path) is None


def test_pushes_from_any_training_code(tmp_path: Path) -> None:
    """A Lightning checkpoint with a prefix, a plain .pt, a safetensors file."""
    repository = make(str(tmp_path / "repo"), quorum=3)
    torch.save({"state_dict": {f"model.{n}": t for n, t in model(1.0).items()}, "epoch": 3}, tmp_path / "last.ckpt")
    torch.save(model(2.0), tmp_path / "weights.pt")
    write_safetensors(tmp_path / "weights.safetensors", model(6.0))
    repository.push(tmp_path / "last.ckpt", 0, "lightning", prefix="model.")
    repository.push(tmp_path / "weights.pt", 0, "torch")
    repository.push(tmp_path / "weights.safetensors", 0, "safetensors")
    assert repository.fuse() is not None
    assert torch.equal(repository.pull()[1]["layer.weight"], torch.full((4, 3), 3.0))


def test_a_push_cut_off_half_way_is_no_push_and_can_be_repeated(tmp_path: Path) -> None:
    repository = make(str(tmp_path / "repo"))
    objects = tmp_path / "repo" / "objects"
    before = set(objects.iterdir())
    repository.push(model(1.0), 0, "a")
    (pushed,) = set(objects.iterdir()) - before
    whole = pushed.read_bytes()
    # Cut off while the weights were written, before the record: what a killed process leaves on storage without renames.
    (record,) = (tmp_path / "repo" / "pushed").iterdir()
    record.unlink()
    pushed.write_bytes(whole[:100])
    assert repository.pending() == []
    repository.push(model(1.0), 0, "a")
    assert pushed.read_bytes() == whole and len(repository.pending()) == 1
    # Damaged after it was pushed: it is refused with the reason, and holds nobody up.
    repository.push(model(2.0), 0, "b")
    repository.push(model(4.0), 0, "c")
    pushed.write_bytes(whole[:-4])
    record = repository.fuse()
    assert record is not None
    assert {v.contributor: v.accepted for v in record.verdicts} == {"a": False, "b": True, "c": True}
    assert "bytes" in next(v.reason for v in record.verdicts if v.contributor == "a")
    assert torch.equal(repository.pull()[1]["layer.weight"], torch.full((4, 3), 3.0))
    # Of the same size, but altered.
    repository.push(model(5.0), 1, "d")
    changed = max(objects.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    changed.write_bytes(changed.read_bytes()[:-4] + b"\0\0\1\0")
    repository.push(model(6.0), 1, "e")
    repository.push(model(8.0), 1, "f")
    record = repository.fuse()
    assert record is not None and "altered" in next(v.reason for v in record.verdicts if v.contributor == "d")


def test_two_fusers_at_once_make_one_round(url: str) -> None:
    """The second has read everything before the first commits: its record cannot be created."""
    repository, rival = make(url), Repository(url)
    for number in range(3):
        repository.push(model(float(number)), 0, str(number))
    create, raced = rival.folder.create, []

    def slow(name: str, content: bytes) -> bool:
        if name.startswith("rounds/") and not raced:
            raced.append(name)
            repository.push(model(9.0), 0, "late")
            assert repository.fuse(fuser="first") is not None
        return create(name, content)

    rival.folder.create = slow  # type: ignore[method-assign]
    assert rival.fuse(fuser="second") is None
    (record,) = repository.rounds()
    assert record.fuser == "first" and len(record.accepted) == 4 and repository.pending() == []
    assert all(result.same for result in replay(repository))


def test_replay_finds_what_was_tampered_with(tmp_path: Path) -> None:
    repository = make(str(tmp_path / "repo"))
    for start in range(2):
        for number in range(2):
            repository.push(model(start + number + 1.0), start, str(number))
        assert repository.fuse() is not None
    assert [result.same for result in replay(repository)] == [True, True]
    assert [result.number for result in replay(repository, 2)] == [2]
    with pytest.raises(StorageError, match="no round 3"):
        list(replay(repository, 3))
    path = tmp_path / "repo" / "rounds" / "000001.json"
    content = json.loads(path.read_text())
    content["verdicts"][0]["scale"] = 0.5
    path.write_text(json.dumps(content))
    assert [result.same for result in replay(repository)] == [False, True]
    path.unlink()
    with pytest.raises(StorageError, match="not whole at round 1"):
        repository.rounds()


def test_damaged_records_name_the_file(tmp_path: Path) -> None:
    repository = make(str(tmp_path / "repo"))
    repository.push(model(1.0), 0, "a")
    (record,) = (tmp_path / "repo" / "pushed").iterdir()
    record.write_text(record.read_text()[:20])
    with pytest.raises(StorageError, match=f"{record.name} is not a whole record"):
        repository.pending()


def test_tied_weights_stay_tied_through_rounds(url: str, tmp_path: Path) -> None:
    """One tensor under two names is one tensor in every base, whether updates are rebased or taken as they are."""

    def tied(value: float) -> dict[str, torch.Tensor]:
        weights = {"embed.weight": torch.full((5, 3), value), "layer.weight": torch.full((4, 3), value)}
        return {**weights, "head.weight": weights["embed.weight"]}

    repository = Repository.create(url, tied(0.0), Policy(quorum=2, max_norm=None))
    for number, (one, two) in enumerate([(1.0, 3.0), (4.0, 8.0)]):
        write_safetensors(tmp_path / "one.safetensors", tied(one))
        repository.push(str(tmp_path / "one.safetensors"), 0, "alice")
        repository.push(tied(two), number, "bob")
        assert repository.fuse() is not None
        _, weights = Repository(url).pull()
        assert weights["head.weight"] is weights["embed.weight"], f"round {number + 1}"
    assert torch.equal(weights["embed.weight"], torch.full((5, 3), (2.0 + 4.0 + 8.0) / 2)), "alice's is rebased by 2"
    assert all(row.same for row in replay(repository))
