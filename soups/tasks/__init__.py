"""Tasks: data with honest splits, models from the libraries people use, and their fine-tuning under Lightning."""
