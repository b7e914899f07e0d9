"""Model folders: config.json, model.safetensors (sharded when large), the tokenizer, generation_config.json.

A folder is Hugging Face's; released RecurrentGemma folders load as they are. Only safetensors and JSON are read. What
is written here has a SHA256SUMS beside it, and is read only as it was written.
"""

from griffin.checkpoint.hub import load_tokenizer, resolve
from griffin.checkpoint.read import inspect, load, read_config
from griffin.checkpoint.write import check_place, save, write_files, write_folder

__all__ = [
    "check_place",
    "inspect",
    "load",
    "load_tokenizer",
    "read_config",
    "resolve",
    "save",
    "write_files",
    "write_folder",
]
