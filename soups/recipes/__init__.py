"""Recipes choose among combinations of ingredients by a held-out score. They know nothing of pools, Hydra or Lightning."""

from soups.recipes.greedy import Candidate as Candidate
from soups.recipes.greedy import Soup as Soup
from soups.recipes.greedy import Step as Step
from soups.recipes.greedy import greedy as greedy
from soups.recipes.uniform import uniform as uniform
