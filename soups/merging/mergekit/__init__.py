"""mergekit's YAML, run by our engine: the same file, the same numbers, faster, with errors that name the line."""

from soups.merging.mergekit.run import describe_plan as describe_plan
from soups.merging.mergekit.run import merge_recipe as merge_recipe
from soups.merging.mergekit.schema import read_recipe as read_recipe
