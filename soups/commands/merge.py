"""`soups merge CONFIG OUT`: mergekit's YAML, run by our engine."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soups.commands.running import console, parse_size, progress_bar, quick_imports, readable, reported, warn

if TYPE_CHECKING:
    from soups.merging.mergekit.planning import Planned


def merge(
    config: Annotated[Path, typer.Argument(help="A configuration in mergekit's format.")],
    out: Annotated[str | None, typer.Argument(help="The folder or file to make, or its URL.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read headers only.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Make every warning an error.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
    random_seed: Annotated[int, typer.Option(help="Seed of random masks.")] = 0,
    out_shard_size: Annotated[str, typer.Option(help="Most bytes in one file: 500M, 5G.")] = "5G",
    memory: Annotated[str, typer.Option(help="Working memory: 512M, 2G.")] = "512M",
    threads: Annotated[int | None, typer.Option(min=1, help="Workers; one a core by default.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")] = "cpu",
    cuda: Annotated[bool, typer.Option("--cuda", help="The same as --device cuda.")] = False,
    compiled: Annotated[
        bool | None,
        typer.Option(help="Loops in C: the same bits, sooner. By default where they were built, at installation."),
    ] = None,
    copy_tokenizer: Annotated[bool, typer.Option(help="Take the tokenizer along.")] = True,
    write_model_card: Annotated[bool, typer.Option(help="Write a README.md.")] = True,
    unsafe_truncate_embeddings: Annotated[
        bool,
        typer.Option("--unsafe-truncate-embeddings", help="Cut embeddings of different lengths to the shortest."),
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML page about the merge here.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    lora_merge_cache: Annotated[str | None, typer.Option(hidden=True)] = None,
    lazy_unpickle: Annotated[bool, typer.Option(hidden=True)] = True,
    allow_crimes: Annotated[bool, typer.Option(hidden=True)] = False,
    low_cpu_memory: Annotated[bool, typer.Option(hidden=True)] = False,
    trust_remote_code: Annotated[bool, typer.Option(hidden=True)] = False,
    safe_serialization: Annotated[bool, typer.Option(hidden=True)] = True,
) -> None:
    """Merge models by a mergekit configuration.

    mergekit's --lora-merge-cache, --lazy-unpickle, --allow-crimes, --low-cpu-memory, --trust-remote-code and
    --safe-serialization are accepted and not needed: adapters are merged while reading, no pickle is run, memory is bounded.
    """
    del lora_merge_cache, lazy_unpickle, allow_crimes, low_cpu_memory, trust_remote_code
    with reported():
        from soups.errors import ConfigError

        if not safe_serialization:
            raise ConfigError("Outputs are always safetensors; leave --no-safe-serialization out.")
        if dry_run:
            from soups.merging.mergekit import describe_plan
            from soups.merging.mergekit.run import document_order

            configuration, plans = describe_plan(
                config, seed=random_seed, strict=strict, truncate_embeddings=unsafe_truncate_embeddings, warn=warn
            )
            for number, planned in enumerate(plans):
                if len(plans) > 1:
                    name = configuration.documents[document_order(configuration)[number]].name
                    console.print(f"[bold]{name or 'result'}[/]")
                _print_plan(planned, parse_size(memory), threads)
            return
        if out is None:
            raise ConfigError("Name the folder or file to make: soups merge CONFIG OUT.")
        with quick_imports():
            from soups.merging.kernels import unavailable
            from soups.merging.mergekit import merge_configuration

        start = time.perf_counter()
        done = 0
        said: list[str] = []

        def warn_(message: str) -> None:
            said.append(message)
            warn(message)

        with ExitStack() as stack:
            advance: list[Any] = []

            def planned_(planned: Planned) -> None:
                advance[:] = [stack.enter_context(progress_bar(planned.plan.bytes_to_read, quiet=quiet))]

            def progress(count: int) -> None:
                nonlocal done
                done += count
                advance[0](count)

            path = merge_configuration(
                config,
                out,
                seed=random_seed,
                strict=strict,
                overwrite=overwrite,
                truncate_embeddings=unsafe_truncate_embeddings,
                copy_tokenizer=copy_tokenizer,
                write_card=write_model_card,
                shard_bytes=parse_size(out_shard_size),
                warn=warn_,
                planned=planned_,
                budget=parse_size(memory),
                threads=threads,
                device="cuda" if cuda else device,
                compiled=compiled,
                progress=progress,
            )
        seconds = time.perf_counter() - start
        if not quiet:
            console.print(f"{path}: {readable(done)} read in {seconds:.1f} s, {readable(done / seconds)}/s")
            if compiled is None and device == "cpu" and not cuda and (reason := unavailable()):
                console.print(f"[dim]With compiled loops it takes less time; {reason}.[/]")
        if report is not None:
            from soups.commands.inspect import layer_of
            from soups.reporting.html import write_html
            from soups.reporting.merge_page import merge_page

            write_html(merge_page(config, out, layer_of, seed=random_seed, seconds=seconds, warnings=said), report)


def _print_plan(planned: Planned, budget: int, threads: int | None) -> None:
    from rich.table import Table

    from soups.merging.stream import available_cores

    plan = planned.plan
    table = Table("tensors", "method", "of models", "dtype", box=None)
    groups: dict[tuple[str, int, str], int] = {}
    for job in plan.jobs:
        name = "copied" if job.method is None else type(job.method).__name__
        key = (name, len(job.models), str(job.meta.dtype).removeprefix("torch."))
        groups[key] = groups.get(key, 0) + 1
    for (name, count, dtype), tensors in groups.items():
        table.add_row(str(tensors), name, str(count), dtype)
    console.print(table)
    whole = [job for job in plan.jobs if job.method is not None and job.method.unit == "tensor"]
    largest = max((job.meta.numel * 4 * (2 * len(job.models) + 6) for job in whole), default=0)
    console.print(f"configuration and tokenizer from {planned.donor}", soft_wrap=True)
    if planned.shared:
        vocabulary = planned.shared.vocabulary
        console.print(
            f"vocabulary of {len(vocabulary.ids)} tokens, {planned.shared.size} rows, begun from {vocabulary.folder}"
        )
    console.print(
        f"to read  {readable(plan.bytes_to_read)} (once; methods that look at tensors first read more than once)"
    )
    console.print(f"to write {readable(plan.bytes_to_write)}")
    console.print(f"memory   {readable(max(budget, largest))} at most, {threads or available_cores()} threads")
