"""`soups stats`: collect a model's statistics, add up the files of several data parts, show a file."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soups.commands.running import console, parse_size, readable, reported

if TYPE_CHECKING:
    from torch import nn

app = typer.Typer(
    no_args_is_help=True, help="Statistics for merge methods that need data: Gram matrices, Fisher diagonals."
)


@app.command()
def collect(
    model: Annotated[str, typer.Argument(help="A Hugging Face model folder, or timm:NAME=CHECKPOINT.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    data: Annotated[
        Path, typer.Option(help="A text file (one text a line; .csv, .tsv, .jsonl), or a folder of images.")
    ],
    kinds: Annotated[str, typer.Option(help="Kinds, separated by commas: gram, fisher, kfac_out, ….")] = "gram",
    fisher: Annotated[str, typer.Option(help="Estimator: true, sampled or empirical.")] = "sampled",
    examples: Annotated[
        int, typer.Option(min=1, help="Use at most this many examples, from the beginning of the data.")
    ] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Examples in a forward pass.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Cut each text to this many tokens.")] = 128,
    all_rows: Annotated[bool, typer.Option("--all-rows", help="Count the rows of padding too.")] = False,
    seed: Annotated[int, typer.Option(help="The seed of the drawn labels (--fisher sampled).")] = 0,
    device: Annotated[str, typer.Option(help="The device of the model: cpu, cuda, cuda:1.")] = "cpu",
    half: Annotated[bool, typer.Option("--half", help="Run the model in bfloat16; sums stay in float64.")] = False,
    memory: Annotated[str, typer.Option(help="The most memory for the sums: 2G.")] = "8G",
    float32: Annotated[bool, typer.Option("--float32", help="Write float32: half the size.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")] = False,
) -> None:
    """Run a model over data and write its statistics.

    If a run is interrupted, run the same command again to resume it.
    """
    with reported():
        import torch

        from soups.errors import StorageError
        from soups.statistics import collect as collected
        from soups.statistics import hash_store, sizes
        from soups.stores import open_store

        if out.exists():
            raise StorageError(f"{out} is there already. Remove it, or name another file.")
        wanted = [kind.strip() for kind in kinds.split(",") if kind.strip()]
        module, checkpoint, batches = _opened(model, data, examples, batch, max_tokens)
        module = module.to(device=device, dtype=torch.bfloat16 if half else torch.float32)
        total = sum(sizes(module, [kind for kind in wanted if kind != "sensitivity"]).values())
        if not quiet:
            console.print(f"Sums of {readable(total)} in memory.", highlight=False)
        with open_store(checkpoint) as store:
            weights_hash = hash_store(store)
        start = time.perf_counter()

        def on_group(number: int, count: int) -> None:
            seconds = time.perf_counter() - start
            if number == 1 and not quiet:
                console.print(f"About {seconds / count * examples:.0f} s for {examples} examples.", highlight=False)

        found = collected(
            module, batches, wanted, fisher=fisher, mask="none" if all_rows else None, seed=seed, group=batch, device=device,
            budget=parse_size(memory), resume=out, weights_hash=weights_hash, on_group=on_group,
        )  # fmt: skip
        found.save(out, dtype=torch.float32 if float32 else torch.float64)
        if not quiet:
            _show(out)


@app.command()
def merge(
    parts: Annotated[list[Path], typer.Argument(help="Statistics files of one model, collected over different data.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
) -> None:
    """Add up one model's statistics of several parts of the data."""
    with reported():
        from contextlib import ExitStack

        from soups.errors import StorageError
        from soups.statistics import Statistics

        if out.exists():
            raise StorageError(f"{out} is there already. Remove it, or name another file.")
        with ExitStack() as stack:
            found = [stack.enter_context(Statistics.open(part)) for part in parts]
            total = found[0]
            for part in found[1:]:
                total = total + part
            total.save(out)
        _show(out)


@app.command()
def show(path: Annotated[Path, typer.Argument(help="A statistics file.")]) -> None:
    """Print the contents of a statistics file, and the weights that it does not cover."""
    with reported():
        _show(path)


