"""Overlays with every real value random, and what their records do layer by layer."""

import zlib

import jax
import numpy as np

from qtjax.models.edits import combine
from qtjax.overlays import method_named
from qtjax.tree import flatten, unflatten


def randomized(overlay, seed=0, **scales):
    """The overlay with trainables N(0, scale^2), by the last part of a leaf's path (default 0.3); padding stays zero."""
    values = {}
    for leaf in method_named(overlay.method).leaves(overlay.spec):
        if not leaf.trained:
            continue
        rng = np.random.default_rng([seed, zlib.crc32(leaf.path.encode())])
        value = rng.normal(size=leaf.shape).astype(np.float32) * scales.get(leaf.path.rsplit("/", 1)[-1], 0.3)
        real = leaf.mask()
        values[leaf.path] = jax.numpy.asarray(value if real is None else value * real)
    return overlay.replace(params=unflatten(values))


def records(overlay, rng=None):
    """{module path: [LinearEdit of each layer]}, what all layers share put in."""
    edits = overlay.expand(rng)
    shared, out = flatten(edits.shared), {}
    for path, edit in flatten(edits.tree).items():
        layers = [jax.tree.map(lambda x, n=n: x[n], edit) for n in range(len(jax.tree.leaves(edit)[0]))]
        out[path.removesuffix("/edit")] = [combine(e, shared[path]) if path in shared else e for e in layers]
    return out


def own_layer(overlay, path, layer):
    """{name: numpy float64 array of one layer} of the trainables below a module's path."""
    below = {k.removeprefix(f"{path}/"): v for k, v in flatten(overlay.params).items() if k.startswith(f"{path}/")}
    return {name: np.asarray(value, np.float64)[layer] for name, value in below.items()}
