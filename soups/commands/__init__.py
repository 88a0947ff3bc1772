"""The sub-commands of `soups`, one module each. They import torch only when they run."""
