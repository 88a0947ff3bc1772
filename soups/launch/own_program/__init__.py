"""A Hydra and Lightning program that is not ours as the maker of ingredients: `python your_train.py +soup=greedy`.

Nothing is changed in the program. Each run of its task function trains one ingredient: `trainer.fit` is intercepted, the
module gets the weights that all ingredients start from, the fit runs, and the trained weights go into the pool with their
metrics from `trainer.validate`. The soup is chosen by the same validation loop and shown by `trainer.test`.

A command goes through these modules in order: `sweep` (the whole command), `rehearsal` (run the program up to its fit),
`direction` (the metric that selects), `task` (one ingredient a call), `ingredient` (the fit and its record), `members`
(which ingredients belong together), `soup` (selection and report). They share `configuration` (settings and fingerprint),
`interception` (of `Trainer.fit`), `evaluation` (validate and test), `validation_data` (a digest of the held-out data),
`module_weights` and `loggers`.

What the program's configuration may say, all optional::

    ingredient:
      monitor: val/acc   # metric of trainer.validate that selects; default: the one that a checkpoint or early stopping watches
      mode: max          # or min; default: as the callback, scheduler or objective has it that watches the metric
      weights: raw       # what a fit leaves: raw, best (checkpoint), or the name of an average (with callbacks=[ema]: ema)
      fit: last          # which call of trainer.fit counts where there are several: last, or its number from 1
      ignore: [data.num_workers]   # more keys that do not decide the weights
    pool: {path: pools/mine}       # a folder or an fsspec URL
    sweep: {method: random, size: 8, seed: 0, space: {model: {lr: "tag(log, interval(1e-4, 1e-2))"}}}
"""
