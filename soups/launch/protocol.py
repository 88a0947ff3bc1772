"""Hydra's driver of `+protocol=…`: the waves of a plan through Hydra's launcher, each node a job of its own, then the report.

A job knows the settings and the fingerprint of its node (`+node=…`); it builds the plan again and does that node alone. So a
job is a single run of the program for every launcher, and Lightning's DDP repeats that node, not the plan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from soups.errors import ConfigError, RunError, SoupError
from soups.fitting.environment import (
    is_first_process,
    kind_of_processes,
    needs_processes,
    refuse_sweeps_in_ranks,
    versions,
)
from soups.fitting.quiet import quiet
from soups.launch.failures import leave
from soups.launch.hydra_errors import check_hydra
from soups.launch.progress import SweepProgress
from soups.launch.search_space import split_arguments
from soups.launch.settings import (
    Settings,
    UserError,
    open_pool,
    resolve,
)
from soups.launch.terminal import show_end
from soups.protocols import Node, Plan, ProtocolRunner, build_protocol, execute, in_sequence, perform
from soups.protocols.plan import PLAN_VERSION
from soups.reporting import draw_page, page_tables, write_html
from soups.stores.pool import Failure, Ingredient, Pool
from soups.tracking import group_name, log_page
from soups.worker import Message, run_in_processes


class NodeMessage(Message):
    """A node of the settings' plan, by its fingerprint, for the processes that do it."""

    settings: Settings
    node: str


def find_node(plan: Plan, name: str) -> Node:
    """Return a node of a plan by its fingerprint.

    Raises:
        ConfigError: the settings give another plan.
    """
    if name not in plan.nodes:
        raise ConfigError(
            f"node={name[:16]} is not in the plan of these settings. Nodes are started by the program; leave +node out."
        )
    return plan.nodes[name]


def run_node(settings: Settings, name: str) -> None:
    """Do one node of the settings' plan and add its result to the pool; what the launched jobs call.

    Training on several devices runs in processes of its own, and so does a node that the others can do without: whatever
    kills it leaves the job, and the launcher's other jobs, alive.

    Raises:
        SoupError: the node failed; the pool knows why.
    """
    program = build_protocol(settings)
    devices = program.configuration.devices
    pool, node = open_pool(settings), find_node(program.plan(), name)
    with pool.lock(f"node-{name[:16]}"):
        if name in pool:
            return
        several = node.kind == "train" and needs_processes(devices)
        if several or node.optional:
            message = NodeMessage(settings=settings, node=name)
            try:
                run_in_processes(
                    run_node_in_ranks, message, reuse=None if node.optional else kind_of_processes(devices)
                )
            except RunError as error:
                pool.fail(Failure(fingerprint=name, error=str(error), determinants=node.determinants))
                raise
        else:
            perform(node, pool, program.operations(), keep=is_first_process())


def run_node_in_ranks(message: NodeMessage) -> None:
    """Do one node in this process, one of the ranks of its training; rank 0 keeps the result."""
    quiet()
    program = build_protocol(message.settings)
    node = find_node(program.plan(), message.node)
    perform(node, open_pool(message.settings), program.operations(), keep=is_first_process())


def run_protocol(
    config: DictConfig, context: HydraContext, launcher: Launcher, arguments: Sequence[str]
) -> Sequence[JobReturn]:
    """Run a protocol to its report.

    Raises:
        UserError: a mistake in settings or data; a plan whose targets cannot be reached.
        SystemExit: 3, when nodes failed.
    """
    quiet()
    try:
        refuse_sweeps_in_ranks()
        fixed, swept, _ = split_arguments(arguments)
        if swept:
            raise ConfigError(
                f"A protocol is one plan; {min(swept)} sweeps. Run the command once for each value; they share the pool."
            )
        composed = context.config_loader.load_sweep_config(config, fixed)
        check_hydra(composed.hydra)
        settings = resolve(composed)
        program = build_protocol(settings)
        plan = program.plan()
        missing, results = _run(settings, program, plan, launcher, fixed)
        if missing:
            Console(stderr=True).print(
                Panel(Text("\n".join(f"{name[:8]}  {why}" for name, why in missing.items())), style="red",
                      title=f"{len(missing)} of {len(plan.nodes)} nodes are missing; the same command tries them again")
            )  # fmt: skip
        lost = sum(node.fingerprint in missing for node in plan.targets)
        if lost == len(plan.targets):
            raise RunError("No target of the plan was reached, so there is nothing to report.")
        if not lost:
            _finish(settings, program, plan)
    except SoupError as error:
        raise UserError(f"\n{error}") from error
    leave(3 if missing else 0)
    return results


