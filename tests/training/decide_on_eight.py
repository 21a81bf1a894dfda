"""Run by test_decide_mesh.py in a process of eight devices: `decide` as training compiles it; prints JSON."""

import json
from functools import partial

import jax
import numpy as np

from qtjax.config import MeshSection, PruneSection
from qtjax.parallel import batch_sharding, make_mesh, replicated
from qtjax.planning.collectives import collectives
from qtjax.training.pruners import pruners
from qtjax.training.step import Decision, choose_early, decide, step_key

N, T = 64, 128
PRUNERS = {
    "q-tuning": {},
    "every option": {"supplement": "random", "corners": "random", "protect_eos": True, "policy": "article", "neighbors": "mean"},
    "longest-fastv": {"sample_pruner": "longest", "token_pruner": "fastv"},
    "entropy-rho-1": {"sample_pruner": "entropy", "token_pruner": "rho-1", "reference_model": "other"},
    "infobatch": {"sample_pruner": "infobatch", "token_pruner": "perplexity"},
    "token-cleaning": {"sample_pruner": "none", "token_pruner": "token-cleaning", "reference_model": "other"},
}


def same(one: jax.Array, eight: jax.Array) -> bool:
    """Equal, or of floats (a mean over a row, summed in another order) within 1e-6 of themselves; NaN equals NaN."""
    return bool(np.allclose(one, eight, rtol=1e-6, atol=1e-7, equal_nan=True)) if one.dtype.kind == "f" else bool((one == eight).all())


def main() -> None:
    assert jax.device_count() == 8
    mesh, rng, key = make_mesh(MeshSection(data=4, fsdp=2)), np.random.default_rng(0), step_key(3, 5)
    by_row, everywhere = batch_sharding(mesh), replicated(mesh)
    targets = np.arange(T) >= rng.integers(1, T - 2, N)[:, None]
    signals = {name: rng.gamma(2.0, 1.0, (N, T)).astype(np.float32) * targets for name in ("nll", "entropy", "attention")}
    whole = {
        "targets": targets, "closing": np.arange(T)[None] == np.full((N, 1), T - 1), "valid": np.arange(N) < N - 3,
        "index": rng.permutation(1000)[:N].astype(np.int32), "planned": (rng.random(N) < 0.7).astype(np.float32) * 2,
        "reference": rng.gamma(2.0, 1.0, (N, T)).astype(np.float32),
    }  # fmt: skip
    out = {}
    for name, changes in PRUNERS.items():
        prune = PruneSection(sample_keep=0.5, token_keep=0.5, **changes)
        needs = pruners(prune)
        scores = {signal: signals[signal] for signal in needs.signals}
        unused = ({"planned"} if not needs.by_epoch else set()) | ({"reference"} if not needs.reference else set())
        batch = {column: x for column, x in whole.items() if column not in unused}
        one = jax.jit(partial(decide, prune))(scores, batch, key)
        layout = Decision(*[everywhere] * len(Decision._fields))._replace(tokens=by_row)
        given = jax.device_put(scores, by_row), jax.device_put(batch, by_row), jax.device_put(key, everywhere)
        with jax.set_mesh(mesh):
            program = jax.jit(partial(decide, prune, mesh=mesh), out_shardings=layout).lower(*given).compile()
            programs = {"decide": program}
            if needs.early:
                programs["choose"] = jax.jit(partial(choose_early, prune, mesh=mesh), out_shardings=everywhere).lower(*given[1:]).compile()
        eight = program(*given)
        apart = [field for field, a, b in zip(Decision._fields, one, eight) if not same(a, b)]
        out[name] = {"differ": apart} | {kind: [each._asdict() for each in collectives(x.as_text(), 8)] for kind, x in programs.items()}
    print("RESULT" + json.dumps({"samples": N, "slots": T, "pruners": out}))


if __name__ == "__main__":
    main()
