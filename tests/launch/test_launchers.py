"""The same sweep on every launcher: the same ingredients and soup, bit for bit; and what happens when one breaks."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from soups.errors import ConfigError
from soups.launch.ray_cluster import cluster
from soups.stores.pool import Pool
from soups.worker import DISTRIBUTED_VARIABLES
from tests.launch.conftest import ROOT, SWEEP, compose_settings
from tests.stores.s3 import bucket_url, s3_server

__all__ = ["bucket_url", "s3_server"]  # fixtures

Run = Callable[..., subprocess.CompletedProcess]
TWO = [*SWEEP, "sweep.size=2"]
slow = pytest.mark.slow


def soup_of(base: Path) -> str:
    (folder,) = (base / "outputs" / "soups").iterdir()
    return json.loads((folder / "report.json").read_text())["lineage"]["soup"]


def hashes(pool: Pool) -> dict[str, str]:
    return {record.fingerprint: record.weights for record in pool.ingredients()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sweep on the basic launcher is kept; made once for this file."""
    return tmp_path_factory.mktemp("reference")


@pytest.fixture
def basic(reference: Path, train_py: Run) -> Path:
    if not (reference / "outputs").exists():
        done = train_py(*TWO, f"pool.path={reference}/pool", f"paths.output={reference}/outputs")
        assert done.returncode == 0, done.stdout
    return reference


@slow
def test_submitit_and_a_pool_on_s3(basic: Path, train_py: Run, tmp_path: Path, bucket_url: str) -> None:
    """Processes that share nothing but an object store, as the nodes of a cluster do."""
    pytest.importorskip("submitit", reason="pip install 'soups[slurm]'")
    done = train_py(*TWO, f"pool.path={bucket_url}", "hydra/launcher=submitit_local_capped", "hydra.launcher.jobs=1")
    assert done.returncode == 0, done.stdout
    assert len(list(tmp_path.glob("outputs/sweeps/**/.submitit/*/*_log.out"))) == 2, "one process a job"
    pool = Pool(bucket_url)
    assert hashes(pool) == hashes(Pool(basic / "pool"))
    assert soup_of(tmp_path) == soup_of(basic)
    assert len({record.layout["process"] for record in pool.ingredients()}) == 2


# Loaded at the start of every process that the test's environment reaches: the first Ray worker that is in the middle of a
# fit kills itself, as a node does that is taken away.
DIE_ONCE = """
import glob, os, signal, sys, threading, time
def die():
    while not glob.glob(os.environ["PROGRESS"]):
        time.sleep(0.01)
    try:
        os.close(os.open(os.environ["DIED"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
if any("default_worker.py" in argument for argument in sys.orig_argv):
    threading.Thread(target=die, daemon=True).start()
"""


@slow
def test_a_ray_cluster_and_a_worker_that_dies(basic: Path, train_py: Run, tmp_path: Path) -> None:
    """A cluster is started, loses a worker in the middle of a fit, makes that job again, and is stopped."""
    pytest.importorskip("ray", reason="pip install 'soups[ray]'")
    shutil.copytree(basic / "pool" / "starts", tmp_path / "pool" / "starts")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DIE_ONCE)
    environment = {
        "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}",
        "PROGRESS": f"{tmp_path}/pool/progress/*.json",
        "DIED": str(tmp_path / "died"),
        "HOME": str(tmp_path),  # Ray writes a token there
    }
    done = train_py(*TWO, "hydra/launcher=ray_local", "hydra.launcher.jobs=1", env=environment)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "died").exists(), "no worker was killed, so nothing was shown"
    assert hashes(Pool(tmp_path / "pool")) == hashes(Pool(basic / "pool"))
    assert soup_of(tmp_path) == soup_of(basic)
    assert not [name for name in running() if str(tmp_path) in name and "ray" in name], "the cluster was stopped"


def running() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            command = path.with_name("cmdline").read_bytes() + path.read_bytes()
        except OSError:  # it has just ended, or is somebody else's
            continue
        if int(path.parent.name) != os.getpid():
            found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_a_ray_address_that_does_not_answer() -> None:
    pytest.importorskip("ray", reason="pip install 'soups[ray]'")
    options = {"jobs": None, "cpus_per_job": 1, "gpus_per_job": 0, "retries": 0, "timeout": 1, "runtime_env": None}
    began = time.monotonic()
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        for address in (f"ray://127.0.0.1:{taken.getsockname()[1]}", f"127.0.0.1:{taken.getsockname()[1]}"):
            with pytest.raises(
                ConfigError, match=rf"Cannot reach a Ray cluster at {address}: .*hydra/launcher=ray_local"
            ):
                cluster({**options, "address": address}).__enter__()
    with pytest.raises(ConfigError, match=r"an address is HOST:PORT \(6379 is usual\)"):
        cluster({**options, "address": "head"}).__enter__()
    assert time.monotonic() - began < 20, "Ray itself tries for minutes"


