"""Foreign byte formats end here: Hugging Face folders in and out, Flax msgpack in."""

from qtjax.checkpoints.folder import read_config, resolve_folder
from qtjax.checkpoints.pretrained import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "read_config", "resolve_folder", "save_pretrained"]
