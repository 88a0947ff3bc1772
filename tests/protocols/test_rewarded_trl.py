"""Rewarded soups by TRL's trainers: the whole plan on a language model of a few thousand weights, and every refusal."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from soups.errors import ConfigError, DataError
from soups.launch.protocol import report_folder
from soups.launch.settings import Settings
from soups.protocols import Node, build_protocol, execute, in_sequence, perform
from soups.protocols.rewarded_soups_trl.run import RewardedSoupsTRL
from soups.reporting.page import Table
from soups.stores.pool import Pool
from soups.tasks.completion_rewards import brevity
from soups.tasks.completions import complete
from tests.devices import ACCELERATOR
from tests.launch.conftest import ROOT, compose_settings
from tests.tiny_text import write_bert, write_writer

with_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL")
PROMPTS = (
    "the film was",
    "the plot of it",
    "very so",
    "a scene and",
    "music was",
    "the actor",
    "so the end",
    "it was a",
)
HERE = "tests.protocols.test_rewarded_trl"


def counted(prompts: list[str], completions: list[str], words: tuple[str, ...] = (), **more: Any) -> list[float]:
    """Count some words."""
    return [float(sum(word in words for word in text.split())) for text in completions]


def one_too_few(prompts: list[str], completions: list[str], **more: Any) -> list[float]:
    return [0.0] * (len(completions) - 1)


def without_more(prompts: list[str], completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


def overrides(folder: Path) -> list[str]:
    """Write a model and prompts; return the settings of a study of three fits, two steps each."""
    model = write_writer(folder / "gpt2")
    (folder / "train.txt").write_text("\n".join(PROMPTS[:6]) + "\n")
    (folder / "test.txt").write_text("\n".join(PROMPTS[5:]) + "\n")
    return [
        "+protocol=rewarded_soups_trl", f"protocol.model={model}", "protocol.args.max_steps=2",
        "protocol.args.per_device_train_batch_size=4", "protocol.args.num_generations=2", "+protocol.args.bf16=false",
        "protocol.args.max_completion_length=6", "protocol.args.learning_rate=1e-2", "protocol.args.logging_steps=1",
        "protocol.args.beta=0", "protocol.study.shares=[0.25]", "protocol.study.multi_objective=[0.25]",
        "protocol.generation.samples=3", "protocol.generation.batch_size=2", "protocol.export=[0.25]",
        f"protocol.prompts.train={folder}/train.txt", f"protocol.prompts.test={folder}/test.txt",
        f"protocol.rewards.rating._target_={HERE}.counted", "protocol.rewards.rating.model=none", "~protocol.rewards.rating.model",
        "+protocol.rewards.rating.words=[good,great,film,it]", "tracking=off", f"trainer.accelerator={ACCELERATOR}", "trainer.threads=1",
        f"pool.path={folder}/pool", f"paths.output={folder}/out",
    ]  # fmt: skip


def build(*given: str) -> RewardedSoupsTRL:
    program = build_protocol(compose_settings(list(given)))
    assert isinstance(program, RewardedSoupsTRL)
    return program


@pytest.fixture(autouse=True)
def unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL tells its makers when a trainer is built, but not of tests."""
    monkeypatch.setenv("CI", "1")


@dataclass
class Done:
    """A finished study."""

    folder: Path
    given: list[str]
    settings: Settings
    program: RewardedSoupsTRL
    pool: Pool
    left: list[str]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("trl")
    given = overrides(folder)
    (folder / "here").mkdir()
    (folder / "temporary").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")
        program, pool = build(*given), Pool(folder / "pool")
        patch.chdir(folder / "here")
        patch.setattr(tempfile, "tempdir", str(folder / "temporary"))
        assert execute(program.plan(), pool, in_sequence(pool, program.operations())) == {}
        left = [str(path) for place in ("here", "temporary") for path in (folder / place).rglob("*")]
    return Done(folder, given, compose_settings(given), program, pool, left)


@with_trl
@pytest.mark.slow
def test_interpolated_weights_are_the_mean_of_the_ends(done: Done) -> None:
    found = done.program.nodes
    ends = [done.pool.weights(node.inputs[0].fingerprint) for node in found.ends]
    middle = done.pool.weights(found.soups[0.25, 0.75].inputs[0].fingerprint)
    start = dict(AutoModelForCausalLM.from_pretrained(done.folder / "gpt2", dtype=torch.float32).named_parameters())
    assert middle.keys() == start.keys() and "lm_head.weight" not in middle, "tied to the embeddings"
    for name, tensor in middle.items():
        assert torch.equal(tensor, (0.25 * ends[0][name].double() + 0.75 * ends[1][name].double()).float())
    changed = [name for name in start if not torch.equal(ends[0][name], ends[1][name])]
    assert len(changed) > len(start) / 2, "two rewards, two policies"
    assert all(not torch.equal(end["transformer.wte.weight"], start["transformer.wte.weight"]) for end in ends)


