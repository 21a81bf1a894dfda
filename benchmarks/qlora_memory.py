"""Memory of one LoRA gradient over float32, bfloat16 and quantised bases, LLaMA-shaped: the compiler's own figures.

    python -m benchmarks.qlora_memory [--layers 32] [--width 4096] [--json out.json]

Nothing is allocated or run. arguments: what the program is given (base, adapter, tokens); temporaries: what it needs beside.
The layers are scanned, so that a dequantised kernel in the temporaries is one layer's. On a CPU the bfloat16 base shows
27 GB of temporaries: that backend has no bfloat16 product and converts all layers' kernels ahead of the scan.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from qtjax import models
from qtjax.overlays import abstract_overlay
from qtjax.scoring import head_loss

BASES = {"float32": ("float32", None), "bfloat16": ("bfloat16", None), **{kind: ("bfloat16", kind) for kind in models.KINDS}}


def measure(base: str, layers: int, width: int, tokens: int) -> dict[str, int]:
    """Bytes of arguments and temporaries of the gradient of a LoRA (r = 16, all linear modules) over this base."""
    dtype, kind = BASES[base]
    config = models.ModelConfig(
        hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers, num_attention_heads=width // 128,
        num_key_value_heads=width // 128, dtype=dtype, param_dtype=dtype, remat="full", quantization=kind,
    )  # fmt: skip
    overlay = abstract_overlay("lora", config, r=16)

    def loss(trained, params, ids):
        own = dataclasses.replace(overlay, params=trained)
        hidden = models.hidden_states(config, params, ids, overlay=own)
        hidden, kernel, layout = models.readout(config, params, hidden, own)
        return head_loss(hidden, kernel, ids, jnp.ones(ids.shape), layout=layout)

    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    memory = jax.jit(jax.grad(loss)).lower(overlay.params, models.abstract_params(config), ids).compile().memory_analysis()
    return {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    table = {base: measure(base, args.layers, args.width, args.tokens) for base in BASES}
    print(f"LoRA gradient, {args.layers} layers of width {args.width}, {args.tokens} tokens, {jax.default_backend()}")
    print(f"{'base':10}{'arguments GB':>14}{'temporaries GB':>16}")
    for base, row in table.items():
        print(f"{base:10}{row['arguments'] / 1e9:14.3f}{row['temporaries'] / 1e9:16.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
