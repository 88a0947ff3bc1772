"""`soups merge CONFIG OUT`: merge models as a YAML configuration describes it."""

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
    config: Annotated[Path, typer.Argument(help="The YAML configuration: a method, its models and parameters.")],
    out: Annotated[str | None, typer.Argument(help="The output: a folder, a file or a URL.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan of the merge; write nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Treat warnings as errors.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    random_seed: Annotated[int, typer.Option(help="The seed of methods that draw random numbers (DARE, DELLA).")] = 0,
    out_shard_size: Annotated[str, typer.Option(help="The largest size of one output file: 500M, 5G.")] = "5G",
    memory: Annotated[str, typer.Option(help="Working memory: 512M, 2G.")] = "512M",
    threads: Annotated[
        int | None,
        typer.Option("--threads", "-j", "--num-threads", min=1, help="The number of threads. Default: one per core."),
    ] = None,
    device: Annotated[str, typer.Option(help="The device to compute on: cpu, cuda, cuda:1.")] = "cpu",
    cuda: Annotated[bool, typer.Option("--cuda", help="Short for --device cuda.")] = False,
    compiled: Annotated[
        bool | None,
        typer.Option(help="Use the compiled C kernels: the same result, faster. Default: if they were built."),
    ] = None,
    copy_tokenizer: Annotated[bool, typer.Option(help="Write the tokenizer beside the weights.")] = True,
    write_model_card: Annotated[bool, typer.Option(help="Write a README.md beside the weights.")] = True,
    unsafe_truncate_embeddings: Annotated[
        bool,
        typer.Option("--unsafe-truncate-embeddings", help="Cut embeddings of different lengths to the shortest one."),
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write a page about the merge to this HTML file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")] = False,
    lora_merge_cache: Annotated[str | None, typer.Option(hidden=True)] = None,
    lora_merge_dtype: Annotated[str | None, typer.Option(hidden=True)] = None,
    transformers_cache: Annotated[str | None, typer.Option(hidden=True)] = None,
    lazy_unpickle: Annotated[bool, typer.Option(hidden=True)] = True,
    allow_crimes: Annotated[bool, typer.Option(hidden=True)] = False,
    low_cpu_memory: Annotated[bool, typer.Option(hidden=True)] = False,
    trust_remote_code: Annotated[bool, typer.Option(hidden=True)] = False,
    safe_serialization: Annotated[bool, typer.Option(hidden=True)] = True,
    clone_tensors: Annotated[bool, typer.Option(hidden=True)] = False,
    read_to_gpu: Annotated[bool, typer.Option(hidden=True)] = False,
    multi_gpu: Annotated[bool, typer.Option(hidden=True)] = False,
    gpu_rich: Annotated[bool, typer.Option(hidden=True)] = False,
    async_write: Annotated[bool, typer.Option(hidden=True)] = False,
    write_threads: Annotated[int | None, typer.Option(hidden=True)] = None,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, hidden=True)] = 0,
) -> None:
    """Merge models as a YAML configuration describes it, and write the merged model.

    mergekit's configurations run unchanged. `soups methods` lists the merge methods; `soups methods NAME` prints a
    configuration to start from.

    mergekit's options about memory, reading and hardware (--lazy-unpickle, --low-cpu-memory, --gpu-rich and others) are
    accepted and have no effect: soups always reads checkpoints in parts, without running pickles, and applies LoRA adapters
    while it reads.
    """
    del lora_merge_cache, lora_merge_dtype, transformers_cache, lazy_unpickle, allow_crimes, low_cpu_memory
    del trust_remote_code, clone_tensors, read_to_gpu, multi_gpu, gpu_rich, async_write, write_threads, verbose
    with reported():
        from soups.errors import ConfigError

        if not safe_serialization:
            raise ConfigError("soups merge writes only safetensors; remove --no-safe-serialization.")
        if dry_run:
            from soups.merging.mergekit import describe_plan
            from soups.merging.mergekit.run import document_order

            configuration, plans = describe_plan(
                config, seed=random_seed, strict=strict, truncate_embeddings=unsafe_truncate_embeddings, warn=warn
            )
            for number, planned in enumerate(plans):
                if len(plans) > 1:
                    name = configuration.documents[document_order(configuration)[number]].name
                    console.print(name or "result", style="bold", markup=False)
                _print_plan(planned, parse_size(memory), threads)
            return
        if out is None:
            raise ConfigError("Give the output's folder, file or URL: soups merge CONFIG OUT.")
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
            console.print(
                f"{path}: {readable(done)} read in {seconds:.1f} s, {readable(done / seconds)}/s",
                soft_wrap=True,
                markup=False,
            )
            if compiled is None and device == "cpu" and not cuda and (reason := unavailable()):
                console.print(f"[dim]The compiled C kernels would be faster; {reason}.[/]")
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
    largest = max((job.working_bytes() for job in plan.jobs), default=0)
    console.print(f"configuration and tokenizer from {planned.donor}", soft_wrap=True, markup=False)
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
