"""Averaging."""