# What a cluster's programs do, as far as submitit asks them: sbatch keeps the file and starts its tasks.
SBATCH = """#!{python}
import os, re, subprocess, sys
text = open(sys.argv[-1]).read()
open(os.environ["SUBMITTED"], "w").write(text)
first, last = re.search(r"--array=(\\d+)-(\\d+)", text).groups()
for task in range(int(first), int(last) + 1):
    job = dict(SLURM_JOB_ID=str(70 + task), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID=str(task), SLURM_NTASKS="1",
               SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_NNODES="1", SLURM_JOB_NODELIST="localhost")
    subprocess.Popen(["bash", sys.argv[-1]], env={{**os.environ, **job}}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 7")
"""
SRUN = """#!{python}
import os, sys
place = next(i for i, word in enumerate(sys.argv) if word.endswith("python") or "python3" in os.path.basename(word))
os.execv(sys.argv[place], sys.argv[place:])
"""
SACCT = """#!{python}
print("JobID|State|NodeList"); [print(f"7_{{i}}|COMPLETED|localhost") for i in range(2)]
"""
APP = """
import hydra
from hydra.core.hydra_config import HydraConfig
@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    import os
    open(f"{cfg.out}/{cfg.lr}", "w").write(os.environ["SLURM_ARRAY_TASK_ID"])
if __name__ == "__main__":
    main()
"""


@slow
def test_the_slurm_preset_submits_an_array(tmp_path: Path) -> None:
    """Everything between the command and the cluster is real; sbatch, srun and sacct are stand-ins."""
    pytest.importorskip("submitit", reason="pip install 'soups[slurm]'")
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text.format(python=sys.executable))
        program.chmod(0o755)
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text(f"lr: 1\nout: {tmp_path}")
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SUBMITTED": str(tmp_path / "submitted"),
    }  # fmt: skip
    launcher = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.array_parallelism=1"]
    command = [sys.executable, "app.py", "-m", *launcher, "lr=1,2"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert ((tmp_path / "1").read_text(), (tmp_path / "2").read_text()) == ("0", "1")
    submitted = (tmp_path / "submitted").read_text()
    for line in (
        "--array=0-1%1",
        "--partition=gpu",
        "--time=240",
        "--cpus-per-task=4",
        "--signal=USR2@60",
        "--open-mode",
    ):
        assert f"#SBATCH {line}" in submitted, submitted


@slow
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_processes_started_outside_make_one_run(launcher: str, overrides: list[str], tmp_path: Path) -> None:
    """As on several nodes: variables say who is who, and Lightning starts nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [str(ROOT / "train.py"), *overrides, "trainer.devices=2", "trainer.strategy=ddp"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_PORT": port}
    if launcher == "torchrun":
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--master-addr=127.0.0.1",
            f"--master-port={port}",
        ]
        ranks = [([sys.executable, *torchrun, *command], environment)]
    else:  # what srun --ntasks=2 gives its processes
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
        job |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1"}
        ranks = [
            ([sys.executable, *command], {**environment, **job, "SLURM_PROCID": rank, "SLURM_LOCALID": rank})
            for rank in ("0", "1")
        ]
    started = [
        subprocess.Popen(program, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for program, variables in ranks
    ]
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "".join(printed)
    (record,) = Pool(tmp_path / "pool").ingredients()
    assert record.layout["world_size"] == 2 and record.layout["strategy"] == "DDPStrategy"
    assert "".join(printed).count("is finished: held-out accuracy") == 1, "one rank speaks"


def test_a_sweep_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from soups.errors import RunError
    from soups.fitting.environment import refuse_sweeps_in_ranks

    refuse_sweeps_in_ranks()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"torchrun or srun.*each of them would run the whole sweep.*trainer\.devices=2"):
        refuse_sweeps_in_ranks()


def test_children_of_a_slurm_job_start_as_on_a_plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep's job has one task; a fit on two devices in it must not take Lightning for part of an srun."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    for key, value in {
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_NAME": "train",
    }.items():
        monkeypatch.setenv(key, value)
    assert SLURMEnvironment.detect()
    for key in DISTRIBUTED_VARIABLES:
        monkeypatch.delenv(key, raising=False)
    assert not SLURMEnvironment.detect()


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/hydra/launcher").glob("*.yaml")))
def test_the_presets_compose_and_name_only_settings_that_exist(name: str) -> None:
    if not name.startswith("ray"):
        pytest.importorskip("submitit", reason="pip install 'soups[slurm]'")
    from hydra import compose, initialize_config_dir
    from hydra.core.plugins import Plugins
    from hydra.utils import get_class
    from omegaconf import OmegaConf

    more = ["hydra.launcher.address=ray://head:10001"] if name == "ray_remote" else []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [f"hydra/launcher={name}", *more], return_hydra_config=True)
    settings = OmegaConf.to_container(config.hydra.launcher, resolve=False)
    made = get_class(settings.pop("_target_"))
    assert made in Plugins.instance().discover()
    if name.startswith("ray"):
        assert made(**settings).options == settings
    else:
        from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf

        cap = settings.pop("jobs", None) or settings["array_parallelism"]
        assert 1 <= cap <= 16, "never all at once"
        known = {field.name for kind in (LocalQueueConf, SlurmQueueConf) for field in fields(kind)}
        assert set(settings) <= known, set(settings) - known


def test_a_soup_leaves_the_search_space_to_the_program() -> None:
    """+soup=… is for other people's programs too, so no recipe may bring our search space along."""
    for path in (ROOT / "conf/soup").glob("*.yaml"):
        assert "/sweep:" not in path.read_text(), path
    assert compose_settings(["+soup=greedy"])["sweep"]["space"]["optimizer"]["lr"]
