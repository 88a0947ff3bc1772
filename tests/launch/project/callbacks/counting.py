import lightning.pytorch as pl


class CountSteps(pl.Callback):
    """Counts training batches."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, *arguments) -> None:
        self.steps += 1
