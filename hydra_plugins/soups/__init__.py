"""Hydra plugins of the package: the soup sweeper."""
