"""DFT and EAFT are the plain loss times a factor held constant, and the nll handed out beside a loss is the scores' nll."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qtjax.errors import QtjaxError
from qtjax.scoring import LOSSES, head_loss, head_loss_and_nll, token_scores

FACTORED = ("dft", "eaft")


def direct(hidden, kernel, labels, weights, loss):
    """The definitions on [B, L, V] logits in float32, differentiated by autodiff."""
    logits = (hidden @ kernel).astype(jnp.float32)
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    p = jnp.take_along_axis(jax.nn.softmax(logits), labels[..., None], -1)[..., 0]
    q = jax.nn.softmax(jnp.sort(logits)[..., -20:])
    factor = {"plain": jnp.ones_like(p), "dft": p, "eaft": jax.scipy.special.entr(q).sum(-1) / 3}[loss]
    return jnp.sum(weights * jax.lax.stop_gradient(factor) * nll)


@functools.partial(jax.jit, static_argnums=4)
def expected(hidden, kernel, labels, weights, loss):
    """direct and its gradients of hidden, kernel and weights; the last is 0, by contract, where the weight is."""
    f = jax.value_and_grad(functools.partial(direct, loss=loss), (0, 1, 3))
    value, (dh, dk, dw) = f(hidden, kernel, labels, weights)
    return value, (dh, dk, jnp.where(weights != 0, dw, 0))


def draw(B=3, L=5, D=8, V=29, seed=0, scale=0.5):
    r = np.random.default_rng(seed)
    weights = r.uniform(0.5, 2, size=(B, L)) * (r.random((B, L)) < 0.6)
    return (
        jnp.asarray(scale * r.normal(size=(B, L, D)), jnp.float32),
        jnp.asarray(r.normal(size=(D, V)), jnp.float32),
        jnp.asarray(r.integers(0, V, (B, L)), jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


def of_logits(logits, label, loss):
    """(loss, its slope at the logits) of one token; the identity as a head makes the hidden state the logits."""
    logits = jnp.asarray(logits, jnp.float32)[None, None]
    labels, weights = jnp.full((1, 1), label), jnp.ones((1, 1))
    f = jax.value_and_grad(functools.partial(head_loss, loss=loss))
    value, slope = f(logits, jnp.eye(logits.shape[-1]), labels, weights)
    return value, np.asarray(slope[0, 0], np.float64)


def matmuls(f, *arguments):
    return str(jax.make_jaxpr(f)(*arguments)).count("dot_general[")


@pytest.mark.parametrize(
    ("loss", "layout", "V"), [("dft", "dv", 29), ("dft", "vd", 29), ("eaft", "dv", 29), ("eaft", "vd", 7)]
)
def test_value_and_gradients_equal_autodiff_with_a_constant_factor(loss, layout, V):
    """Loss and gradients (either layout) as autodiff of the definition with stop_gradient, also below 20 tokens."""
    hidden, kernel, labels, weights = draw(V=V)
    stored = kernel if layout == "dv" else kernel.T
    f = jax.value_and_grad(functools.partial(head_loss, loss=loss, chunk=4, layout=layout), (0, 1, 3))
    mine = f(hidden, stored, labels, weights)
    theirs = expected(hidden, kernel, labels, weights, loss)
    np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-5)
    np.testing.assert_allclose(mine[1][0], theirs[1][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mine[1][1] if layout == "dv" else mine[1][1].T, theirs[1][1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mine[1][2], theirs[1][2], rtol=1e-4, atol=1e-5)


@example([4.25, 17.0, 0.0, 0.0, 0.0, 0.0], 1)
@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-30, 30, width=32), min_size=6, max_size=6), st.integers(0, 5))
def test_dft_slope_is_p_times_the_plain_slope(logits, label):
    """At one token's logits: p (softmax - onehot), to float32 accuracy relative to p however small p is."""
    z = np.exp(np.array(logits) - max(logits))
    softmax = z / z.sum()
    # The nll, up to 62, carries an absolute error near 62 * 2**-23 = 7e-6, which is p's relative error.
    slope = of_logits(logits, label, "dft")[1]
    # Of a softmax near 1 only what it lacks is left: the log of the sum, up to 32, is a multiple of 2**-19, and so is off by as much.
    np.testing.assert_allclose(slope / softmax[label], softmax - np.eye(6)[label], rtol=1e-4, atol=2 * 2**-19)


