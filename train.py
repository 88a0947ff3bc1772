"""Fine-tune one model, many, or many that end in a soup; `conf/train.yaml` says how.

python train.py                                   one fine-tune, kept as an ingredient
python train.py -m optimizer.lr=1e-4,3e-4         an ordinary Hydra multirun into the same pool
python train.py +soup=greedy                      a sweep that ends in a greedy soup
"""

try:
    import hydra
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}. The base install has no training libraries: run `pip install -e '.[train]'` in this folder."
    ) from error
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float:
    """Run one fine-tune; sweeps call this once an ingredient."""
    from soups.launch.app import run

    return run(config)


if __name__ == "__main__":
    from soups.launch.hydra_errors import nearest_names

    with nearest_names():
        main()
