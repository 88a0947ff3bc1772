"""Fusing, Ratatouille and lo-fi on tiny texts: what is averaged, from where each member starts, and what is shared."""

from pathlib import Path

import pytest
import torch

from soups.errors import ConfigError, DataError
from soups.fitting.task import build_splits
from soups.protocols import Node, build_protocol, execute, in_sequence
from soups.protocols.recycling.page import accuracies
from soups.protocols.recycling.run import Recycling, shard
from soups.stores.pool import Pool
from tests.devices import ACCELERATOR
from tests.launch.conftest import compose_settings
from tests.tiny_text import sentences, write_bert, write_csv


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_bert(folder / "bert")
    for number, task in enumerate(("target", "a", "b")):
        write_csv(folder / f"{task}.csv", sentences(60, seed=number))
    return folder


def overrides(protocol: str, data: Path, place: Path, *more: str) -> list[str]:
    def task(name: str) -> str:
        return f"{{_target_: soups.tasks.text_files.text_files, train: {data}/{name}.csv, heldout: 0.2, test: 0.3}}"

    auxiliary = [f"protocol.auxiliary.{name}=null" for name in ("amazon", "tweets", "news")]
    auxiliary += [f"+protocol.auxiliary.{name}={task(name)}" for name in "ab"]
    return [
        f"+protocol={protocol}", "model=huggingface_text", f"model.name={data}/bert", "model.pooling=mean",
        "data=text_files", f"data.train={data}/target.csv", *(auxiliary if protocol != "lo_fi" else []),
        "data.heldout=0.2", "data.test=0.3", f"data.ood={{other: {data}/a.csv}}", "loader.size=16", "loader.batch_size=8",
        "optimizer.lr=1e-3", f"trainer.accelerator={ACCELERATOR}", "trainer.threads=1", "tracking=off",
        f"pool.path={place}/pool", f"paths.output={place}/outputs", *more,
    ]  # fmt: skip


def program_of(*arguments) -> tuple[Recycling, Pool]:
    settings = compose_settings(overrides(*arguments))
    program = build_protocol(settings)
    assert isinstance(program, Recycling)
    return program, Pool(program.configuration.pool.path)


def weights(pool: Pool, node: Node) -> dict[str, torch.Tensor]:
    return pool.weights(node.fingerprint)


def assert_mean(pool: Pool, average: Node, members: list[Node]) -> None:
    parts = [weights(pool, node) for node in members]
    for name, tensor in weights(pool, average).items():
        if tensor.is_floating_point():
            exact = torch.stack([part[name].double() for part in parts]).mean(0).float()
            assert torch.equal(tensor, exact), name


def test_the_three_plans_share_what_they_can_and_average_what_they_say(data: Path, tmp_path: Path) -> None:
    ran: list[str] = []
    for protocol in ("fusing", "ratatouille", "lo_fi"):
        program, pool = program_of(protocol, data, tmp_path)
        run = in_sequence(pool, program.operations())
        assert (
            execute(program.plan(), pool, lambda nodes, run=run: [ran.extend(n.label for n in nodes), run(nodes)][1])
            == {}
        )
        rows = accuracies(program.comparison, pool)
        models = program.comparison.models
        assert all(set(row) == {"heldout", "test", "other"} for row in rows.values())
        if protocol == "fusing":
            fused = models["from the fused backbone"].inputs[0].inputs[0]
            assert_mean(pool, fused, list(fused.inputs))
            assert not any(name.startswith("classifier") for name in weights(pool, fused)), (
                "heads stay with their tasks"
            )
            group = rows["from one auxiliary task (mean)"]
            assert group["test"] == pytest.approx((rows["from a"]["test"] + rows["from b"]["test"]) / 2)
        elif protocol == "ratatouille":
            assert_mean(pool, models["ratatouille"], [models["from a"], models["from b"]])
            assert_mean(pool, models["uniform soup"], [models["vanilla 1"], models["vanilla 2"]])
            start, backbone = models["from a"].inputs
            assert start is models["vanilla 1"].inputs[0], "one probed head for all members"
            assert backbone.label == "auxiliary a"
        else:
            nodes = [models[f"node {n}"] for n in range(1, 5)]
            assert_mean(pool, models["lo-fi"], nodes)
        page = program.page(program.plan(), pool)
        assert page.parts[0].kind == "table" and "points on test" in page.summary
    assert ran.count("auxiliary a") == 1 and ran.count("probe the target, pretrained") == 1, "found, not made again"


def test_shards_are_disjoint_and_the_steps_are_those_of_the_synchronous_run(data: Path, tmp_path: Path) -> None:
    program, _ = program_of("lo_fi", data, tmp_path)
    whole = build_splits(program.target.spec.data)
    parts = [shard(whole, number, 4) for number in range(4)]
    texts = [text for part in parts for text in part.train.texts]
    assert len(set(texts)) == len(texts) and set(texts) <= set(whole.train.texts)
    size = len(whole.train) // 4
    assert [len(part.train) for part in parts] == [size] * 4
    assert size // (8 // 4) == len(whole.train) // 8
    with pytest.raises(DataError, match="cannot be shared out among 100 nodes"):
        shard(whole, 0, 100)


def test_mistakes(data: Path, tmp_path: Path) -> None:
    for protocol, wrong, message in (
        ("fusing", "protocol.auxiliary.a=null", "names 1 tasks; at least 2"),
        ("lo_fi", "protocol.nodes=1", "at least 2 nodes"),
        ("lo_fi", "protocol.node=2", "did you mean 'nodes'"),
    ):
        with pytest.raises(ConfigError, match=message):
            program_of(protocol, data, tmp_path, wrong if "node=" not in wrong else f"+{wrong}")
    with pytest.raises(ConfigError, match="batch_size=8 cannot be shared out among 3 nodes"):
        program_of("lo_fi", data, tmp_path, "protocol.nodes=3")
