"""Trainable values at 7B: the closed forms of each method, evaluated abstractly."""

import pytest

from qtjax import models
from qtjax.overlays import METHODS, abstract_overlay

LLAMA = models.ModelConfig()  # LLaMA-7B: D 4096, F 11008, 32 layers, 32 heads
MISTRAL = LLAMA.replace(model_type="mistral", intermediate_size=14336, num_key_value_heads=8)
QV = {"target_modules": "q_proj,v_proj"}
# (method, settings, LLaMA-7B, Mistral-7B); peft 0.21 counts the same, and the papers where they print a number
COUNTS = [
    ("lora", {"r": 8, **QV}, 4_194_304, 3_407_872),
    ("lora", {"r": 16}, 39_976_960, 41_943_040),
    ("lora", {"r": 64}, 159_907_840, 167_772_160),
    ("dora", {"r": 16}, 41_336_832, 43_319_296),
    ("adalora", {"init_r": 12, **QV}, 6_292_224, 5_112_576),
    ("loha", {"r": 8, **QV}, 8_388_608, 6_815_744),
    ("lokr", {"r": 8, "decompose_factor": -1, **QV}, 327_680, 253_952),
    ("lokr", {"r": 8, "decompose_factor": 8, **QV}, 528_384, 430_080),
    ("ia3", {}, 614_400, 524_288),
    ("prompt", {"num_virtual_tokens": 20}, 81_920, 81_920),
    ("prefix", {"num_virtual_tokens": 30}, 7_864_320, 1_966_080),
    ("prefix", {"num_virtual_tokens": 30, "prefix_projection": True, "encoder_hidden_size": 512}, 136_700_416, 34_175_488),
    ("ptuning", {"num_virtual_tokens": 20, "encoder_hidden_size": 128}, 1_151_232, 1_151_232),
    ("mpt", {"num_virtual_tokens": 20, "num_tasks": 1, "num_ranks": 1}, 86_036, 86_036),
    ("llama_adapter", {"adapter_len": 10, "adapter_layers": 30}, 1_228_830, 1_228_830),
    ("oft", {"oft_block_size": 32}, 17_649_664, 19_300_352),
    ("oft", {"oft_block_size": 32, **QV}, 4_063_232, 4_063_232),
    ("boft", {"boft_n_butterfly_factor": 2, "boft_block_size": 4, **QV}, 2_359_296, 2_260_992),
    ("boft", {"boft_n_butterfly_factor": 2, "boft_block_size": 8}, 19_578_880, 21_299_200),
    ("poly", {"r": 4, "n_skills": 8, "n_splits": 1, "n_tasks": 8, **QV}, 16_781_312, 13_635_584),
    ("ln_tuning", {}, 266_240, 266_240),
    ("vera", {"r": 256, **QV}, 278_528, 180_224),
    ("vera", {"r": 256}, 1_417_216, 1_433_600),
    ("fourierft", {"n_frequency": 1000, **QV}, 64_000, 64_000),
    ("vblora", {"r": 4, "num_vectors": 256, "vector_length": 256}, 10_059_776, 10_551_296),
    ("vblora", {"r": 4, "num_vectors": 2048, "vector_length": 256}, 80_478_208, 84_410_368),
    ("bitfit", {}, 1_359_872, 1_376_256),
    ("houlsby", {"bottleneck": 64}, 33_820_672, 33_820_672),
    ("diffprune", {"target_modules": "all-linear"}, 12_952_010_976, 13_958_643_936),
]


@pytest.mark.parametrize("method, settings, llama, mistral", [c for c in COUNTS if c[0] in METHODS])
def test_counts_at_7b_are_the_closed_forms(method, settings, llama, mistral):
    """Nothing is allocated, and the trained values are as many as the method's formula says."""
    for config, count in ((LLAMA, llama), (MISTRAL, mistral)):
        assert abstract_overlay(method, config, **settings).trainable_count == count
