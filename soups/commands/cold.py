"""`soups cold …`: work with a ColD Fusion repository from the command line, with any training code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from soups.commands.running import console, readable, reported

app = typer.Typer(
    help="ColD Fusion: one model, many contributors, no server (arXiv:2212.01378).", no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
Where = Annotated[str, typer.Argument(metavar="REPO", help="A folder, or an fsspec URL such as s3://bucket/model.")]


@app.command()
def init(
    repo: Where,
    base: Annotated[str, typer.Argument(help="The base model of the first round: a checkpoint or model folder.")],
    prefix: Annotated[
        str | None, typer.Option(help="Share only tensors with this prefix, and drop the prefix: 'bert.'.")
    ] = None,
    state: Annotated[
        str | None, typer.Option(help="The weights to read from a training checkpoint: raw, average, average:NAME.")
    ] = None,
    frozen: Annotated[
        list[str] | None, typer.Option(help="A pattern of tensors that no contributor trains; may be repeated.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer's folder. Default: BASE's own tokenizer.")
    ] = None,
    quorum: Annotated[int, typer.Option(min=1, help="The number of contributions that a round needs.")] = 2,
    method: Annotated[
        str, typer.Option(help="Reduction: linear (mean), median, trimmed_mean, or any merge method.")
    ] = "linear",
    parameter: Annotated[
        list[str] | None, typer.Option(help="A parameter of the method, as name=number; may be repeated.")
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Shorten updates to this multiple of the median norm.")] = None,
    max_norm: Annotated[
        float, typer.Option(help="Refuse updates above this multiple of the median norm; 0: no limit.")
    ] = 4.0,
    stale: Annotated[str, typer.Option(help="Rule for contributions to an earlier base: rebase or refuse.")] = "rebase",
    max_age: Annotated[
        int | None, typer.Option(min=0, help="Refuse contributions whose base is more rounds old than this.")
    ] = None,
) -> None:
    """Create a repository from a base model."""
    with reported():
        from pydantic import ValidationError

        from soups.errors import ConfigError
        from soups.protocols.cold_fusion import Policy, Repository
        from soups.stores import open_store

        try:
            policy = Policy(
                quorum=quorum, method=method, parameters=_parameters(parameter or []), clip=clip,
                max_norm=max_norm or None, stale=stale, max_age=max_age,  # pyright: ignore[reportArgumentType]
            )  # fmt: skip
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(
                f"--{str(first['loc'][0]).replace('_', '-')}={first['input']}: {first['msg']}."
            ) from error
        with open_store(base, prefix=prefix, state=state) as store:
            repository = Repository.create(repo, store, policy, frozen=frozen or (), tokenizer=tokenizer or base)
        numbers = repository.manifest.tensors
        console.print(
            f"{repo}: base 0 with {len(numbers)} shared tensors; {policy!r}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )


def _parameters(texts: list[str]) -> dict[str, Any]:
    from soups.errors import ConfigError

    values: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            raise ConfigError(f"--parameter {text}: write name=number.") from None
    return values


@app.command()
def pull(
    repo: Where,
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    base: Annotated[int | None, typer.Option(min=0, help="The number of the base. Default: the current base.")] = None,
) -> None:
    """Download the current base, or an earlier one."""
    with reported():
        from soups.protocols.cold_fusion import Repository
        from soups.stores import write_safetensors

        found, weights = Repository(repo).pull(base)
        write_safetensors(out, weights, {"cold.base": found.hash, "cold.number": str(found.number)})
        console.print(f"{out}: base {found.number}. Fine-tune it, then: soups cold push {repo} CHECKPOINT "
                      f"--base {found.number} --contributor NAME", soft_wrap=True, highlight=False, markup=False)  # fmt: skip


@app.command()
def push(
    repo: Where,
    checkpoint: Annotated[
        str, typer.Argument(help="The fine-tuned weights: .ckpt, .pt, .safetensors or a model folder.")
    ],
    base: Annotated[str, typer.Option(help="The number or hash of the base that was fine-tuned.")],
    contributor: Annotated[str, typer.Option(help="Your name for the log.")],
    prefix: Annotated[
        str | None, typer.Option(help="The prefix of the shared tensors' names in the checkpoint: 'model.'.")
    ] = None,
    state: Annotated[
        str | None, typer.Option(help="The weights to read from a training checkpoint: raw, average, average:NAME.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The name of the fine-tuning task, for the log.")] = None,
) -> None:
    """Contribute fine-tuned weights. Only the repository's shared tensors are uploaded; heads are not."""
    with reported():
        from soups.protocols.cold_fusion import Repository

        repository = Repository(repo)
        record = repository.push(
            checkpoint, int(base) if base.isdigit() and len(base) < 20 else base, contributor,
            {"task": task} if task else None, prefix=prefix, state=state,
        )  # fmt: skip
        waiting, quorum = len(repository.pending()), repository.manifest.policy.quorum
        console.print(
            f"Contribution {record.id[:8]}, {readable(record.nbytes)}; {waiting} waiting, a round needs {quorum}."
        )


@app.command()
def fuse(repo: Where) -> None:
    """Run the next round, if enough contributions are accepted."""
    with reported():
        from soups.protocols.cold_fusion import Repository

        repository = Repository(repo)
        record = repository.fuse()
        if record is None:
            quorum = repository.manifest.policy.quorum
            console.print(
                f"No round: {len(repository.pending())} waiting, {quorum} must pass (or another fuser was first)."
            )
            return
        _print_round(record)


@app.command()
def log(repo: Where) -> None:
    """Print the rounds with their accepted and refused contributions, and the waiting contributions."""
    with reported():
        from soups.protocols.cold_fusion import Repository

        repository = Repository(repo)
        console.print(f"base 0  {repository.manifest.base[:12]}  {repository.manifest.created}", highlight=False)
        for record in repository.rounds():
            _print_round(record)
        for record in repository.pending():
            console.print(
                f"waiting {record.id[:8]}  {record.contributor}  {record.note or ''}", highlight=False, markup=False
            )


def _print_round(record: Any) -> None:
    console.print(
        f"base {record.number}  {record.result[:12]}  {record.created}  {len(record.accepted)} of {len(record.verdicts)} by "
        f"{record.policy.method}, fused by {record.fuser}",
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip
    for verdict in record.verdicts:
        norm = "" if verdict.norm is None else f"norm {verdict.norm:.4g}"
        scale = "" if verdict.scale == 1 else f" × {verdict.scale:.3g}"
        how = f"from base {verdict.started} {norm}{scale}" if verdict.accepted else f"refused: {verdict.reason}"
        console.print(
            f"   {verdict.id[:8]}  {verdict.contributor}  {how}", soft_wrap=True, highlight=False, markup=False
        )


@app.command("replay")
def replay_(
    repo: Where, number: Annotated[int | None, typer.Option("--round", min=1, help="Only this round.")] = None
) -> None:
    """Recompute the rounds from the log and compare every bit; exit with 1 if a round differs."""
    with reported():
        from soups.errors import StorageError
        from soups.protocols.cold_fusion import Repository, replay

        differ = 0
        for result in replay(Repository(repo), number):
            console.print(
                f"round {result.number}  {result.accepted} contributions  {'same bits' if result.same else 'DIFFERS'}"
            )
            differ += not result.same
        if differ:
            raise StorageError(
                f"{differ} rounds of {repo} did not come out as the log says; it was changed after the fact."
            )