def _show(path: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    from soups.statistics import Statistics

    with Statistics.open(path) as found:
        table = Table("kind", "tensors", "rows", box=None)
        for kind in found.kinds:
            names = found.names(kind)
            counts = sorted({found.count(name) for name in names})
            table.add_row(kind, str(len(names)), str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}")
        console.print(
            Text(f"{path}: {found.examples} examples, {found.mask}, {readable(path.stat().st_size)}"), soft_wrap=True
        )
        console.print(table)
        if found.uncovered:
            console.print(f"{len(found.uncovered)} parameters are not covered:", highlight=False)
            for name, why in list(found.uncovered.items())[:12]:
                console.print(Text(f"  {name}: {why}"))
            if len(found.uncovered) > 12:
                console.print(f"  and {len(found.uncovered) - 12} more")


def _opened(model: str, data: Path, examples: int, batch: int, max_tokens: int) -> tuple[nn.Module, str, Iterator[Any]]:
    """Return a network, the checkpoint that holds its weights, and batches for it."""
    from soups.errors import DataError

    if not data.exists():
        raise DataError(f"There is no {data}. --data names a text file or a folder of images.")
    if model.startswith("timm:"):
        module, checkpoint, transform = _timm(model)
        return module, checkpoint, _images(data, transform, examples, batch)
    if data.is_dir():
        module, transform = _huggingface_images(model)
        return module, model, _images(data, transform, examples, batch)
    module, tokenizer = _huggingface_texts(model)
    return module, model, _texts(data, tokenizer, examples, batch, max_tokens)


def _timm(model: str) -> tuple[nn.Module, str, Any]:
    import timm
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    from soups.errors import ConfigError
    from soups.stores import open_store

    name, _, checkpoint = model.removeprefix("timm:").partition("=")
    if not checkpoint:
        raise ConfigError(f"{model} names no weights: timm:{name}=/path/of/a/checkpoint.")
    with open_store(checkpoint) as store:
        weights = store.load()
    try:
        module: Any = timm.create_model(name)
        head = weights.get(f"{module.default_cfg['classifier']}.weight")
        if head is not None:
            module.reset_classifier(len(head))
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"{checkpoint} does not fit timm's {name}: {str(error).splitlines()[-1].strip()}") from error
    return module, checkpoint, create_transform(**resolve_data_config({}, model=module))


def _huggingface(model: str) -> nn.Module:
    import transformers

    from soups.errors import ConfigError

    if not (Path(model) / "config.json").is_file():
        raise ConfigError(
            f"{model} is no Hugging Face model folder (it has no config.json), and no timm:NAME=CHECKPOINT."
        )
    config = transformers.AutoConfig.from_pretrained(model)
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if kind is None:
        raise ConfigError(f"{model}: this version of transformers has no {names[0]}.")
    return kind.from_pretrained(model)


def _huggingface_texts(model: str) -> tuple[nn.Module, Any]:
    import transformers

    return _huggingface(model), transformers.AutoTokenizer.from_pretrained(model)


def _huggingface_images(model: str) -> tuple[nn.Module, Any]:
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(model)
    return _huggingface(model), lambda image: processor(image, return_tensors="pt")["pixel_values"][0]


def _texts(path: Path, tokenizer: Any, examples: int, batch: int, max_tokens: int) -> Iterator[Any]:
    from soups.errors import DataError

    if path.suffix in (".csv", ".tsv", ".jsonl"):
        from soups.tasks.text_files import read_rows

        found = (row[0] for row in read_rows(path, "text", "label"))
    else:
        found = (line.strip() for line in path.read_text().splitlines() if line.strip())
    texts = list(itertools.islice(found, examples))
    if not texts:
        raise DataError(f"{path} holds no texts.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for first in range(0, len(texts), batch):
        part = tokenizer(
            texts[first : first + batch], padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        )
        yield dict(part)


def _images(folder: Path, transform: Any, examples: int, batch: int) -> Iterator[Any]:
    import torch
    from torchvision.datasets import ImageFolder

    from soups.errors import DataError

    try:
        images = ImageFolder(str(folder), transform=transform)
    except FileNotFoundError as error:
        raise DataError(f"{folder} is no folder of images by class (one folder a class): {error}.") from error
    # Spread over the classes, in a fixed order.
    order = torch.linspace(0, len(images) - 1, min(examples, len(images))).round().long().tolist()
    for first in range(0, len(order), batch):
        pairs = [images[number] for number in order[first : first + batch]]
        yield [torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])]