def test_factors_by_hand():
    """Logits (0, ln 3), label 0: p = 1/4, H = ln 4 - 3/4 ln 3, nll = ln 4, plain slope (-3/4, 3/4)."""
    for loss, factor in (("plain", 1), ("dft", 1 / 4), ("eaft", (np.log(4) - 0.75 * np.log(3)) / 3)):
        value, slope = of_logits([0, np.log(3)], 0, loss)
        np.testing.assert_allclose(value, factor * np.log(4), rtol=1e-6)
        np.testing.assert_allclose(slope, [-0.75 * factor, 0.75 * factor], rtol=1e-6)


@pytest.mark.parametrize("V", [1, 5, 50])
def test_equal_logits(V):
    """All logits equal: the dft factor is 1 / V, the eaft factor ln(min(V, 20)) / 3, the authors' 3 for any V."""
    for loss, factor in (("dft", 1 / V), ("eaft", np.log(min(V, 20)) / 3)):
        np.testing.assert_allclose(of_logits(np.full(V, 1.7), 0, loss)[0], factor * np.log(V), rtol=1e-6)


def test_eaft_looks_at_the_20_largest_logits_only():
    """21 equal logits have the factor of 20, and 30 others 5 nats lower, the label among them, do not change it."""
    value, _ = of_logits([2.0] * 21 + [-3.0] * 30, 50, "eaft")
    nll = np.log(21 + 30 * np.exp(-5)) + 5
    np.testing.assert_allclose(value, np.log(20) / 3 * nll, rtol=1e-6)


@pytest.mark.parametrize("gap", [60.0, 1000.0])
@pytest.mark.parametrize("loss", FACTORED)
def test_a_label_of_no_probability_is_no_nan(loss, gap):
    """nll 60 or 1000 (or 0) at a certain model: loss and gradients finite and practically 0."""
    for label in (1, 0):
        value, slope = of_logits([gap, 0.0, 0.0], label, loss)
        assert 0 <= value < 1e-20 and np.all(np.abs(slope) < 1e-20)


@pytest.mark.parametrize("loss", FACTORED)
def test_illegal_label_makes_the_loss_nan(loss):
    """A target outside the vocabulary stays loud under a factor."""
    hidden, kernel, labels, weights = draw()
    assert np.isnan(head_loss(hidden, kernel, labels.at[0, 0].set(29), weights.at[0, 0].set(1.0), loss=loss))


@pytest.mark.parametrize("loss", LOSSES)
def test_no_target_is_zero_without_nan(loss):
    """All weights zero over NaN hidden states and illegal labels, or no slot: loss, nll and gradients 0."""
    hidden, kernel, labels, weights = draw()
    f = jax.value_and_grad(functools.partial(head_loss_and_nll, loss=loss), (0, 1, 3), has_aux=True)
    (value, nll), gradients = f(hidden * jnp.nan, kernel, labels - 100, weights * 0)
    assert value == 0 and nll.shape == labels.shape and not any(np.any(x) for x in (nll, *gradients))
    value, nll = head_loss_and_nll(hidden[:, :0], kernel, labels[:, :0], weights[:, :0], loss=loss)
    assert value == 0 and nll.shape == (3, 0) and nll.dtype == jnp.float32


