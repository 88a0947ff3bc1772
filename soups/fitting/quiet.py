"""Keep the libraries' remarks about themselves off a terminal that shows results."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Silence Lightning's hardware lines and tips, and the warnings that do not concern what we do."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*module.s. in eval mode at the start of training.*",  # the frozen BatchNorm layers  # images in memory need none
        ".*`isinstance\\(treespec, LeafSpec\\)`.*",
        ".*Trying to infer the `batch_size`.*",
        ".*number of training batches.*smaller than the logging interval.*",
        ".*TORCH_FORCE_WEIGHTS_ONLY_LOAD.*",
    ):
        warnings.filterwarnings("ignore", message)
