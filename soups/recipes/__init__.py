"""Recipes choose among combinations of ingredients by a held-out score. They know nothing of pools, Hydra or Lightning."""

from collections.abc import Callable

from soups.recipes.bcwi import bcwi as bcwi
from soups.recipes.checkpoints import candidates as candidates
from soups.recipes.diwa import diwa as diwa
from soups.recipes.greedy import greedy as greedy
from soups.recipes.greedy_removal import greedy_removal as greedy_removal
from soups.recipes.greedy_weights import greedy_weights as greedy_weights
from soups.recipes.interpolation import interpolation as interpolation
from soups.recipes.learned import learned as learned
from soups.recipes.merge import merge as merge
from soups.recipes.recipe import Candidate as Candidate
from soups.recipes.recipe import Gradient as Gradient
from soups.recipes.recipe import Point as Point
from soups.recipes.recipe import Score as Score
from soups.recipes.recipe import Slope as Slope
from soups.recipes.recipe import Soup as Soup
from soups.recipes.recipe import Step as Step
from soups.recipes.recipe import is_required as is_required
from soups.recipes.recipe import needs_of as needs_of
from soups.recipes.recipe import options_of as options_of
from soups.recipes.top_k import top_k as top_k
from soups.recipes.uniform import uniform as uniform
from soups.recipes.wise_ft import wise_ft as wise_ft

RECIPES: dict[str, Callable[..., Soup]] = {
    "uniform": uniform,
    "greedy": greedy,
    "greedy_removal": greedy_removal,
    "greedy_weights": greedy_weights,
    "top_k": top_k,
    "learned": learned,
    "diwa": diwa,
    "wise_ft": wise_ft,
    "bcwi": bcwi,
    "interpolation": interpolation,
    "merge": merge,
}
"""Every recipe by name: its module, its configuration `conf/soup/NAME.yaml`, its row in the README."""
