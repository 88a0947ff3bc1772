"""What tests train on. `SOUPS_TEST_ACCELERATOR=gpu python -m pytest tests/callbacks tests/launch …` runs them on a GPU.

Tests of what only a GPU has (streams, page-locked memory, NCCL) are marked `gpu` and run wherever there is one.
"""

import os

import pytest
import torch

ACCELERATOR = os.environ.get("SOUPS_TEST_ACCELERATOR", "cpu")
DEVICE = torch.device("cuda" if ACCELERATOR == "gpu" else "cpu")

# Lightning asks CUDA for its random state wherever there is CUDA, and a process that was forked after that cannot.
forks = pytest.mark.skipif(
    torch.cuda.is_available(), reason="CUDA does not survive a fork: hide the GPU (CUDA_VISIBLE_DEVICES=)"
)
