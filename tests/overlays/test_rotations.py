"""OFT and BOFT: rotations of the input, their formulas in plain numpy, constraints, dropout, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.overlays.tiny_model import CONFIG, base_params, logits, record, shaken, trained

from qtjax import models
from qtjax.errors import QtjaxError
from qtjax.overlays import abstract_overlay, init_overlay, merge
from qtjax.overlays.rotations import cayley, cayley_neumann, skew
from qtjax.tree import flatten

pytestmark = pytest.mark.slow

KEY = jax.random.key(7)
PATH = "layers/mlp/down_proj"  # 40 inputs
SETTINGS = {
    "neumann": ("oft", dict(oft_block_size=8)),
    "cayley": ("oft", dict(oft_block_size=4, use_cayley_neumann=False)),
    "shared": ("oft", dict(r=4, block_share=True)),
    "coft": ("oft", dict(oft_block_size=8, coft=True, eps=0.3)),
    "boft": ("boft", dict(boft_block_size=4)),
    "butterfly": ("boft", dict(boft_block_size=2, boft_n_butterfly_factor=3, target_modules="q_proj,v_proj,down_proj")),
}


@pytest.fixture(scope="module")
def params():
    return base_params()


def skewed(upper, size):
    q = np.zeros((size, size))
    q[np.triu_indices(size, 1)] = upper
    return q - q.T


def exact(q):
    one = np.eye(len(q))
    return (one - q) @ np.linalg.inv(one + q)


def block_diagonal(blocks):
    size = len(blocks[0])
    out = np.zeros((size * len(blocks),) * 2)
    for n, block in enumerate(blocks):
        out[n * size : (n + 1) * size, n * size : (n + 1) * size] = block
    return out


def applied(edit, x, kernel, bias):
    return np.asarray(edit(jnp.asarray(x, jnp.float32), kernel, bias), np.float64)


def inputs(params, path=PATH, layer=1):
    flat = flatten(params)
    kernel, bias = flat[f"{path}/kernel"][layer], flat.get(f"{path}/bias")
    x = np.random.default_rng(2).normal(size=(5, kernel.shape[0]))
    return x, kernel, None if bias is None else bias[layer]


@pytest.mark.parametrize("name", SETTINGS)
def test_fresh_is_bitwise_the_base_and_merge_is_the_forward(params, name):
    """Zero parameters rotate by the identity exactly; trained ones, folded into the kernels, give the same logits."""
    method, fields = SETTINGS[name]
    fresh = init_overlay(method, CONFIG, params, KEY, **fields)
    base = logits(params)
    assert np.array_equal(logits(params, fresh).view(np.int32), base.view(np.int32))
    overlay = shaken(fresh)
    moved = logits(params, overlay)
    assert np.abs(moved - base).max() > 0.3
    config, merged = merge(CONFIG, params, overlay)
    assert config == CONFIG
    np.testing.assert_allclose(logits(merged), moved, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 7])
def test_neumann_series_is_peft_s(params, terms):
    """terms 5: I + 2Q + 2Q^2 + 2Q^3 + Q^4, x turned from the left by blocks of 8 inputs; 3 terms are computed as 4."""
    overlay = trained("oft", params, oft_block_size=8, num_cayley_neumann_terms=terms)
    upper = np.asarray(flatten(overlay.params)[f"{PATH}/oft_R"], np.float64)[1]
    coefficients = {2: [2], 3: [2, 2, 1], 4: [2, 2, 1], 5: [2, 2, 2, 1], 7: [2, 2, 2, 2, 2, 1]}[terms]
    blocks = []
    for vector in upper:
        q = skewed(vector, 8)
        blocks.append(np.eye(8) + sum(c * np.linalg.matrix_power(q, n + 1) for n, c in enumerate(coefficients)))
    x, kernel, _ = inputs(params)
    expected = x @ block_diagonal(blocks) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(applied(record(overlay, PATH, 1), x, kernel, None), expected, atol=1e-4)


def test_exact_map_shared_block_and_bias(params):
    """use_cayley_neumann=False: (I - Q)(I + Q)^-1, one block for all with block_share; the base's bias stays."""
    path = "layers/self_attn/q_proj"
    overlay = trained("oft", params, r=4, block_share=True, use_cayley_neumann=False)
    upper = np.asarray(flatten(overlay.params)[f"{path}/oft_R"], np.float64)
    assert upper.shape == (3, 1, 28)
    x, kernel, bias = inputs(params, path)
    turned = x @ block_diagonal([exact(skewed(upper[1, 0], 8))] * 4)
    expected = turned @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
    np.testing.assert_allclose(applied(record(overlay, path, 1), x, kernel, bias), expected, atol=1e-4)


