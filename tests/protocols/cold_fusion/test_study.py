"""ColD Fusion from configuration to report, on tiny text tasks: rounds, resuming, processes that die, several devices."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from soups.errors import ConfigError, StorageError
from soups.launch.protocol import _finish, run_node
from soups.launch.settings import Settings, open_pool
from soups.protocols import Node, Output, Work, build_protocol, execute, in_sequence
from soups.protocols.backbones import TaskModel, heldout_accuracy
from soups.protocols.cold_fusion import Repository, replay
from soups.protocols.cold_fusion.plan import ContributeParameters
from soups.protocols.cold_fusion.records import Verdict
from soups.protocols.cold_fusion.run import BaseNotes, ColdFusion, ContributionNotes
from soups.reporting.page import Curves, Page
from tests.devices import ACCELERATOR
from tests.launch.conftest import ROOT, compose_settings, read_run
from tests.tiny_text import sentences, write_bert, write_csv

TASKS = ("a", "b", "c", "new")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files and a model; the task c has other labels than the rest, and three of them."""
    folder = tmp_path_factory.mktemp("data")
    write_bert(folder / "bert")
    for number, task in enumerate(TASKS):
        rows = sentences(60, seed=number)
        if task == "c":
            rows = [(text, f"{label} and long" if len(text.split()) > 7 else label) for text, label in rows]
        write_csv(folder / f"{task}.csv", rows)
    return folder


def overrides(data: Path, place: Path, *more: str) -> list[str]:
    def task(name: str) -> str:
        return f"{{_target_: soups.tasks.text_files.text_files, train: {data}/{name}.csv, heldout: 0.2, test: 0.3}}"

    none = [f"protocol.tasks.{name}=null" for name in ("movies", "amazon", "tweets", "news")]
    none += [f"protocol.unseen.{name}=null" for name in ("nyt", "newsgroups")]
    return [
        "+protocol=cold_fusion", "model=huggingface_text", f"model.name={data}/bert", "model.pooling=mean", *none,
        *(f"+protocol.tasks.{name}={task(name)}" for name in TASKS[:3]), f"+protocol.unseen.new={task('new')}",
        "protocol.rounds=2", "protocol.per_round=2", "protocol.shots=6", "loader.size=16", "loader.batch_size=8",
        "optimizer.lr=1e-3", f"trainer.accelerator={ACCELERATOR}", "trainer.threads=1", "tracking=off",
        f"pool.path={place}/pool", f"paths.output={place}/outputs", *more,
    ]  # fmt: skip


@pytest.fixture
def settings(data: Path, tmp_path: Path) -> Settings:
    return compose_settings(overrides(data, tmp_path))


def program_of(settings: Settings) -> ColdFusion:
    program = build_protocol(settings)
    assert isinstance(program, ColdFusion)
    return program


def run(settings: Settings) -> tuple[ColdFusion, Page]:
    program, pool = program_of(settings), open_pool(settings)
    plan = program.plan()
    assert execute(plan, pool, in_sequence(pool, program.operations())) == {}
    return program, program.page(plan, pool)


def test_synchronous_rounds_are_the_mean_of_the_sampled_contributions(settings: Settings) -> None:
    program, page = run(settings)
    nodes, repository = program.nodes, program.repository("main")
    rounds = repository.rounds()
    assert [[v.contributor for v in sorted(r.verdicts, key=lambda v: v.contributor)] for r in rounds] == nodes.chosen
    assert all(len(chosen) == 2 for chosen in nodes.chosen)
    for record in rounds:
        pushed = {entry.id: entry for entry in repository.pushed()}
        weights = [repository._load(pushed[v.id].weights) for v in record.accepted]
        base = repository.pull(record.number)[1]
        for name in weights[0]:
            exact = torch.stack([one[name].double() for one in weights]).mean(0).float()
            assert torch.equal(base[name], exact), name
    moved = [name for name in weights[0] if not torch.equal(repository.pull(0)[1][name], base[name])]
    assert len(moved) == len(weights[0]), "every shared tensor was trained"
    assert not any("classifier" in name or "embeddings" in name for name in repository.manifest.tensors)
    assert all(result.same for result in replay(repository))
    # The references: everybody fused once, in a repository of its own, and one body trained on all tasks.
    assert len(program.repository("once").rounds()[0].accepted) == 3
    table = page.parts[0]
    assert table.kind == "table" and [row[0] for row in table.rows] == [
        "pretrained", "round 1", "round 2", "fused once", "multitask"]  # fmt: skip
    pool = open_pool(settings)
    frozen = [pool.ingredient(nodes.probes["round 2", task].fingerprint).metrics["frozen"] for task in "abc"]
    assert table.rows[2][1] == pytest.approx(sum(100 * one["accuracy"] for one in frozen) / 3)
    assert frozen[0]["count"] == 18 and program.plan().waves(pool) == []

    # Another rule for the rounds is another plan; what does not depend on it is found.
    other = {**settings, "protocol": {**settings["protocol"], "policy": {"method": "median"}}}
    assert sum(map(len, program_of(other).plan().waves(pool))) > 10

    # A driver that died between fusing and noting it goes on: the round is not made twice.
    def forget(*lost: Node) -> None:
        for node in lost:
            shutil.rmtree(Path(settings["pool"]["path"]) / "ingredients" / node.fingerprint)

    judged = [node for (model, _), node in nodes.probes.items() if model == "round 2"]
    forget(nodes.bases[2], *judged)
    assert execute(program.plan(), pool, in_sequence(pool, program.operations())) == {}
    assert program.repository("main").rounds() == rounds

    # A pool without its repository says so.
    forget(*judged)
    Path(f"{program.url}/main/rounds/000002.json").unlink()
    missing = execute(program.plan(), pool, in_sequence(pool, program.operations()))
    assert set(missing) == {node.fingerprint for node in judged}
    assert all("The pool knows base 2" in why and "has another or none" in why for why in missing.values())


