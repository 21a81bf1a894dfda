"""Foreign byte formats end here: Hugging Face folders in and out, Flax msgpack in, PEFT adapters in and out."""

from qtjax.checkpoints.adapters import adapter_state_dict, is_adapter_folder, load_adapter, save_adapter
from qtjax.checkpoints.folder import base_name, read_config, resolve_folder
from qtjax.checkpoints.pretrained import load_pretrained, save_pretrained
from qtjax.checkpoints.sparse import add_sparse_delta, load_sparse_delta, save_sparse_delta

__all__ = [
    "adapter_state_dict",
    "add_sparse_delta",
    "base_name",
    "is_adapter_folder",
    "load_adapter",
    "load_pretrained",
    "load_sparse_delta",
    "read_config",
    "resolve_folder",
    "save_adapter",
    "save_pretrained",
    "save_sparse_delta",
]