def test_the_two_maps_turn_in_opposite_directions():
    """For small Q the series is the inverse of the exact map, and the exact map is orthogonal for every Q."""
    q = skew(0.02 * jax.random.normal(KEY, (6, 10)), 5)
    np.testing.assert_allclose(cayley_neumann(q, 9) @ cayley(q), np.broadcast_to(np.eye(5), (6, 5, 5)), atol=1e-6)
    large = cayley(100 * q)
    np.testing.assert_allclose(large @ jnp.swapaxes(large, 1, 2), np.broadcast_to(np.eye(5), (6, 5, 5)), atol=1e-5)


@pytest.mark.parametrize("fields", [dict(boft_block_size=4), dict(boft_block_num=20, boft_n_butterfly_factor=3)])
def test_butterfly_factors_in_plain_matrices(params, fields):
    """y = s * (x B_m ... B_1 W) + b with B_i = P_i blockdiag P_i^T, P_i the even-then-odd order of half blocks."""
    overlay = trained("boft", params, target_modules="down_proj", **fields)
    flat = {p: np.asarray(v, np.float64)[1] for p, v in flatten(overlay.params).items()}
    squares, scale = flat[f"{PATH}/boft_R"], flat[f"{PATH}/boft_s"]
    size = squares.shape[-1]
    total = np.eye(40)
    for n, factor in enumerate(squares):
        matrix = block_diagonal([exact((a - a.T) / 2) for a in factor])
        if n:
            group, half = size * 2**n, size // 2
            chunks = np.arange(40).reshape(40 // group, 2**n, 2, half)
            order = np.concatenate([chunks[:, :, 0], chunks[:, :, 1]], axis=1).reshape(-1)  # even chunks, then odd ones
            permutation = np.eye(40)[order]
            matrix = permutation @ matrix @ permutation.T
        total = matrix @ total
    x, kernel, _ = inputs(params)
    bias = jnp.arange(32.0)
    expected = (x @ total @ np.asarray(kernel, np.float64)) * scale + np.asarray(bias, np.float64)
    np.testing.assert_allclose(applied(record(overlay, PATH, 1), x, kernel, bias), expected, atol=1e-4)
    np.testing.assert_allclose(total @ total.T, np.eye(40), atol=1e-12)
    if len(squares) > 1:
        assert (np.abs(total) > 1e-9).sum(axis=0).min() == size * 2 ** (len(squares) - 1)  # so many inputs mix


@pytest.mark.parametrize("name", ["neumann", "cayley", "boft"])
def test_layers_to_transform_leaves_the_others_alone(params, name):
    """Only layer 1: the kernels of the other layers are bitwise the base's after merge, and so is what their edits do."""
    method, fields = SETTINGS[name]
    overlay = trained(method, params, **fields, layers_to_transform=[1])
    _, merged = merge(CONFIG, params, overlay)
    before, after = (flatten(tree)["layers/mlp/up_proj/kernel"] for tree in (params, merged))
    for layer in (0, 2):
        np.testing.assert_array_equal(before[layer], after[layer])
    assert np.abs(before[1] - after[1]).max() > 0.05
    np.testing.assert_allclose(logits(merged), logits(params, overlay), atol=2e-4, rtol=2e-4)


def test_coft_keeps_every_block_in_its_ball(params):
    """The forward turns by the projection, the gradient is that at the projected point, after_step stores the projection."""
    overlay = trained("oft", params, oft_block_size=8, coft=True, eps=0.1, target_modules="down_proj")
    path = f"{PATH}/oft_R"
    limit = 0.1 / np.sqrt(5)
    stored, _ = overlay._own.after_step(overlay.spec, overlay.params, {}, overlay.params, 1)
    for blocks, given in zip(np.asarray(flatten(stored)[path]), np.asarray(flatten(overlay.params)[path])):
        for vector, start in zip(blocks, given):
            assert np.linalg.norm(skewed(start, 8)) > limit
            np.testing.assert_allclose(np.linalg.norm(skewed(vector, 8)), limit, rtol=1e-5)
            np.testing.assert_allclose(vector, start * limit / np.linalg.norm(skewed(start, 8)), rtol=1e-5)
    inside = overlay.replace(params=jax.tree.map(lambda x: x * 1e-3, overlay.params))
    kept, _ = overlay._own.after_step(overlay.spec, inside.params, {}, inside.params, 1)
    np.testing.assert_array_equal(flatten(kept)[path], flatten(inside.params)[path])
    free = trained("oft", params, oft_block_size=8, target_modules="down_proj").replace(params=stored)

    def total(trainable, own):
        edit = flatten(own.replace(params=trainable).expand().tree)[f"{PATH}/edit"]
        return (jax.vmap(lambda e, k: e(jnp.ones((3, 40)), k))(edit, flatten(params)[f"{PATH}/kernel"]) ** 2).sum()

    held, at_projection = jax.value_and_grad(total)(overlay.params, overlay), jax.value_and_grad(total)(stored, free)
    for a, b in zip(jax.tree.leaves(held), jax.tree.leaves(at_projection)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    fresh = init_overlay("oft", CONFIG, params, KEY, coft=True, oft_block_size=8)
    gradient = jax.grad(total)(fresh.params, fresh)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "method, fields",
    [
        ("oft", dict(oft_block_size=2, module_dropout=0.3)),
        ("boft", dict(boft_block_size=2, boft_n_butterfly_factor=2, boft_dropout=0.3)),
    ],
)
def test_dropout_rests_blocks_at_the_stated_rate(params, method, fields):
    """With a key, blocks are the identity with probability 0.3 (in one BOFT factor a layer); without one none is."""
    overlay = trained(method, params, target_modules="down_proj", **fields)
    still = {name: value for name, value in fields.items() if "dropout" not in name}
    assert overlay.draws and not init_overlay(method, CONFIG, None, KEY, **still).draws

    def blocks(key):
        return flatten(overlay.expand(key).tree)[f"{PATH}/edit"].rotation.args[0]

    rests = jax.vmap(lambda key: (blocks(key) == jnp.eye(2)).all((-1, -2)))(jax.random.split(KEY, 100))
    assert not (blocks(None) == jnp.eye(2)).all((-1, -2)).any()
    if method == "boft":
        assert rests.any(-1).sum(-1).max() == 1  # one factor of a layer
        rests = rests.any(2)
    assert abs(rests.mean() - 0.3) < 0.03  # 6000 draws: the standard error is 0.006
    np.testing.assert_array_equal(blocks(KEY), blocks(KEY))


def test_counts_at_7b_are_the_closed_forms():
    """The table of the design: block sizes and targets of LLaMA-7B and Mistral-7B."""
    llama = models.ModelConfig()
    mistral = llama.replace(model_type="mistral", num_key_value_heads=8, intermediate_size=14336)
    for method, fields, expected in (
        ("oft", dict(), (17_649_664, 19_300_352)),
        ("oft", dict(target_modules="q_proj,v_proj"), (4_063_232, 4_063_232)),
        ("boft", dict(boft_n_butterfly_factor=2, target_modules="q_proj,v_proj"), (2_359_296, 2_260_992)),
        ("boft", dict(boft_n_butterfly_factor=2, boft_block_size=8), (19_578_880, 21_299_200)),
    ):
        counts = tuple(abstract_overlay(method, config, **fields).trainable_count for config in (llama, mistral))
        assert counts == expected, (method, fields)


@pytest.mark.parametrize(
    "method, fields, message",
    [
        ("oft", dict(oft_block_size=7), "oft_block_size = 7: does not divide the 32 inputs of q_proj; .*targets': 2, 4"),
        ("oft", dict(), "oft_block_size = 32: does not divide the 48 inputs of o_proj"),
        ("oft", dict(r=4, oft_block_size=8), r"oft_block_size = 8: exactly one of r \(= 4\) and oft_block_size"),
        ("oft", dict(r=0, oft_block_size=0), "oft_block_size = 0: exactly one"),
        ("oft", dict(r=-1), "r = -1: must be an integer of 0 or more"),
        ("oft", dict(oft_block_size=1), "oft_block_size = 1: makes blocks of one input at q_proj"),
        ("oft", dict(oft_block_size=8, num_cayley_neumann_terms=1), "num_cayley_neumann_terms = 1: one term"),
        ("oft", dict(oft_block_size=8, eps=0.0), "eps = 0.0: must be a number above 0"),
        ("oft", dict(oft_block_size=8, bias="oft_only"), "bias = 'oft_only': is not supported for oft"),
        ("oft", dict(oft_blok_size=8), "did you mean 'oft_block_size'"),
        ("boft", dict(boft_block_size=3), "boft_block_size = 3: does not divide the 32 inputs of q_proj"),
        ("boft", dict(boft_block_num=4, boft_block_size=4), "exactly one of boft_block_num"),
        (
            "boft", dict(boft_block_size=8, boft_n_butterfly_factor=2),
            "boft_n_butterfly_factor = 2: needs blocks in a multiple of 2, and down_proj has 5",
        ),
        ("boft", dict(boft_n_butterfly_factor=0), "boft_n_butterfly_factor = 0: must be an integer above 0"),
        (
            "boft", dict(boft_block_size=5, boft_n_butterfly_factor=2, target_modules="down_proj"),
            "makes blocks of 5 inputs at down_proj; butterflies need even",
        ),
        ("boft", dict(bias="all"), "bias = 'all': is not supported for boft"),
        ("boft", dict(boft_dropout=1.0), "boft_dropout = 1.0"),
    ],
)  # fmt: skip
def test_refusals(method, fields, message):
    """Impossible block sizes and unsupported fields are one line with field, value and rule."""
    with pytest.raises(QtjaxError, match=message) as error:
        init_overlay(method, CONFIG, None, KEY, **fields)
    assert "\n" not in str(error.value)