@with_trl
@pytest.mark.slow
def test_references_are_tuned_to_the_weighted_sum(done: Done) -> None:
    found = done.program.nodes
    history = done.pool.ingredient(found.references[0.25, 0.75].inputs[0].fingerprint).notes["history"]
    steps = [row for row in history if "reward" in row]
    assert len(steps) == 2
    for row in steps:
        weighted = 0.25 * row["rewards/rating/mean"] + 0.75 * row["rewards/brevity/mean"]
        assert row["reward"] == pytest.approx(weighted, abs=1e-5)
    own = done.pool.ingredient(found.ends[1].inputs[0].fingerprint).notes["history"][0]
    assert "rewards/brevity/mean" in own and "rewards/rating/mean" not in own


@with_trl
@pytest.mark.slow
def test_rewards_are_those_of_completions_drawn_again(done: Done) -> None:
    tokenizer = AutoTokenizer.from_pretrained(done.folder / "gpt2")
    model = AutoModelForCausalLM.from_pretrained(done.folder / "gpt2", dtype=torch.float32)
    rows = [{"prompt": prompt} for prompt in PROMPTS[5:]]
    state = torch.get_rng_state()
    written = complete(model, tokenizer, rows, samples=3, seed=0, batch_size=2, max_new_tokens=6)
    assert torch.equal(torch.get_rng_state(), state)
    arguments = written.arguments()
    assert arguments["prompts"] == [prompt for prompt in PROMPTS[5:] for _ in range(3)]
    expected = torch.tensor(brevity(**arguments)).view(3, 3)
    kept = done.pool.weights(done.program.start.fingerprint)["rewards"]
    assert torch.equal(kept[1], expected) and len(set(expected.flatten().tolist())) > 1
    counts = torch.tensor(counted(**arguments, words=("good", "great", "film", "it")))
    assert torch.equal(kept[0].flatten(), counts)


@with_trl
@pytest.mark.slow
def test_the_report(done: Done) -> None:
    page = done.program.page(done.program.plan(), done.pool)
    table = page.parts[0]
    assert isinstance(table, Table)
    rows: dict[Any, list[Any]] = {row[0]: row for row in table.rows}
    assert list(rows) == ["start", "λ = 0", "λ = 0.25", "λ = 1"]
    scores = {
        name: done.pool.weights(node.fingerprint)["rewards"].double().mean(dim=(1, 2)).tolist()
        for name, node in {
            "start": done.program.start, "λ = 1": done.program.nodes.ends[0], "λ = 0": done.program.nodes.ends[1],
            "λ = 0.25": done.program.nodes.soups[0.25, 0.75], "MORL": done.program.nodes.references[0.25, 0.75],
        }.items()
    }  # fmt: skip
    for name in rows:
        assert rows[name][2:4] == pytest.approx(scores[name])
    line = [0.25 * scores["λ = 1"][k] + 0.75 * scores["λ = 0"][k] for k in (0, 1)]
    assert rows["λ = 0.25"][4:] == pytest.approx([*line, *scores["MORL"]])
    assert page.warnings == ["1 of the 3 test prompts are training prompts too."]
    assert "of 1 interpolated models are on or above the straight line in both rewards" in page.summary


@with_trl
@pytest.mark.slow
def test_fits_leave_nothing_behind_and_repeat_to_the_bit(done: Done, tmp_path: Path) -> None:
    assert done.left == []
    again = Pool(tmp_path / "pool")
    fit = done.program.nodes.ends[0].inputs[0]
    torch.manual_seed(123)
    perform(fit, again, done.program.operations())
    assert again.ingredient(fit.fingerprint).weights == done.pool.ingredient(fit.fingerprint).weights


@with_trl
@pytest.mark.slow
def test_the_second_run_of_the_command_redoes_nothing_and_writes_the_model(done: Done) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done.folder / "pool").rglob("*") if path.is_file()}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [sys.executable, str(ROOT / "train.py"), *done.given]
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        timeout=400,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    assert "0 to do in 0 waves" in ran.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (done.folder / "pool").rglob("*") if path.is_file()}
    folder = report_folder(done.program, done.program.plan())
    assert (folder / "report.html").is_file()
    model = AutoModelForCausalLM.from_pretrained(folder / "policy_0.25", dtype=torch.float32)
    middle = done.pool.weights(done.program.nodes.soups[0.25, 0.75].inputs[0].fingerprint)
    assert all(torch.equal(tensor, middle[name]) for name, tensor in model.named_parameters())
    assert AutoTokenizer.from_pretrained(folder / "policy_0.25")("the film")["input_ids"]


def tuned(program: RewardedSoupsTRL, folder: Path) -> tuple[Node, dict[str, torch.Tensor]]:
    pool, fit = Pool(folder), program.nodes.ends[0].inputs[0]
    perform(fit, pool, program.operations())
    return fit, pool.weights(fit.fingerprint)


