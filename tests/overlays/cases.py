"""The reference cases beside the checkout, by method, and small settings of every method for a tiny model."""

from qtjax.overlays import METHODS

# folder of ../shared/peft_refs -> our method
REFERENCES = {
    "llama-adalora": "adalora", "llama-adalora-pruned": "adalora", "llama-bitfit": "bitfit", "llama-boft": "boft",
    "llama-boft-m2": "boft", "llama-diffprune": "diffprune", "llama-dora": "dora", "llama-fourierft": "fourierft",
    "llama-houlsby": "houlsby", "llama-ia3": "ia3", "llama-llama-adapter": "llama_adapter",
    "llama-llama-adapter-all": "llama_adapter", "llama-ln": "ln_tuning", "llama-loha": "loha", "llama-lokr": "lokr",
    "llama-lokr-lowrank": "lokr", "llama-lora": "lora", "llama-lora-rs": "lora", "llama-lora-emb": "lora",
    "llama-lora-mts": "lora", "llama-mpt": "mpt", "llama-oft": "oft", "llama-oft-cayley": "oft",
    "llama-oft-share": "oft", "llama-poly": "poly", "llama-prefix": "prefix", "llama-prefix-mlp": "prefix",
    "llama-prompt": "prompt", "llama-ptuning": "ptuning", "llama-ptuning-lstm": "ptuning", "llama-vblora": "vblora",
    "llama-vblora-topk": "vblora", "llama-vera": "vera", "llama-xlora": "xlora", "llama-xlora-topk": "xlora",
}  # fmt: skip

# Fields with which a case was recorded, beyond those in its meta.json: the loss of this one is without its penalty.
RECORDED_WITH = {"llama-diffprune": {"sparsity_weight": 0.0}}


def known_references() -> list[str]:
    """The cases whose method is registered."""
    return [case for case, method in REFERENCES.items() if method in METHODS]
