"""Files that are no checkpoints of ours, recognised by their first bytes, so that an error can say what they are."""

from __future__ import annotations

import re

# First bytes, what such a file is, and the way out.
_KINDS: tuple[tuple[re.Pattern[bytes], str, str], ...] = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), kind, way_out)
    for pattern, kind, way_out in (
        (rb"GGUF|GGML|ggjt|lmgg|fmgg|tjgg", "a GGUF or GGML file of llama.cpp, whose weights are mostly quantised",
         "Use the model in its original safetensors, and convert the result with llama.cpp's convert_hf_to_gguf.py"),
        (rb"version https://(git-lfs|hawser)\.github\.com", "a Git LFS pointer: the file's address, not its contents",
         "Fetch the contents with `git lfs pull`, or download the file with `hf download`"),
        (rb"oid sha256:|version https://git-xet", "a pointer of a large-file store, not the file's contents",
         "Download the file itself, with `hf download` say"),
        (rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html|<head|<\?xml|<error)",
         "a web page: the server sent an error or a login page in the file's place",
         "Open the address in a browser, log in or accept the licence there, and download the file again"),
        (rb"\s*(\{|\[)\s*[\"}\]\[{]", "JSON text", "Name the file of weights beside it, or the folder"),
        (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf", "a compressed archive", "Unpack it and name the file inside"),
        (rb"\x89HDF", "an HDF5 file (Keras, old TensorFlow)", "Load it with its own library and save it as safetensors"),
        (rb"\x93NUMPY", "a NumPy array", "Save the arrays as safetensors (safetensors.numpy.save_file)"),
        (rb".{257}ustar", "a tar archive", "Unpack it and name the file inside"),
        (rb"\x08[\x01-\x0f]\x12|\x08[\x01-\x0f]\x3a", "an ONNX model", "Use the checkpoint that it was exported from"),
        (rb"\x80[\x02-\x05]", "a plain Python pickle, not a file of torch.save",
         "Load it where it was made and save its tensors with torch.save or as safetensors"),
    )
)  # fmt: skip


def recognise(start: bytes, location: str) -> str | None:
    """Return a sentence about a file that is of another kind than torch's and safetensors; None if nothing is recognised.

    Args:
        start: the file's first 512 bytes, or fewer where it is shorter.
        location: where it is.

    >>> recognise(b"GGUF\\x03", "m.gguf")[:33]
    'm.gguf is a GGUF or GGML file of '
    >>> recognise(b"\\x10\\x00\\x00\\x00\\x00\\x00\\x00\\x00{}", "m.safetensors") is None
    True
    """
    if not start:
        return f"{location} is empty. The copy or the run that makes it did not finish; copy or make it again."
    if not start.strip(b"\0"):
        return f"{location} begins with zeros only: the disk or the copy lost its contents. Copy or make it again."
    for pattern, kind, way_out in _KINDS:
        if pattern.match(start):
            return f"{location} is {kind}. {way_out}."
    return None
