"""What the README shows as a program runs as it is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_plain_lightning_ends_in_a_soup(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split("## Without Hydra")[1]
    found = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert found
    (tmp_path / "plain.py").write_text(found[1])
    done = subprocess.run(
        [sys.executable, "plain.py"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True,
        capture_output=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = re.search(r"^\[('lr=.*)\] (0\.\d+) (0\.\d+)$", done.stdout, flags=re.MULTILINE)
    assert line, done.stdout
    assert float(line[2]) > 0.9 and float(line[3]) > 0.85
    assert not list(tmp_path.glob("lightning_logs")) and "hydra" not in found[1]