@with_trl
@pytest.mark.slow
def test_another_trainer_an_adapter_and_a_reward_model(done: Done, tmp_path: Path) -> None:
    judge = write_bert(tmp_path / "bert", labels=1)
    program = build(
        *done.given[:15], f"protocol.prompts.train={done.folder}/train.txt", f"protocol.prompts.test={done.folder}/test.txt",
        f"protocol.rewards.rating.model={judge}", f"trainer.accelerator={ACCELERATOR}", "trainer.threads=1", f"pool.path={tmp_path}/pool",
        "protocol.trainer._target_=trl.RLOOTrainer", "protocol.args.max_steps=1",
        "protocol.adapter={_target_: peft.LoraConfig, r: 2, target_modules: [c_attn], fan_in_fan_out: true}",
    )  # fmt: skip
    fit, weights = tuned(program, tmp_path / "pool")
    start = dict(AutoModelForCausalLM.from_pretrained(done.folder / "gpt2", dtype=torch.float32).named_parameters())
    assert weights.keys() == start.keys(), "merged"
    changed = [name for name in start if not torch.equal(weights[name], start[name])]
    assert changed == ["transformer.h.0.attn.c_attn.weight"]
    step = weights[changed[0]] - start[changed[0]]
    assert torch.linalg.matrix_rank(step.double(), rtol=1e-4) <= 2
    assert fit.fingerprint not in done.pool


@with_trl
def test_three_rewards(tmp_path: Path) -> None:
    third = f"+protocol.rewards.third={{_target_: {HERE}.counted, words: [so]}}"
    shares = ["protocol.study.shares=[[0.5,0.3,0.2]]", "protocol.study.multi_objective=[]", "protocol.export=[]"]
    program = build(*overrides(tmp_path), third, *shares)
    found = program.nodes
    assert len(found.ends) == 3 and list(found.soups) == [(0.5, 0.3, 0.2)]
    assert found.soups[0.5, 0.3, 0.2].inputs[0].parameters.shares == (0.5, 0.3, 0.2)
    with pytest.raises(ConfigError, match="lists of 3 shares with the sum 1"):
        build(*overrides(tmp_path / "again"), third)


@with_trl
def test_what_decides_nothing_is_not_in_the_plan(tmp_path: Path) -> None:
    given = overrides(tmp_path)
    base = set(build(*given).plan().nodes)
    assert base == set(build(*given, "+protocol.args.report_to=wandb", "trainer.threads=2").plan().nodes)
    assert not base & set(build(*given, "seed=1").plan().nodes)
    kept = base & set(build(*given, "protocol.generation.samples=2").plan().nodes)
    assert len(kept) == 4, "three fits and their interpolation"
    (tmp_path / "train.txt").write_text("so it was\n")
    assert len(base & set(build(*given).plan().nodes)) == 1, (
        "only the start's rewards do not depend on training prompts"
    )


@with_trl
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["protocol.trainer._target_=trl.GRPOTrainr"], "GRPOTrainr' cannot be imported"),
        (["protocol.trainer._target_=trl.SFTTrainer"], "takes no reward_funcs.*trl.GRPOTrainer and trl.RLOOTrainer"),
        (["+protocol.trainer.tool=1"], "trainer.tool is no argument of trl.GRPOTrainer: did you mean 'tools'"),
        (["+protocol.args.num_generation=2"], "no setting of GRPOConfig: did you mean 'num_generations'"),
        (["+protocol.args.output_dir=x"], "args.output_dir cannot be set.*temporary folder"),
        (["+protocol.args.reward_weights=[1,1]"], "the λ of protocol.study"),
        (["~protocol.rewards.brevity"], "two rewards or more, and has 1"),
        (["protocol.rewards.brevity._target_=soups.tasks.completion_rewards.brevety"], "brevity._target_=.*cannot be imported"),
        (["trainer.devices=2"], "trainer.devices is no setting of .*accelerator"),
        (["protocol.export=[0.3]"], "λ = 0.3, which is not among"),
        (["protocol.prompts.test=/no/where.txt"], "There is no file /no/where.txt"),
        (["protocol.study.shares=[1]"], "the ends left out"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_runs(change: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        build(*overrides(tmp_path), *change)


@with_trl
@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([f"protocol.rewards.rating._target_={HERE}.one_too_few", "~protocol.rewards.rating.words"], "gave 3 numbers for 4 compl"),
        ([f"protocol.rewards.rating._target_={HERE}.without_more", "~protocol.rewards.rating.words"], "more than it may name"),
        (["protocol.args.num_generations=3"], "GRPOTrainer refuses .*divisible"),
        (["protocol.model=/no/where"], "Cannot get /no/where"),
        (["protocol.args.max_completion_length=40"], "Prompt number 1 has 3 tokens"),
    ],
)  # fmt: skip
def test_mistakes_that_a_fit_meets(change: list[str], message: str, tmp_path: Path) -> None:
    program = build(*overrides(tmp_path), *change)
    with pytest.raises((ConfigError, DataError), match=message):
        tuned(program, tmp_path / "pool")


def test_without_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ConfigError, match=r"pip install 'soups\[trl\]'"):
        build(*overrides(tmp_path))
