"""LoRA adapters merged into one adapter, and extracted from models that were fine-tuned in full."""

from soups.artifacts.adapters.combine import ADAPTER_METHODS as ADAPTER_METHODS
from soups.artifacts.adapters.combine import merge_adapters as merge_adapters
from soups.artifacts.adapters.extract import extract_adapter as extract_adapter
