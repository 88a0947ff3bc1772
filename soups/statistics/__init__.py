"""Statistics: what a model's data say about its weights, as sums with counts that a merge can read."""

from soups.statistics.collect import collect as collect
from soups.statistics.sizes import sizes as sizes
from soups.statistics.statistics import KINDS as KINDS
from soups.statistics.statistics import Statistics as Statistics
from soups.statistics.statistics import hash_store as hash_store
