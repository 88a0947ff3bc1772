"""mergekit's YAML, run by our engine: the same file, the same numbers, faster, with errors that name the line."""

from soups.merging.mergekit.run import describe_plan as describe_plan
from soups.merging.mergekit.run import merge_configuration as merge_configuration
from soups.merging.mergekit.schema import read_configuration as read_configuration
