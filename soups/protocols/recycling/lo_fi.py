"""lo-fi (arXiv:2210.11948): nodes fine-tune without communication; their weights are averaged once, at the end."""

from __future__ import annotations

from soups.errors import ConfigError
from soups.protocols.recycling.plan import ModelComparison, TargetTask, compare, mean


def lo_fi(target: TargetTask, nodes: int) -> ModelComparison:
    """Return the plan: n nodes, each with a part of the data and of the batch, against one synchronous run.

    The budget is the same: the synchronous run makes S steps with a batch of B over all devices (it is what DDP on n devices
    computes, and is DDP under `trainer.devices=n`); each lo-fi node makes S steps with a batch of B/n on its part.

    Args:
        target: the task that all models are for.
        nodes: n.

    Raises:
        ConfigError: fewer than two nodes, or a batch that n does not divide.
    """
    if nodes < 2:
        raise ConfigError(f"protocol.nodes={nodes}: lo-fi needs at least 2 nodes.")
    start = target.start()
    local = {
        f"node {n}": target.fit(start, f"node {n} of {nodes}", number=n, shard=(n - 1, nodes))
        for n in range(1, nodes + 1)
    }
    models = {
        "linear probe": start,
        "synchronous (DDP)": target.fit(start, "all data, synchronous"),
        **local,
        "lo-fi": mean(list(local.values()), "target.mean", "average the nodes"),
    }
    return compare(target, models, {"one node (mean)": list(local)})
