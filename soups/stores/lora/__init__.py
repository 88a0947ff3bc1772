"""PEFT adapters: applied to a base model while reading it."""

from soups.stores.lora.config import AdapterConfig as AdapterConfig
from soups.stores.lora.config import read_config as read_config
from soups.stores.lora.effects import adapted_configuration as adapted_configuration
from soups.stores.lora.effects import resized_vocabulary as resized_vocabulary
from soups.stores.lora.effects import untied_heads as untied_heads
from soups.stores.lora.files import base_of as base_of
from soups.stores.lora.files import is_adapter as is_adapter
from soups.stores.lora.files import open_adapter as open_adapter
from soups.stores.lora.store import LoRAStore as LoRAStore
