"""Artifacts: one file for several tasks, made of a shared part and a part for each task.

>>> import tempfile, torch
>>> base, news = {"w": torch.zeros(2, 8)}, {"w": torch.full((2, 8), 0.5)}
>>> with tempfile.TemporaryDirectory() as folder:
...     path = pack("bitdelta", {"news": news}, base=base, out=f"{folder}/experts.safetensors")
...     with open_artifact(path) as artifact:
...         print(artifact.tasks, artifact.materialize("news", base=base)["w"][0, :3])
['news'] tensor([0.5000, 0.5000, 0.5000])
"""

from soups.artifacts.adapters import extract_adapter as extract_adapter
from soups.artifacts.adapters import merge_adapters as merge_adapters
from soups.artifacts.artifact import Artifact as Artifact
from soups.artifacts.artifact import open_artifact as open_artifact
from soups.artifacts.method import PartMethod as PartMethod
from soups.artifacts.methods import PART_METHODS as PART_METHODS
from soups.artifacts.packing import pack as pack
