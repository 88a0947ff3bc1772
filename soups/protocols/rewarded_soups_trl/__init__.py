"""Rewarded soups of a causal language model, each reward's policy tuned by a trainer of TRL."""
