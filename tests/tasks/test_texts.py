"""Texts: token batches, splits without overlap, files whose mistakes are named by line, real ratings, and the main job."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForSequenceClassification

from soups.errors import ConfigError, DataError
from soups.evaluation import forward, predict
from soups.launch.settings import open_pool
from soups.stores import read_safetensors
from soups.tasks.data import OrderedBatches, ShuffledBatches
from soups.tasks.images import ImageInput, TensorImages
from soups.tasks.news import news
from soups.tasks.probe import head_inputs
from soups.tasks.rated_texts import parse_ratings, rated_texts, sentiment
from soups.tasks.text_files import text_files
from soups.tasks.text_models import huggingface_text
from soups.tasks.texts import TextInput, Texts, Tokens, draw
from tests.devices import ACCELERATOR
from tests.launch.conftest import compose_settings, fine_tune, run_with, soup_of
from tests.tiny_text import sentences, tokenizer, write_bert, write_csv, write_gpt2


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords:  # those read downloads
        monkeypatch.setenv("SOUPS_CACHE", str(tmp_path / "cache"))


def test_a_batch_is_padded_to_its_longest_text() -> None:
    tokens = Tokens([torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 4])], torch.tensor([0, 1, 1]), 0)
    inputs, labels = tokens[[(0, 1), (0, 2)]]
    assert inputs["input_ids"].tolist() == [[8, 0], [9, 4]] and inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert labels.tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["bert", "mean", "gpt2"])
def test_padding_changes_no_logit(kind: str, tmp_path: Path) -> None:
    place = write_gpt2(tmp_path) if kind == "gpt2" else write_bert(tmp_path)
    network = huggingface_text(str(place), 2, pooling="mean" if kind == "mean" else "library")
    texts = Texts([text for text, _ in sentences(12)], [0] * 12)
    dataset = network.input.dataset(texts, 16)
    together = predict(network.module, [dataset[[(0, i) for i in range(12)]]])
    alone = predict(network.module, [dataset[[(0, i)]] for i in range(12)])
    assert torch.allclose(together, alone, atol=1e-6) and len(together.unique()) > 12


def test_mean_pooling_is_the_mean_of_the_librarys_hidden_states(tmp_path: Path) -> None:
    network = huggingface_text(str(write_bert(tmp_path)), 2, pooling="mean")
    (inputs, labels), ids = network.input.dataset(Texts(["the film was good"], [1]), 16)[[(0, 0)]], [2, 8, 9, 10]
    assert inputs["input_ids"][0, [0, 1]].tolist() == [2, 12], "[CLS] the"
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        mean = encoder(**inputs).last_hidden_state[0].mean(0)
        expected = network.linear()(mean)
        assert torch.allclose(forward(network.module.eval(), inputs)[0], expected, atol=1e-6)
    features, _ = head_inputs(network, [(inputs, labels)], torch.device("cpu"))
    assert torch.allclose(torch.from_numpy(features)[0], mean, atol=1e-6) and ids
    names = set(network.module.state_dict())
    library = set(AutoModelForSequenceClassification.from_pretrained(tmp_path).state_dict())
    assert names <= library, "the library's names"


def test_the_head_of_a_decoder_reads_the_last_token(tmp_path: Path) -> None:
    network = huggingface_text(str(write_gpt2(tmp_path)), 2)
    assert network.head == "score"
    batch = network.input.dataset(Texts([text for text, _ in sentences(6)], [0] * 6), 16)[[(0, i) for i in range(6)]]
    features, _ = head_inputs(network, [batch], torch.device("cpu"))
    assert features.shape == (6, 16)
    with torch.inference_mode():
        logits = network.linear()(torch.from_numpy(features))
    assert torch.allclose(logits, predict(network.module, [batch]), atol=1e-6)


def test_what_is_trained_and_dropped(tmp_path: Path) -> None:
    write_bert(tmp_path, dropout=0.1)
    frozen = huggingface_text(str(tmp_path), 2)
    still = {name for name, parameter in frozen.module.named_parameters() if not parameter.requires_grad}
    assert still == {name for name in dict(frozen.module.named_parameters()) if ".embeddings." in name}
    rates = {part.p for part in frozen.module.modules() if isinstance(part, torch.nn.Dropout)}
    assert rates == {0.0}
    kept = huggingface_text(str(tmp_path), 2, dropout=None, freeze_embeddings=False)
    assert 0.1 in {part.p for part in kept.module.modules() if isinstance(part, torch.nn.Dropout)}
    assert all(parameter.requires_grad for parameter in kept.module.parameters())
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        huggingface_text(str(tmp_path), 2, pooling="maen")


def test_tokens_are_cached_by_text_tokenizer_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = tokenizer(tmp_path / "tokenizer")
    texts = [text for text, _ in sentences(5)]
    first = TextInput(fast).tokenise(texts, 6)
    assert (
        all(len(ids) <= 6 for ids in first)
        and first[0].tolist() == fast(texts[0], truncation=True, max_length=6)["input_ids"]
    )
    monkeypatch.setattr(type(fast), "__call__", lambda *a, **k: pytest.fail("tokenised twice"))
    again = TextInput(fast).tokenise(texts, 6)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    monkeypatch.undo()
    monkeypatch.setenv("SOUPS_CACHE", str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 1
    TextInput(fast).tokenise(texts, 5)
    TextInput(fast).tokenise(texts[:3], 6)
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 3


def test_images_and_texts_are_not_confused(tmp_path: Path) -> None:
    images = TensorImages(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="reads texts, but the data are TensorImages"):
        TextInput(tokenizer(tmp_path)).dataset(images, 8)
    with pytest.raises(ConfigError, match="reads images, but the data are Texts"):
        ImageInput((0.5,) * 3, (0.5,) * 3).dataset(Texts(["a"], [0]), 8)


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    groups=st.lists(st.sampled_from("abcdefghij"), min_size=40, max_size=60),
    seed=st.integers(0, 5),
)
def test_splits_share_no_group(sizes: list[int], groups: list[str], seed: int) -> None:
    try:
        parts = draw(len(groups), sizes, seed, groups)
    except DataError:
        return
    assert [len(part) for part in parts] == sizes
    sides = [{groups[index] for index in part} for part in parts]
    assert all(not one & two for i, one in enumerate(sides) for two in sides[i + 1 :])


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
def test_text_files(ending: str, tmp_path: Path) -> None:
    rows = sentences(40)
    path = tmp_path / f"train{ending}"
    if ending == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    else:
        separator = "," if ending == ".csv" else "\t"
        path.write_text("\n".join(separator.join(row) for row in [("text", "label"), *rows]))
    splits = text_files(str(path), heldout=0.25, test=0.25)
    assert splits.classes == ("neg", "pos") and (len(splits.train), len(splits.heldout), len(splits.test)) == (
        20,
        10,
        10,
    )
    found = [text for part in (splits.train, splits.heldout, splits.test) for text in part.texts]  # type: ignore[attr-defined]
    assert sorted(found) == sorted(text for text, _ in rows)
    words = splits.heldout.texts  # type: ignore[attr-defined]
    assert [len(text) for text in words] == sorted(len(text) for text in words)
    other = tmp_path / f"other{ending}"
    other.write_bytes(path.read_bytes())
    given_files = text_files(str(path), str(other), str(other), {"elsewhere": str(other)})
    assert len(given_files.train) == 40 and list(given_files.reported()) == ["test", "elsewhere"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nhi,x\nho,y,z\n", r"a\.csv, line 3: more fields than the 2 columns"),
        ("a.csv", "text,label\nhi,x\nho\n", r"a\.csv, line 3: there is no 'label'"),
        ("a.csv", "text,labels\nhi,x\n", r"a\.csv, line 2: there is no 'label': did you mean 'labels'"),
        ("a.csv", 'text,label\n"hi" you,x\n', r"a\.csv, line 2: .*expected after"),
        ("a.tsv", "text\tlabel\n \tx\n", r"a\.tsv, line 2: the text is ' '; it must be some words"),
        ("a.jsonl", '{"text": "hi", "label": 1}\n{"text": "ho" "label"}\n', r"a\.jsonl, line 2: this is no JSON"),
        ("a.jsonl", '["hi"]\n', r"a\.jsonl, line 1: a JSON object is needed"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', r"a\.jsonl, line 1: the text is 3"),
        ("a.csv", "text,label\nhi,x\nho,x\n", r"has 1 class"),
        ("a.txt", "hi", "is no .csv, .tsv or .jsonl"),
    ],
)
def test_mistakes_in_text_files(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        text_files(str(tmp_path / name))


def test_more_mistakes_in_text_files(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", sentences(20))
    (tmp_path / "odd.csv").write_text("text,label\nhi,poss\n")
    with pytest.raises(DataError, match=r"odd\.csv, line 2: the label 'poss' is not among .*did you mean 'pos'"):
        text_files(str(train), str(tmp_path / "odd.csv"))
    (tmp_path / "latin.csv").write_bytes("text,label\nhi,x\ncafé,y\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.csv, near line 3: this is not UTF-8"):
        text_files(str(tmp_path / "latin.csv"))
    with pytest.raises(DataError, match="There is no file"):
        text_files(str(tmp_path / "absent.csv"))


def test_ratings_are_averaged_and_mistakes_are_named() -> None:
    texts, ratings = ["1\t9\tGood.", "2\t0\tgood. "], ["1\t9\t1\t[1, 2]", "2\t0\t1\t[-4]"]
    rated = parse_ratings(texts, ratings, "T", "R")
    assert [(one.text, one.mean) for one in rated] == [("Good.", 1.5)], "the mean is of the ratings; doubles count once"
    for lines, message in (
        (["1\t9\t1\t[1, 2", ratings[1]], r"R, line 1: the ratings '\[1, 2' are no list"),
        ([ratings[0], "2\t0\t[1]"], "R, line 2: 3 tab-separated fields instead of 4"),
        ([ratings[0], "2\t0\t1\t[5]"], "R, line 2: the rating 5 is not a whole number from -4 to 4"),
        ([ratings[0], "2\t0\t1\t[]"], "R, line 2: there are no ratings"),
        ([ratings[0], "2\t0\t1\t3"], "R, line 2: there are no ratings in '3'"),
        ([ratings[0]], "T, line 2: R has no ratings of '2'"),
    ):
        with pytest.raises(DataError, match=message):
            parse_ratings(texts, lines, "T", "R")
    for lines, message in (
        (["1\t9\tGood.", "2\t0\t "], "T, line 2: the text of '2' is empty"),
        (["1\t9\tGood.", "2\t0"], "T, line 2: 2 tab-separated fields instead of 3"),
    ):
        with pytest.raises(DataError, match=message):
            parse_ratings(lines, ratings, "T", "R")


def test_text_batches_do_not_depend_on_workers(tmp_path: Path) -> None:
    network = huggingface_text(str(write_bert(tmp_path)), 2)
    texts = Texts([text for text, _ in sentences(20)], [0, 1] * 10)

    def epoch(workers: int, world: int = 1, rank: int = 0) -> list[dict[str, torch.Tensor]]:
        dataset, sampler = network.input.dataset(texts, 16, {"num_ops": 2}, 3), ShuffledBatches(20, 8, 3, rank, world)
        return [inputs for inputs, _ in DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=workers)]

    for one, two in zip(epoch(0), epoch(2), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    halves = [sum(int(inputs["attention_mask"].sum()) for inputs in epoch(0, 2, rank)) for rank in (0, 1)]
    assert sum(halves) == sum(int(inputs["attention_mask"].sum()) for inputs in epoch(0))
    assert len(list(OrderedBatches(20, 8))) == 3


@pytest.mark.parametrize(("pooling", "frozen", "learned"), [("library", False, 0.8), ("mean", True, 0.7)])
def test_from_a_file_of_texts_to_a_soup(pooling: str, frozen: bool, learned: float, tmp_path: Path) -> None:
    """The whole main job on texts: probe, start, fits that learn, soup, report, and back into transformers."""
    train = write_csv(tmp_path / "train.csv", sentences(240))
    other = write_csv(tmp_path / "other.csv", sentences(30, seed=1))
    settings = compose_settings([
        "data=text_files", f"data.train={train}", f"data.ood={{other: {other}}}", "model=huggingface_text",
        f"model.name={write_bert(tmp_path / 'bert')}", f"model.pooling={pooling}", f"model.freeze_embeddings={frozen}", "loader.size=12", "loader.batch_size=8",
        "augment=null", "start.epochs=1", "start.optimizer.lr=1e-3", "start.augment=null", "trainer.max_epochs=6",
        "optimizer.lr=3e-3", f"trainer.accelerator={ACCELERATOR}", "trainer.threads=1", "tracking=off",
        f"pool.path={tmp_path}/pool", f"paths.output={tmp_path}/out", "+soup=uniform",
    ])  # fmt: skip
    start = run_with(settings).base_model.weights
    members = [fine_tune({**settings, "seed": seed}) for seed in (0, 1)]
    assert fine_tune({**settings, "seed": 1}) == members[1]
    weights = [open_pool(settings).weights(member.fingerprint) for member in members]
    embeddings = [name for name in start if ".embeddings.word" in name]
    assert embeddings and all(torch.equal(weights[0][name], start[name]) == frozen for name in embeddings)
    assert not torch.equal(weights[0]["classifier.weight"], weights[1]["classifier.weight"])
    report, folder = soup_of(settings)
    soup = read_safetensors(folder / "soup.safetensors")
    for name, tensor in soup.items():
        assert torch.equal(tensor, ((weights[0][name].double() + weights[1][name].double()) / 2).to(tensor.dtype))
    row = next(row for row in report.rows if row.kind == "soup")
    assert set(row.accuracy) == {"heldout", "test", "other"} and min(row.accuracy.values()) >= learned
    if pooling == "library":
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
        assert model.load_state_dict(soup).missing_keys == []


@pytest.mark.slow
def test_real_ratings_and_articles() -> None:
    counts = {domain: len(rated_texts(domain)) for domain in ("movies", "amazon", "nyt", "tweets")}
    assert counts == {"movies": 10603, "amazon": 3697, "nyt": 5119, "tweets": 4140}
    splits = sentiment("amazon", train=500, heldout=100, test=100, ood=["nyt"], ood_size=50)
    by_text = {rated.text: rated.group for rated in rated_texts("amazon")}
    sides = [{by_text[text] for text in part.texts} for part in (splits.train, splits.heldout, splits.test)]  # type: ignore[attr-defined]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    with pytest.raises(DataError, match=r"no domain 'movie' .*did you mean 'movies'"):
        sentiment("movie")
    articles = news(train=100, heldout=50, test=50)
    titles = articles.ood["headlines"]
    assert len(titles) == 50 and sorted(titles.labels.tolist()) == sorted(articles.test.labels.tolist())
    assert set(articles.train.labels.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.slow
def test_the_pretrained_sentence_encoder_knows_what_is_alike() -> None:
    network = huggingface_text("all-MiniLM-L6-v2", 2, pooling="mean")
    texts = Texts(["A man is eating food.", "Someone eats a meal.", "The stock market fell today."], [0, 0, 0])
    batch = network.input.dataset(texts, 40)[[(0, 0), (0, 1), (0, 2)]]
    features = torch.from_numpy(head_inputs(network, [batch], torch.device("cpu"))[0])
    alike = torch.nn.functional.cosine_similarity(features[0], features[1:])
    assert alike[0] > 0.6 > 0.3 > alike[1]
