"""Protocols that recycle fine-tuned models for one target task, or spread its training: fusing, Model Ratatouille, lo-fi."""