def _run(
    settings: Settings, program: ProtocolRunner[Any], plan: Plan, launcher: Launcher, fixed: list[str]
) -> tuple[dict[str, str], list[JobReturn]]:
    pool, console = open_pool(settings), Console(stderr=True)
    waves = plan.waves(pool)
    if waves and (earlier := earlier_results(pool)):
        console.print(
            f"{earlier} results in {pool.url} were made before nodes were named by everything that decides their fits (plan "
            f"version {PLAN_VERSION}); they stay, and this plan does not use them.",
            highlight=False,
        )
    left = sum(map(len, waves))
    counts = f"{program.name}: {len(plan.nodes)} nodes in the plan, {left} to do in {len(waves)} waves; pool "
    console.print(Text.assemble(counts, (pool.url, "bold"), "."), soft_wrap=True)
    here = in_sequence(pool, program.operations())
    results: list[JobReturn] = []

    def run(nodes: Sequence[Node]) -> Mapping[str, str]:
        errors = dict(here([node for node in nodes if node.kind == "merge"]))
        jobs = [node for node in nodes if node.kind != "merge"]
        if not jobs:
            return errors
        overrides = [[*fixed, f"+node={node.fingerprint}"] for node in jobs]
        try:
            returned = launcher.launch(overrides, initial_job_idx=len(results))
        except SoupError:
            raise
        except Exception as error:  # a launcher's own death (a killed worker, a lost cluster) keeps finished work
            stopped = f"the launcher stopped: {type(error).__name__}: {error}"
            return {**dict.fromkeys((node.fingerprint for node in jobs), stopped), **errors}
        results.extend(returned)
        for node, result in zip(jobs, returned, strict=False):
            if result.status == JobStatus.FAILED:
                errors[node.fingerprint] = str(getattr(result, "_return_value", ""))
        return errors

    if not left:
        return {}, results
    names = [node.fingerprint for wave in waves for node in wave]
    labels = {name: plan.nodes[name].label for name in names}
    with SweepProgress(pool, names, labels, len(plan.nodes) - left, "nodes", _line).running():
        return execute(plan, pool, run), results


def earlier_results(pool: Pool) -> int:
    """Return how many results of a pool have names of an earlier version, which no plan finds."""
    versions = [record.determinants.get("plan_version") for record in pool.ingredients()]
    return sum(version is not None and version < PLAN_VERSION for version in versions)


def _line(record: Ingredient) -> str:
    numbers = [
        f"{split} {name} {value:.4g}"
        for split, values in record.metrics.items()
        for name, value in values.items()
        if name != "count"
    ]
    return ", ".join(numbers[:3]) + (" …" if len(numbers) > 3 else "")


def report_folder(program: ProtocolRunner[Any], plan: Plan) -> Path:
    """Return where a plan's report is written."""
    name = f"{program.name}-{program.fingerprint(plan)[:8]}"
    return Path(program.configuration.paths.output) / "protocols" / name


def _finish(settings: Settings, program: ProtocolRunner[Any], plan: Plan) -> None:
    """Write, show and track the report."""
    console, folder = Console(), report_folder(program, plan)
    known = (folder / "page.json").is_file()
    page = program.page(plan, open_pool(settings))
    page = page.model_copy(update={"environment": versions(), "configs": {program.name: _plain(settings)}})
    folder.mkdir(parents=True, exist_ok=True)
    program.export(plan, open_pool(settings), folder)
    figures = draw_page(page, folder)
    write_html(page, folder / "report.html")
    page.save(folder)  # last: a folder with this file is whole
    if not known:
        log_page(
            settings["tracking"], Path(settings["paths"]["output"]), folder.name,
            group_name(settings["tracking"]["group"], settings["pool"]["path"]), page.model_dump(mode="json"), figures,
        )  # fmt: skip
    console.print()
    for table in page_tables(page):
        console.print(table)
    show_end(page.summary, page.warnings, folder, console)


def _plain(settings: Settings) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(json.dumps(settings, default=str)))
