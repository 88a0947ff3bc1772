"""Prompts, completions drawn with a seed, and rewards of them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from soups.errors import ConfigError, DataError
from soups.tasks.completion_rewards import Reward, RewardModel, brevity
from soups.tasks.completions import check_rows, complete, prompt_file, rated_beginnings
from soups.tasks.rated_texts import RatedText
from tests.tiny_text import write_bert, write_writer

TEMPLATE = "{% for m in messages %}{{ m['content'] }} and {% endfor %}"


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = write_writer(tmp_path_factory.mktemp("writer"))
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_prompt_files(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("the film\n\n  so it was\n")
    assert prompt_file(str(text)) == [{"prompt": "the film"}, {"prompt": "  so it was"}]
    rows = [{"prompt": [{"role": "user", "content": "the film"}], "answer": 3}]
    lines.write_text(json.dumps(rows[0]) + "\n")
    assert prompt_file(str(lines)) == rows
    lines.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: there is no 'prompt'.*'promt'"):
        prompt_file(str(lines))
    text.write_text("\n")
    with pytest.raises(DataError, match="holds no prompts"):
        prompt_file(str(text))
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        prompt_file(str(text))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a", " "], "prompt number 2 is ' '"),
        (["a", {"question": "b"}], "prompt number 2 is 'None'"),
        ([{"prompt": [{"content": "b"}]}], "messages with role"),
        (["a", {"prompt": [{"role": "user", "content": "b"}]}], "of one kind"),
        ([{"prompt": "a", "answer": 1}, {"prompt": "b"}], "same columns"),
    ],
)
def test_rows_that_are_no_prompts(rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_rows(rows, "here")


def test_beginnings_of_rated_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"word{number // 2} b c d" for number in range(400)] + ["too short"] * 100
    rated = tuple(RatedText(f"{number}_1", text, (1,)) for number, text in enumerate(texts))
    monkeypatch.setattr("soups.tasks.preferences.rated_texts", lambda domain: rated)
    prompts = [row["prompt"] for row in rated_beginnings(count=10, words=2)]
    assert len(set(prompts)) == 10 and all(prompt.endswith(" b") and len(prompt.split()) == 2 for prompt in prompts)
    every = [{row["prompt"] for row in rated_beginnings(part=part, count=5, words=2)} for part in ("members", "test")]
    assert not every[0] & every[1]
    with pytest.raises(DataError, match="1000 are asked for"):
        rated_beginnings(count=1000)
    with pytest.raises(DataError, match="did you mean 'members'"):
        rated_beginnings(part="member")


def test_completions_are_samples_of_the_model(writer: tuple[Any, Any]) -> None:
    model, tokenizer = writer
    count = 4000
    written = complete(
        model, tokenizer, [{"prompt": "the film"}], samples=count, seed=1, max_new_tokens=1, temperature=0.5
    )
    with torch.inference_mode():
        logits = model(**tokenizer("the film", return_tensors="pt")).logits[0, -1]
    expected = (logits / 0.5).softmax(0)
    found = torch.bincount(torch.tensor(written.ids).flatten(), minlength=len(expected)) / count
    assert torch.allclose(found, expected, atol=5 * math.sqrt(0.25 / count))


def test_completions_do_not_depend_on_padding_and_end_at_the_end(writer: tuple[Any, Any]) -> None:
    model, tokenizer = writer
    rows = [{"prompt": "the film was so", "key": 1}, {"prompt": "it", "key": 2}]
    greedy: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "max_new_tokens": 5}
    together = complete(model, tokenizer, rows, samples=1, seed=0, **greedy)
    alone = complete(model, tokenizer, rows, samples=1, seed=0, batch_size=1, **greedy)
    assert together.texts == alone.texts and together.arguments()["key"] == [1, 2]
    many = complete(model, tokenizer, rows, samples=40, seed=0, max_new_tokens=20)
    ended = [ids for ids in many.ids if tokenizer.eos_token_id in ids]
    assert ended and all(ids.index(tokenizer.eos_token_id) == len(ids) - 1 for ids in ended)
    assert many.texts == complete(model, tokenizer, rows, samples=40, seed=0, max_new_tokens=20).texts
    assert many.texts != complete(model, tokenizer, rows, samples=40, seed=1, max_new_tokens=20).texts


def test_messages_go_through_the_template(writer: tuple[Any, Any]) -> None:
    model, tokenizer = writer
    rows = [{"prompt": [{"role": "user", "content": "the film"}]}]
    with pytest.raises(ConfigError, match="no chat template"):
        complete(model, tokenizer, rows, samples=1, seed=0)
    tokenizer.chat_template = TEMPLATE
    try:
        found = complete(model, tokenizer, rows, samples=2, seed=0, max_new_tokens=4)
    finally:
        tokenizer.chat_template = None
    plain = complete(model, tokenizer, [{"prompt": "the film and"}], samples=2, seed=0, max_new_tokens=4)
    assert [one[0]["content"] for one in found.texts] == plain.texts and found.texts[0][0]["role"] == "assistant"
    assert brevity([], found.texts) == brevity([], plain.texts)


def test_prompts_must_leave_room(writer: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="Prompt number 1 has 2 tokens, and the model has room for 1"):
        complete(*writer, [{"prompt": "the film"}], samples=1, seed=0, max_new_tokens=31)
    with pytest.raises(ConfigError, match="above 0"):
        complete(*writer, [{"prompt": "the film"}], samples=0, seed=0)


def test_a_reward_model_gives_its_logit(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert", labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.classifier.weight.data *= 1e3  # so that texts differ by more than rounding
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts, completions = ["the film", "a scene", "it"], [" was good", " was very dull and so", " end"]
    with torch.inference_mode():
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        expected = [
            float(model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits) for text in texts
        ]
    assert RewardModel(str(folder), batch_size=2)(prompts, completions) == pytest.approx(expected, abs=1e-5)
    alone = RewardModel(str(folder), prompt=False)(prompts, completions)
    assert alone != pytest.approx(expected, abs=1e-5)
    messages = [[{"role": "assistant", "content": text}] for text in completions]
    assert RewardModel(str(folder), prompt=False)(prompts, messages) == pytest.approx(alone, abs=1e-5)


def test_what_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 2 outputs; a reward model has one"):
        RewardModel(str(write_bert(tmp_path / "two")))(["a"], ["b"])
    folder = write_writer(tmp_path / "writer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}))
    with pytest.raises(DataError, match=r"no trained head: score\.weight is missing"):
        RewardModel(str(folder))(["a"], ["b"])
    with pytest.raises(DataError, match="Cannot get /no/where"):
        RewardModel("/no/where")(["a"], ["b"])


def test_rewards_are_checked() -> None:
    def gives(*values: Any) -> Reward:
        return Reward("mine", lambda prompts, completions, **more: values)

    assert gives(1, 2.5)(["a", "a"], ["b", "c"]) == [1.0, 2.5]
    for values, message in (((1.0,), "gave 1 numbers for 2"), ((1.0, math.nan), "gave nan for the completion 'c'"),
                            ((None, 1.0), "gave None for the completion 'b'")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            gives(*values)(["a", "a"], ["b", "c"])

    async def later(prompts: Any, completions: Any, **more: Any) -> list[float]:
        return [0.0]

    with pytest.raises(ConfigError, match="asynchronous"):
        Reward("mine", later)
    with pytest.raises(ConfigError, match="cannot be called"):
        Reward("mine", 3)  # type: ignore[arg-type]
