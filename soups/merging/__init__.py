"""Combining points in weight space: the streaming engine, and every merge method.

>>> import torch
>>> base, expert = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, -1.0])}
>>> merge("task_arithmetic", [expert, expert], base=base)["w"]
tensor([ 0.6000, -0.6000])
"""

from soups.merging.api import merge as merge
from soups.merging.method import Method as Method
from soups.merging.methods import METHODS as METHODS
from soups.merging.methods import make_method as make_method
from soups.merging.output import execute as execute
from soups.merging.plan import MergePlan as MergePlan
from soups.merging.plan import plan_merge as plan_merge