def run_with_an_attacker(settings: Settings) -> tuple[Repository, list[Verdict]]:
    """Run one round in which the contributor "b" wipes out what the backbone says: a push like any other, but for its score."""
    program, pool = program_of(settings), open_pool(settings)
    operations = dict(program.operations())
    honest = operations["cold.contribute"]

    def contribute(work: Work) -> Output:
        if work.read(ContributeParameters).task != "b":
            return honest(work)
        repository = program.repository(work.notes("base", BaseNotes).repository)
        base, weights = repository.pull()
        last = [name for name in weights if name.endswith("output.LayerNorm.weight")][-1]
        record = repository.push({**weights, last: torch.zeros_like(weights[last])}, base, "b")
        return Output(notes=ContributionNotes(contribution=record.id))

    assert execute(program.plan(), pool, in_sequence(pool, {**operations, "cold.contribute": contribute})) == {}
    (record,) = program.repository("main").rounds()
    return program.repository("main"), sorted(record.verdicts, key=lambda verdict: verdict.contributor)


def test_the_held_out_check_by_configuration_refuses_a_harmful_contribution(data: Path, tmp_path: Path) -> None:
    more = [*LIGHT, "protocol.rounds=1", "optimizer.lr=3e-2"]
    _, (good, bad) = run_with_an_attacker(compose_settings(overrides(data, tmp_path / "open", *more)))
    assert good.accepted and bad.accepted, "finite, of a usual norm: nothing else stops it"
    assert good.norm is not None and bad.norm is not None and bad.norm < 4 * good.norm

    checked = [*more, "protocol.policy.heldout={tolerance: 0.15}"]
    settings = compose_settings(overrides(data, tmp_path / "checked", *checked))
    guarded, (good, bad) = run_with_an_attacker(settings)
    assert good.accepted and not bad.accepted
    base, fell = (float(number) for number in re.findall(r"score ([\d.]+), the base has ([\d.]+)", bad.reason)[0][::-1])
    checker = program_of(settings)
    pulled = guarded.pull(0)[1]
    own = [TaskModel.build(spec, checker.layout, pulled, seed=0) for spec in checker.study.seen.values()]
    assert base == pytest.approx(sum(map(heldout_accuracy, own)) / 2, rel=1e-3) and fell < base - 0.15
    # The base is the honest contribution alone.
    (push,) = [entry for entry in guarded.pushed() if entry.contributor == "a"]
    weights, current = guarded._load(push.weights), guarded.pull()[1]
    assert all(torch.equal(current[name], tensor) for name, tensor in weights.items())
    assert all(result.same for result in replay(guarded))
    # The check belongs to the plan: without it the same tasks give another one; so does a choice among the tasks.
    plans = [
        program_of(compose_settings(overrides(data, tmp_path / "checked", *some))).plan()
        for some in (more, checked, [*more, "protocol.policy.heldout={tolerance: 0.15, tasks: [b]}"])
    ]
    assert len({plan.targets[0].fingerprint for plan in plans}) == 3


