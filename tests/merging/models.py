import torch

from soups.statistics import Statistics
from soups.weights import hash_weights

# Longer than several blocks, rows that no block divides, a convolution, a scalar, one tied pair, one counter.
SHAPES = {
    "embed.weight": (70, 501),
    "matrix": (90, 400),
    "bias": (37,),
    "conv": (4, 3, 5, 5),
    "scalar": (),
    "long": (50_001,),
}


def model(seed, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    weights = {name: (scale * torch.randn(shape, generator=generator)).to(dtype) for name, shape in SHAPES.items()}
    return {**weights, "head.weight": weights["embed.weight"], "steps": torch.tensor(7 + seed)}


def tuned(start, seed, size=0.05):
    """A fine-tune: every floating tensor of `start` moved a little, ties kept."""
    moves = model(seed, scale=size)
    weights = {
        name: (tensor.float() + moves[name]).to(tensor.dtype) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in start.items()
    }
    return {**weights, "head.weight": weights["embed.weight"]}


def family(count, dtype=torch.float32):
    base = model(0, dtype)
    return base, [tuned(base, seed) for seed in range(1, count + 1)]


def statistics(kinds, weights):
    """Statistics of a model. What is in them depends on the signs of its weights alone, so that scaling changes nothing."""
    seed = int(hash_weights({"signs": weights["matrix"] > 0})[:12], 16)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        if "fisher" in kinds and name != "long":
            found[f"fisher/{name}"] = torch.rand(shape, generator=generator) ** 4
        if "gram" in kinds and name in ("matrix", "conv"):
            inputs = weights[name][0].numel()
            rows = torch.randn(2 * inputs, inputs, generator=generator, dtype=torch.float64)
            found[f"gram/{name}"] = rows.T @ rows
        if "kfac_out" in kinds and name == "matrix":
            outputs = torch.randn(2 * shape[0], shape[0], generator=generator, dtype=torch.float64)
            found[f"kfac_out/{name}"] = outputs.T @ outputs
        if "second_moment" in kinds and name == "bias":
            found[f"second_moment/{name}"] = torch.rand(shape, generator=generator, dtype=torch.float64)
    rows = {name: 300 for name in found if not name.startswith("fisher/")}
    return Statistics(found, weights_hash=hash_weights(weights), data="none", examples=128, rows=rows)
