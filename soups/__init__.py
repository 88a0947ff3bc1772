"""Weight averaging, from the training loop to the finished model.

A checkpoint is a point in weight space. This package collects such points (training callbacks, sweeps), combines them
(soups, merging), chooses among the combinations by a held-out score, and writes the result where other tools can read it.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # `soups.merge` needs torch; `import soups` and `soups --help` do not.
    if name == "merge":
        from soups.merging.entry import merge

        return merge
    raise AttributeError(f"module 'soups' has no attribute {name!r}")
