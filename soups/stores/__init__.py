"""Checkpoints as lazily read tensors, and the pool of ingredients."""

from soups.stores.safetensors import SafetensorsStore as SafetensorsStore
from soups.stores.safetensors import read_safetensors as read_safetensors
from soups.stores.safetensors import write_safetensors as write_safetensors
from soups.stores.store import DictStore as DictStore
from soups.stores.store import Store as Store
from soups.stores.store import TensorMeta as TensorMeta
