"""train.py in the manner of lightning-hydra-template: everything instantiated, hyperparameters logged, tested at the end."""

import hydra
import lightning as L
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    OmegaConf.register_new_resolver("double", lambda x: 2 * x)  # fails when it is registered twice
    L.seed_everything(cfg.seed, workers=True)
    datamodule = hydra.utils.instantiate(cfg.data)
    model = hydra.utils.instantiate(cfg.model)
    callbacks = [hydra.utils.instantiate(one) for one in cfg.callbacks.values() if "_target_" in one]
    loggers = [hydra.utils.instantiate(one) for one in (cfg.get("logger") or {}).values()]
    trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    for logger in trainer.loggers:
        logger.log_hyperparams(
            {"model/params/total": sum(p.numel() for p in model.parameters()), "tags": list(cfg.tags)}
        )
    trainer.fit(model=model, datamodule=datamodule)
    metrics = trainer.callback_metrics
    best = trainer.checkpoint_callback.best_model_path
    trainer.test(model=model, datamodule=datamodule, ckpt_path=best, weights_only=False)
    return float(metrics[cfg.optimized_metric])


if __name__ == "__main__":
    main()
