"""qtjax: supervised fine-tuning in JAX with joint sample and token pruning (Q-Tuning)."""
