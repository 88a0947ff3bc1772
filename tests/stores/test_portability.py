"""What Windows lacks is not needed: import, merge, resume, lock and read without fcntl, preadv and their like."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

PROGRAM = """
    import os, sys
    for name in ("fcntl", "resource", "grp", "pwd", "termios"):
        sys.modules[name] = None
    for name in ("preadv", "pread", "pwrite", "pwritev", "posix_fallocate", "posix_fadvise", "sched_getaffinity", "O_CLOEXEC"):
        if hasattr(os, name):
            delattr(os, name)
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path
    import torch
    import soups, soups.cli, soups.merging, soups.recipes, soups.protocols.cold_fusion, callbacks
    from soups.errors import StorageError
    from soups.merging import merge
    from soups.stores import FolderWriter, TensorMeta, open_store, write_safetensors
    from soups.stores.garbage import leftovers, remove
    from soups.stores.pool import Pool
    from soups.stores.records import Ingredient

    root = Path(sys.argv[1])
    weights = [{name: torch.randn(5000, generator=torch.Generator().manual_seed(10 * n + k)) for k, name in enumerate("abc")} for n in range(2)]
    for number, tensors in enumerate(weights):
        (root / f"m{number}").mkdir()
        write_safetensors(root / f"m{number}/model.safetensors", tensors)
        torch.save(tensors, root / f"{number}.pt")
    expected = merge("linear", weights)
    for models in ([root / "m0", root / "m1"], [root / "0.pt", root / "1.pt"]):
        for out in ("folder", "one.safetensors", "one.pt", "memory"):
            place = f"memory://{root.name}/x" if out == "memory" else root / out
            merge("linear", models, out=place, shard_bytes=20_000, overwrite=True, threads=4)
            with open_store(place) as store:
                assert all(torch.equal(store.read(name), expected[name]) for name in expected), out
    # Many threads read and write one file through one position in it.
    with open_store(root / "m0") as store, ThreadPoolExecutor(8) as executor:
        pieces = list(executor.map(lambda i: store.read_flat("b", 10 * i, 10 * i + 10), range(500)))
        assert torch.equal(torch.cat(pieces), weights[0]["b"])
    plan = {name: TensorMeta((5000,), torch.float32) for name in "abc"}
    writer = FolderWriter(root / "locked", plan, fingerprint="f" * 64)
    try:
        FolderWriter(root / "locked", plan, fingerprint="f" * 64)
        raise AssertionError("two writers of one output met")
    except StorageError as error:
        assert "Another process is writing" in str(error)
    writer.abort()
    pool = Pool(root / "pool")
    with pool.lock("start"):
        pool.add(Ingredient(fingerprint="a" * 64, determinants={}), weights[0])
    assert torch.equal(pool.weights("a" * 64, verify=True)["a"], weights[0]["a"])
    remove(pool, leftovers(pool, None, age=-1)[0])
    assert pool.folder.create("record", b"1") and not pool.folder.create("record", b"2")
    left = sorted(path.name for path in root.iterdir() if path.name.startswith("."))
    assert left == [], left
    print("done")
"""


def test_without_what_windows_lacks(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout == "done\n"
