"""On a mesh of 8 devices the fused head gives the numbers of one device, on its own targets and its own part of the vocabulary."""


SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from qtjax.errors import QtjaxError
from qtjax.scoring import head_loss, token_scores

assert jax.device_count() == 8
B, L, D, V = 8, 6, 16, 40
r = np.random.default_rng(0)
hidden = jnp.asarray(r.normal(size=(B, L, D)), jnp.float32)
labels = jnp.asarray(r.integers(0, V, (B, L)), jnp.int32)
weights = jnp.asarray(r.uniform(.5, 2, (B, L)) * (r.random((B, L)) < .5), jnp.float32).at[:4].set(0)  # some devices idle
head = jnp.asarray(r.normal(size=(D, V)), jnp.float32)

def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)

for shape, layout, chunk in (((8, 1, 1), "dv", 3), ((2, 2, 2), "dv", 3), ((2, 2, 2), "vd", 256), ((1, 2, 4), "dv", 256)):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "tensor"))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    rows = ("data", "fsdp")
    h, y, w = put(hidden, rows), put(labels, rows), put(weights, rows)
    kernel, spec = (head, ("fsdp", "tensor")) if layout == "dv" else (head.T, ("tensor", "fsdp"))
    k = put(kernel, *spec)
    for loss in ("plain", "dft", "eaft") if (shape, layout) == ((2, 2, 2), "vd") else ("plain",):
        one = jax.value_and_grad(partial(head_loss, chunk=chunk, layout=layout, loss=loss), (0, 1, 3))
        many = jax.jit(jax.value_and_grad(partial(head_loss, chunk=chunk, layout=layout, loss=loss, mesh=mesh), (0, 1, 3)))
        close(one(hidden, kernel, labels, weights), many(h, k, y, w))
    close(
        token_scores(hidden.reshape(-1, D), kernel, labels.reshape(-1), weights.reshape(-1) > 0, chunk=chunk, layout=layout),
        token_scores(h.reshape(-1, D), k, y.reshape(-1), w.reshape(-1) > 0, chunk=chunk, layout=layout, mesh=mesh),
    )
    assert not any(np.any(x) for x in jax.tree.leaves(many(h, k, y, w * 0)))

mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
text = jax.jit(jax.value_and_grad(partial(head_loss, mesh=mesh), (0, 1))).lower(put(hidden, rows), put(head, "fsdp", "tensor"), y, w).compile().as_text()
assert "f32[16,20]" in text and "f32[16,40]" not in text, "the kernel was gathered along its vocabulary"
bad = jax.device_put(labels.at[5, 0].set(V), NamedSharding(mesh, P(rows)))
assert np.isnan(head_loss(put(hidden, rows), put(head, "fsdp", "tensor"), bad, put(weights.at[5, 0].set(1), rows), mesh=mesh))
products = lambda *of: str(jax.make_jaxpr(jax.grad(partial(head_loss, mesh=mesh), of))(hidden, head, labels, weights)).count("dot_general[")
assert 3 * products(0) == 2 * products(0, 1) > 0, "a frozen head takes two products of a chunk's three"
for rows, axes, message in ((6, ("data", "fsdp"), "must be a multiple of 4"), (8, ("data", "model"), "no axis 'model'")):
    try:
        head_loss(hidden[:rows], head, labels[:rows], weights[:rows], mesh=mesh, batch_axes=axes)
    except QtjaxError as error:
        assert message in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError("no error")
try:
    head_loss(hidden, head[:, :39], labels, weights, mesh=mesh)
except QtjaxError as error:
    assert "vocabulary of 39 must be a multiple of 2" in str(error), error
else:
    raise AssertionError("no error")
print("equal")
"""


def test_eight_devices_equal_one(run_python):
    """Scores, loss and gradients on meshes (8,1,1), (2,2,2), (1,2,4) equal the unsharded ones, also with idle devices and no target."""
    assert run_python(SCRIPT, devices=8).strip().endswith("equal")