@pytest.mark.parametrize("loss", FACTORED)
def test_bfloat16_operands_keep_a_float32_factor(loss):
    """Loss and d weights to float32 accuracy on the rounded operands; gradients in bfloat16, within its rounding."""
    hidden, kernel, labels, weights = draw(4, 8, D=16, V=300, seed=1)
    hidden, kernel = hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    f = jax.value_and_grad(functools.partial(head_loss, loss=loss, chunk=8), (0, 1, 3))
    value, gradients = f(hidden, kernel, labels, weights)
    exact = expected(hidden.astype(jnp.float32), kernel.astype(jnp.float32), labels, weights, loss)
    np.testing.assert_allclose(value, exact[0], rtol=1e-5)
    np.testing.assert_allclose(gradients[2], exact[1][2], rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(gradients[:2], exact[1]):
        assert mine.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(mine, np.float32) - theirs) < 1e-2 * np.linalg.norm(theirs)


@pytest.mark.parametrize(("loss", "layout"), [("plain", "dv"), ("dft", "vd"), ("eaft", "dv")])
def test_the_nll_beside_the_loss(loss, layout):
    """token_scores' nll at targets, 0 elsewhere, whatever the loss; loss and gradients are head_loss's, bit for bit."""
    hidden, kernel, labels, weights = draw(seed=3)
    kernel = kernel if layout == "dv" else kernel.T
    knobs = {"loss": loss, "layout": layout, "chunk": 4}
    f = jax.value_and_grad(functools.partial(head_loss_and_nll, **knobs), (0, 1, 3), has_aux=True)
    (value, nll), gradients = f(hidden, kernel, labels, weights)
    plain = jax.value_and_grad(functools.partial(head_loss, **knobs), (0, 1, 3))(hidden, kernel, labels, weights)
    jax.tree.map(np.testing.assert_array_equal, (value, gradients), plain)
    np.testing.assert_array_equal(head_loss_and_nll(hidden, kernel, labels, weights, **knobs)[1], nll)
    target = np.asarray(weights) != 0
    theirs, _ = token_scores(hidden.reshape(-1, 8), kernel, labels.reshape(-1), target.reshape(-1), layout=layout)
    assert nll.dtype == jnp.float32 and target.any() and not target.all()
    np.testing.assert_allclose(nll, theirs.reshape(nll.shape), rtol=1e-6, atol=1e-6)
    assert not np.any(np.asarray(nll)[~target])


def test_nothing_flows_back_through_the_nll():
    """A loss plus any function of the nll has the gradients of the loss alone; the nll alone has none."""
    arguments = draw()
    loss = jax.grad(functools.partial(head_loss, loss="dft"), (0, 1, 3))(*arguments)

    def with_nll(*a):
        total, nll = head_loss_and_nll(*a, loss="dft")
        return total + jnp.sum(nll**2)

    jax.tree.map(np.testing.assert_array_equal, jax.grad(with_nll, (0, 1, 3))(*arguments), loss)
    alone = jax.grad(lambda *a: jnp.sum(head_loss_and_nll(*a)[1]), (0, 1, 3))(*arguments)
    assert not any(np.any(g) for g in alone)


@pytest.mark.parametrize(("argnums", "count"), [((0, 1), 3), (0, 2), (3, 1)])
@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_is_computed_twice(loss, argnums, count):
    """With the nll beside it, and with any factor: the matmuls of the plain loss, through one loop."""
    f = jax.grad(functools.partial(head_loss_and_nll, loss=loss), argnums, has_aux=True)
    assert matmuls(f, *draw()) == count
    assert str(jax.make_jaxpr(f)(*draw())).count("while[") == 1


@pytest.mark.parametrize("loss", FACTORED)
def test_temporary_memory_is_one_chunk_of_logits(loss):
    """No [T, V] array: temporaries near c * V + D * V floats, as the plain loss's."""
    B, L, D, V, chunk = 4, 256, 16, 4096, 16
    hidden, kernel, weights = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((B, L, D), (D, V), (B, L)))
    labels = jax.ShapeDtypeStruct((B, L), jnp.int32)
    f = jax.jit(jax.value_and_grad(functools.partial(head_loss_and_nll, chunk=chunk, loss=loss), (0, 1), has_aux=True))
    program = f.lower(hidden, kernel, labels, weights).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * (3 * chunk * V + 2 * D * V) < 4 * B * L * V / 10


