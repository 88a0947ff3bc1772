"""Experiment tracking behind a small interface."""

from soups.tracking.weights_and_biases import finish_ingredient as finish_ingredient
from soups.tracking.weights_and_biases import group_name as group_name
from soups.tracking.weights_and_biases import log_page as log_page
from soups.tracking.weights_and_biases import log_soup as log_soup
from soups.tracking.weights_and_biases import require_wandb as require_wandb
from soups.tracking.weights_and_biases import start_run as start_run
