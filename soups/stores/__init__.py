"""Checkpoints as lazily read tensors, and the pool of ingredients."""

from soups.stores.checkpoint import TorchStore as TorchStore
from soups.stores.collection import find_checkpoints as find_checkpoints
from soups.stores.collection import fitted as fitted
from soups.stores.collection import open_fitted as open_fitted
from soups.stores.collection import recorded_classes as recorded_classes
from soups.stores.folder import FolderStore as FolderStore
from soups.stores.folder_writer import FolderWriter as FolderWriter
from soups.stores.lora import LoRAStore as LoRAStore
from soups.stores.memory import DictStore as DictStore
from soups.stores.opening import Checkpoint as Checkpoint
from soups.stores.opening import open_store as open_store
from soups.stores.safetensors import SafetensorsStore as SafetensorsStore
from soups.stores.safetensors import read_safetensors as read_safetensors
from soups.stores.store import Store as Store
from soups.stores.store import TensorMeta as TensorMeta
from soups.stores.torch_writer import TorchWriter as TorchWriter
from soups.stores.views import RenamedStore as RenamedStore
from soups.stores.views import StoreView as StoreView
from soups.stores.writer import FileWriter as FileWriter
from soups.stores.writer import Writer as Writer
from soups.stores.writer import write_safetensors as write_safetensors