def test_mistakes(data: Path, tmp_path: Path) -> None:
    for wrong, message in (
        ("protocol.mode=async", "synchronous or asynchronous"),
        ("+protocol.policy.tolerance=0.1", r"needs a score to compare: write protocol.policy.heldout="),
        ("protocol.policy.heldout=0.1", r"which says how far a score may fall"),
        ("protocol.policy.heldout={tolerance: 2}", r"tolerance=2 must be an accuracy"),
        (
            "protocol.policy.heldout={tolerance: 0.1, task: a}",
            r"heldout\.task is no setting of \+protocol=cold_fusion: did you mean 'tasks'",
        ),
        ("protocol.policy.heldout={tolerance: 0.1, tasks: [new]}", r"'new' is none of protocol.tasks"),
        ("protocol.per_round=4", "between 1 and 3"),
        ("protocol.rounds=0", "a positive whole number"),
        ("+protocol.policy.metod=median", "did you mean 'method'"),
        ("+protocol.policy.quorum=2", "set by protocol.per_round"),
        ("+protocol.round=2", "did you mean 'rounds'"),
        ("optimizer.lr=-1", "positive"),
    ):
        with pytest.raises(ConfigError, match=message):
            program_of(compose_settings(overrides(data, tmp_path, wrong))).plan()
    with pytest.raises(ConfigError, match="is not in the plan"):
        run_node(compose_settings(overrides(data, tmp_path)), "0" * 64)


def command(data: Path, place: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *overrides(data, place, *more)]


LIGHT = ("protocol.multitask=false", "protocol.fine_tuned=[]", "~protocol.tasks.c", "~protocol.unseen.new")