@pytest.mark.parametrize("f", [head_loss, head_loss_and_nll])
@pytest.mark.parametrize(
    ("loss", "remedy"), [("etaf", "did you mean 'eaft'"), ("DFT", "did you mean 'dft'"), (None, "plain, dft, eaft")]
)
def test_an_unknown_loss_is_one_line(f, loss, remedy):
    """The error names the value, the known losses and near names."""
    with pytest.raises(QtjaxError) as caught:
        f(*draw(), loss=loss)
    message = str(caught.value)
    assert f"loss = {loss!r}" in message and remedy in message and "\n" not in message


SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from qtjax.scoring import head_loss_and_nll

assert jax.device_count() == 8
B, L, D, V = 8, 6, 16, 40
r = np.random.default_rng(0)
hidden, head = (jnp.asarray(r.normal(size=s), jnp.float32) for s in ((B, L, D), (D, V)))
labels = jnp.asarray(r.integers(0, V, (B, L)), jnp.int32)
weights = jnp.asarray(r.uniform(.5, 2, (B, L)) * (r.random((B, L)) < .5), jnp.float32).at[:4].set(0)  # some devices idle
rows = ("data", "fsdp")
for shape, layout, loss in (
    ((2, 2, 2), "dv", "dft"), ((2, 2, 2), "vd", "eaft"), ((8, 1, 1), "dv", "eaft"), ((1, 2, 4), "dv", "plain")
):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "tensor"))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    kernel, spec = (head, ("fsdp", "tensor")) if layout == "dv" else (head.T, ("tensor", "fsdp"))
    f = partial(head_loss_and_nll, chunk=3, layout=layout, loss=loss)
    one = jax.value_and_grad(f, (0, 1, 3), has_aux=True)(hidden, kernel, labels, weights)
    sharded = put(hidden, rows), put(kernel, *spec), put(labels, rows), put(weights, rows)
    many = jax.jit(jax.value_and_grad(partial(f, mesh=mesh), (0, 1, 3), has_aux=True))(*sharded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, many)
    nll = many[0][1]
    assert np.any(nll) and nll.sharding.is_equivalent_to(NamedSharding(mesh, P(rows)), 2), nll.sharding
print("equal")
"""


@pytest.mark.slow
def test_eight_devices_equal_one(run_python):
    """Loss, nll and gradients on meshes (2,2,2), (8,1,1), (1,2,4) are those of one device; the nll is sharded by rows."""
    assert run_python(SCRIPT, devices=8).strip().endswith("equal")


@pytest.mark.parity
@pytest.mark.parametrize("loss", FACTORED)
def test_equals_torch(loss):
    """The authors' formulas in torch, a factor under no_grad and eaft's division by 3.0: same loss and gradients."""
    torch = pytest.importorskip("torch")
    arguments = draw(V=60, scale=1.0)
    hidden, kernel, labels, weights = (torch.tensor(np.asarray(a)) for a in arguments)
    hidden.requires_grad_(), kernel.requires_grad_()
    logits = (hidden @ kernel).flatten(0, 1)
    nll = torch.nn.functional.cross_entropy(logits, labels.flatten().long(), reduction="none")
    with torch.no_grad():
        log_p = torch.log_softmax(torch.topk(logits, k=20, dim=-1).values, dim=-1)
        factor = torch.exp(-nll) if loss == "dft" else -(log_p.exp() * log_p).sum(-1) / 3.0
    theirs = (weights.flatten() * factor * nll).sum()
    theirs.backward()
    mine, gradients = jax.value_and_grad(functools.partial(head_loss, loss=loss), (0, 1))(*arguments)
    np.testing.assert_allclose(mine, theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(gradients[0], hidden.grad, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradients[1], kernel.grad, rtol=1e-4, atol=1e-6)
