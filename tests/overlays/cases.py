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


# Small settings of each method for a model of width 32, two layers and three tasks; None: the method's defaults fit.
SMALL: dict[str, dict] = {
    "lora": {"r": 4}, "qlora": {"r": 4}, "dora": {"r": 4}, "loha": {"r": 3}, "lokr": {"r": 2, "decompose_both": True},
    "adalora": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 20}, "ia3": {}, "oft": {"oft_block_size": 4},
    "boft": {"boft_block_size": 4, "boft_n_butterfly_factor": 2}, "vera": {"r": 6}, "fourierft": {"n_frequency": 20},
    "vblora": {"r": 2, "num_vectors": 8, "vector_length": 8}, "poly": {"r": 2, "n_tasks": 3, "n_skills": 2, "n_splits": 2},
    "xlora": {"adapters": 3, "r": 2, "use_trainable_adapters": True}, "ln_tuning": {}, "bitfit": {}, "diffprune": {"alpha_init": 0.5}, "houlsby": {"bottleneck": 4},
    "prompt": {"num_virtual_tokens": 3}, "ptuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "mpt": {"num_virtual_tokens": 3, "num_tasks": 3, "num_ranks": 1}, "prefix": {"num_virtual_tokens": 3},
    "llama_adapter": {"adapter_len": 3, "adapter_layers": 1}, "laplace": {"r": 4},
}  # fmt: skip
TASKS = ("poly", "mpt")  # methods that choose by task