def train_py(data: Path, place: Path, *more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    return subprocess.run(
        command(data, place, *more), cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False, timeout=400,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_killed_and_resumed_ends_in_the_same_base(data: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command(data, tmp_path, *LIGHT), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    pushed, deadline = tmp_path / "pool" / "repository" / "main" / "pushed", time.monotonic() + 200
    while not list(pushed.glob("*.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in pushed.glob("*.json")}
    done = train_py(data, tmp_path, *LIGHT)
    assert done.returncode == 0, done.stdout
    assert "ColD Fusion: test accuracy" in done.stdout and "Traceback" not in done.stdout
    assert all((pushed / name).stat().st_mtime_ns == when for name, when in kept.items()), "pushes are not redone"
    # The same plan, never killed, in this process.
    settings = compose_settings(overrides(data, tmp_path / "whole", *LIGHT))
    program, _ = run(settings)
    repository = Repository(tmp_path / "pool" / "repository" / "main")
    assert repository.current() == program.repository("main").current()
    (folder,) = (tmp_path / "outputs" / "protocols").iterdir()
    assert {"page.json", "report.html", "accuracy_by_round.png"} <= {path.name for path in folder.iterdir()}
    assert Page.load(folder).subject == "protocol"


@pytest.mark.slow
def test_contributors_on_two_processes_each(data: Path, tmp_path: Path) -> None:
    more = ("protocol.rounds=1", "protocol.per_round=1", "trainer.devices=2", "trainer.strategy=ddp")
    done = train_py(data, tmp_path, *LIGHT, *more, "~protocol.tasks.b")
    assert done.returncode == 0, done.stdout
    single = compose_settings(overrides(data, tmp_path / "one", *LIGHT, *more[:2], "~protocol.tasks.b"))
    program, _ = run(single)
    one, two = program.repository("main").pull()[1], Repository(tmp_path / "pool" / "repository" / "main").pull()[1]
    for name, tensor in one.items():
        assert torch.allclose(tensor.float(), two[name].float(), rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
def test_asynchronous_contributors_and_one_that_is_killed(data: Path, tmp_path: Path) -> None:
    """Two processes on one folder; one is killed when it has pushed once. The other makes the rounds that are wanted."""
    more = (
        "protocol.mode=asynchronous", "protocol.contributors=2", "protocol.rounds=3", "protocol.per_round=2",
        "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    process = subprocess.Popen(
        command(data, tmp_path, *LIGHT, *more), cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    place, deadline = tmp_path / "pool" / "repository" / "main", time.monotonic() + 300
    victim = None
    while victim is None:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
        if list((place / "pushed").glob("*.json")):
            victim = worker_of(process.pid)
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    repository = Repository(place)
    assert len(repository.rounds()) >= 3, output
    assert process.returncode == 3 and "ended with code" in " ".join(output.split()), output
    assert "ColD Fusion: test accuracy" in output
    assert all(result.same for result in replay(repository))
    ids = [verdict.id for record in repository.rounds() for verdict in record.verdicts]
    assert len(ids) == len(set(ids))


def worker_of(pid: int) -> int | None:
    """Return one of the contributors' processes below a process."""
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"soups.worker" in status.read_bytes() and pid in ancestors(int(status.parent.name)):
                return int(status.parent.name)
        except FileNotFoundError:
            continue
    return None


def ancestors(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.add(pid)
    return found


def test_asynchronous_contributors_side_by_side_in_threads_of_work(data: Path, tmp_path: Path) -> None:
    """One after the other, the first contributor makes all rounds alone; the second finds nothing left to do."""
    settings = compose_settings(
        overrides(
            data, tmp_path, *LIGHT, "protocol.mode=asynchronous", "protocol.contributors=2", "protocol.per_round=2"
        )
    )
    program, page = run(settings)
    repository, pool = program.repository("main"), open_pool(settings)
    assert len(repository.rounds()) == 2
    first, second = program.nodes.bases[1].inputs[1:]
    assert pool.ingredient(first.fingerprint).notes["pushed"] == 4
    assert pool.ingredient(second.fingerprint).notes["pushed"] == 0
    assert [row[1] for row in page.parts[3].rows] == ["contributor 0"] * 4
    assert (
        json.loads((tmp_path / "pool" / "repository" / "main" / "repository.json").read_text())["policy"]["quorum"] == 2
    )


def test_too_few_rounds_say_so_and_the_same_plan_goes_on(data: Path, tmp_path: Path) -> None:
    settings = compose_settings(
        overrides(
            data, tmp_path, *LIGHT, "protocol.mode=asynchronous", "protocol.contributors=2", "protocol.per_round=2"
        )
    )
    program, pool = program_of(settings), open_pool(settings)

    def killed(work):
        raise StorageError("killed")

    plan = program.plan()
    missing = execute(plan, pool, in_sequence(pool, {**program.operations(), "cold.contributor": killed}))
    assert any("left after 0 rounds; 1 were wanted" in why for why in missing.values())
    assert execute(plan, pool, in_sequence(pool, program.operations())) == {}


def test_members_and_report_are_runs_of_one_group_over_rounds(data: Path, tmp_path: Path) -> None:
    """Written offline and read back: each contribution's own curve, the reference's, and the report's over rounds."""
    more = (
        "tracking=wandb", "protocol.per_round=1", "protocol.fine_tuned=[]", "~protocol.tasks.b", "~protocol.tasks.c",
        "~protocol.unseen.new",
    )  # fmt: skip
    settings = compose_settings(overrides(data, tmp_path, *more))
    program, page = run(settings)
    _finish(settings, program, program.plan())
    runs = sorted((tmp_path / "outputs" / "wandb").glob("offline-run-*"))
    pushed = program.repository("main").pushed()
    assert len(runs) == len(pushed) + 2 == 4, "the multitask reference and the report besides"
    members: dict[tuple[int, str], float] = {}
    for folder in runs:
        records = [json.loads(line) for line in read_run(folder).splitlines()]
        about = next(record["run"] for record in records if record["type"] == "run")
        assert about["run_group"] == "pool", "one group"
        if about["job_type"] == "protocol":
            metrics = {one["metric"].get("glob_name"): one["metric"] for one in records if one["type"] == "metric"}
            assert metrics["Accuracy by round/*"]["step_metric"] == "round"
            (curves,) = [part for part in page.parts if isinstance(part, Curves)]
            rows = [one["history"]["item"] for one in records if one["type"] == "history"]
            seen = [(row["round"], row["Accuracy by round/seen, linear probe"]) for row in rows if "round" in row]
            assert [x for x, _ in seen] == curves.x == [0, 1, 2]
            assert [y for _, y in seen] == pytest.approx(curves.series["seen, linear probe"])
            continue
        assert about["job_type"] == "ingredient"
        assert any("train/loss" in one["history"]["item"] for one in records if one["type"] == "history"), (
            "its training"
        )
        if about["display_name"].startswith("round"):
            found = json.loads(read_run(folder, "--summary"))
            summary, told = found["summary"], found["config"]["determinants"]
            assert (
                summary["round"] == told["round"] and about["display_name"] == f"round {told['round']}: {told['task']}"
            )
            members[told["round"], told["task"]] = summary["heldout/accuracy"]
    rounds = program.repository("main").rounds()
    notes = {entry.id: entry.note for entry in pushed}
    assert members == {
        (record.number, verdict.contributor): notes[verdict.id]["heldout_accuracy"]
        for record in rounds for verdict in record.verdicts
    }  # fmt: skip
