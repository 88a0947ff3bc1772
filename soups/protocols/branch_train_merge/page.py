"""The report of Branch-Train-Merge: perplexities of every way to use the experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from soups.protocols.branch_train_merge.plan import Branch, BranchNodes
from soups.protocols.plan import Node, Plan
from soups.reporting.page import Curves, Page, Table
from soups.stores.pool import Pool

WAYS = ("own expert", "ensemble by posterior", "average by posterior", "uniform average")


def losses_by_way(nodes: BranchNodes, domains: Sequence[str], pool: Pool) -> dict[str, dict[str, float]]:
    """Return the test loss in nats a character by way and domain."""

    def of(node: Node, domain: str) -> float:
        return pool.ingredient(node.fingerprint).metrics[domain]["loss"]

    rows = {"dense": {domain: of(nodes.dense, domain) for domain in domains}}
    for branch in nodes.branches:
        scored = {
            "own expert": branch.expert,
            "ensemble by posterior": branch.ensemble,
            "average by posterior": branch.posterior_average,
            "uniform average": dict.fromkeys(domains, branch.uniform),
        }
        for way in WAYS:
            rows[f"{branch.label}: {way}"] = {domain: of(scored[way][domain], domain) for domain in domains}
    return rows


def branch_page(nodes: BranchNodes, domains: Sequence[str], plan: Plan, pool: Pool) -> Page:
    """Return the report."""
    losses = losses_by_way(nodes, domains, pool)
    means = {name: math.exp(sum(row.values()) / len(row)) for name, row in losses.items()}
    branches: list[Branch] = sorted(nodes.branches, key=lambda branch: branch.share)
    series: dict[str, list[float | None]] = {
        way: [means[f"{branch.label}: {way}"] for branch in branches] for way in WAYS
    }
    series["dense"] = [means["dense"]] * len(branches)
    best = min(means, key=lambda name: means[name])
    return Page(
        title="Branch-Train-Merge",
        subject="protocol",
        summary=(
            f"Lowest mean test perplexity: {best} ({means[best]:.2f} a character); dense {means['dense']:.2f} (one seed)."
        ),
        parts=[
            Table(
                title="Branch-Train-Merge: test perplexity a character",
                columns=["model", *domains, "mean"],
                rows=[
                    [name, *(math.exp(row[domain]) for domain in domains), means[name]] for name, row in losses.items()
                ],
                highlight=[list(losses).index(best)],
                note="Mean: of the losses, then exponentiated. All rows have the same number of training steps in all.",
            ),
            Curves(
                title="Perplexity against the seed phase",
                x_label="share of the budget in the seed phase, %",
                y_label="mean test perplexity",
                x=[100 * branch.share for branch in branches],
                series=series,
            ),
        ],
        lineage={
            node.label: pool.ingredient(node.fingerprint).weights
            for node in plan.nodes.values()
            if node.kind == "train"
        },
    )
