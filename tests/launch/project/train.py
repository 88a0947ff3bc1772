"""A Hydra and Lightning program as people have it: nothing in it knows of soups."""

import hydra
import lightning.pytorch as pl
import torch
from callbacks.counting import CountSteps  # the project's own top-level package
from hydra.utils import instantiate
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def train(cfg: DictConfig) -> float:
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_num_threads(1)
    module = instantiate(cfg.model)
    data = instantiate(cfg.data)
    chosen = [instantiate(callback) for callback in (cfg.get("callbacks") or {}).values()]
    counter = CountSteps()
    trainer = pl.Trainer(**cfg.trainer, default_root_dir=cfg.paths.output_dir, callbacks=[counter, *chosen])
    trainer.fit(module, datamodule=data)
    assert counter.steps == trainer.global_step > 0
    return float(trainer.callback_metrics["val/acc"])


if __name__ == "__main__":
    train()
