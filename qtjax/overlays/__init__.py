"""Parameter-efficient fine-tuning as overlays: one method a file, one line of registration each."""

from qtjax.overlays import llama_adapter, lora, mpt, prefix, prompt, ptuning
from qtjax.overlays.base import METHODS, Method, Overlay, abstract_overlay, init_overlay, method_named, overlay_axes, register
from qtjax.overlays.merge import merge

register("lora", lora.METHOD)
register("prompt", prompt.METHOD)
register("ptuning", ptuning.METHOD)
register("mpt", mpt.METHOD)
register("prefix", prefix.METHOD)
register("llama_adapter", llama_adapter.METHOD)

__all__ = [
    "METHODS", "Method", "Overlay", "abstract_overlay", "init_overlay", "merge", "method_named", "overlay_axes", "register",
]  # fmt: skip
