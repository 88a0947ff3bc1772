"""Rewarded soups (arXiv:2306.04488): one model fine-tuned to each reward from one start, and the weights between them."""

from soups.protocols.rewarded_soups.interpolation import interpolate as interpolate
