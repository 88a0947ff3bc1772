import math

import pytest
import torch

from soups.coefficients import Grid, search_parameters
from soups.errors import ConfigError

BASE, ONE, TWO = ({"w": torch.tensor(values)} for values in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0]))
TARGET = torch.tensor([0.2, 0.6])


def score(weights):
    return -float((weights["w"] - TARGET).norm())


def test_a_grid_over_weights_and_scale_finds_the_best():
    space = {"weight": [(1.0, 1.0), (1.0, 3.0), (3.0, 1.0)], "scale": [0.1, 0.2, 0.4]}
    found = search_parameters("task_arithmetic", [ONE, TWO], score, space, base=BASE)
    assert found.best.point == {"weight": (1.0, 3.0), "scale": 0.2}
    assert torch.allclose(found.weights["w"], TARGET) and len(found.trials) == 9
    assert found.best.score == max(trial.score for trial in found.trials)


def test_a_search_of_ones_own_is_asked_and_told():
    class Bisection:
        def __init__(self):
            self.low, self.high, self.told = 0.0, 1.0, []

        def ask(self):
            return {"scale": (self.low + self.high) / 2} if len(self.told) < 20 else None

        def tell(self, parameters, value):
            self.told.append(value)
            if value > 0:
                self.high = parameters["scale"]
            else:
                self.low = parameters["scale"]

    search = Bisection()
    search_parameters("task_arithmetic", [ONE], lambda w: float(w["w"][0]) - 0.3, search, base=BASE)
    assert search.low == pytest.approx(0.3, abs=1e-5)


def test_nan_scores_never_win_and_mistakes_are_named():
    scores = iter([math.nan, -2.0, math.nan])
    found = search_parameters("task_arithmetic", [ONE], lambda _: next(scores), {"scale": [1.0, 2.0, 3.0]}, base=BASE)
    assert found.best.point == {"scale": 2.0}
    with pytest.raises(ConfigError, match="no candidates for 'scale'"):
        Grid({"scale": []})
    with pytest.raises(ConfigError, match="did you mean 'scale'"):
        search_parameters("task_arithmetic", [ONE], score, {"scal": [1.0]}, base=BASE)
