"""Several tasks over one backbone, with an expert and a head each: what merges are made of and judged by."""

from soups.suites.specification import SuiteSpec as SuiteSpec
from soups.suites.specification import read_suite as read_suite
from soups.suites.splits import SPLITS as SPLITS
from soups.suites.suite import TaskSuite as TaskSuite
from soups.suites.suite import open_suite as open_suite
