"""Several overlays at once: the combined function, files, who gets which field, and what cannot be combined."""

import json

import jax
import numpy as np
import pytest
from tests.overlays.tiny_model import CONFIG, base_params, logits, record, shaken, trained

from qtjax.checkpoints import adapter_state_dict, load_adapter, save_adapter
from qtjax.checkpoints.adapters import stack_parts
from qtjax.errors import QtjaxError
from qtjax.overlays import init_overlay, merge, overlay_axes
from qtjax.tree import flatten

pytestmark = pytest.mark.slow

KEY = jax.random.key(7)
STACKS = {
    "lora+ln_tuning": dict(r=3, lora={"target_modules": "q_proj,down_proj"}),
    "ia3+bitfit": dict(),
}


@pytest.fixture(scope="module")
def params():
    return base_params()


def by_hand(params, overlay):
    """(config, params) with the parts folded in one after another."""
    config = CONFIG
    for part in stack_parts(overlay):
        config, params = merge(config, params, part)
    return config, params


@pytest.mark.parametrize("method", STACKS)
def test_a_stack_computes_with_all_its_parts(params, method):
    """Its logits are those of the first part folded in and the second laid over that; so are those of its merge."""
    overlay = shaken(init_overlay(method, CONFIG, params, KEY, **STACKS[method]))
    first, second = stack_parts(overlay)
    config, folded = merge(CONFIG, params, first)
    combined = logits(params, overlay)
    np.testing.assert_allclose(combined, logits(folded, second, config), atol=2e-4, rtol=2e-4)
    for part in (first, second):
        assert np.abs(combined - logits(params, part)).max() > 0.1
    config, merged = merge(CONFIG, params, overlay)
    assert config == by_hand(params, overlay)[0]
    np.testing.assert_allclose(logits(merged, config=config), combined, atol=2e-4, rtol=2e-4)
    assert overlay.trainable_count == first.trainable_count + second.trainable_count


def test_a_stack_s_record_has_the_fields_of_both(params):
    """ia3+bitfit at k_proj: the vector scales product and base bias, the added bias comes after, in either order."""
    overlay = shaken(init_overlay("ia3+bitfit", CONFIG, params, KEY))
    path, flat = "layers/self_attn/k_proj", flatten(params)
    kernel, bias = (np.asarray(flat[f"{path}/{name}"][1], np.float64) for name in ("kernel", "bias"))
    vector = np.asarray(flatten(overlay.params)[f"ia3/{path}/ia3_l"][1], np.float64)
    added = np.asarray(flatten(overlay.params)[f"bitfit/{path}/bias"][1], np.float64)
    x = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    expected = vector * (x @ kernel + bias) + added
    swapped = overlay.replace(method="bitfit+ia3", spec=overlay.spec[::-1])
    for own in (overlay, swapped):
        got = record(own, path, 1)(x, flat[f"{path}/kernel"][1], flat[f"{path}/bias"][1])
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("method", STACKS)
def test_a_stack_comes_back_from_its_folder(params, method, tmp_path):
    """save -> load keeps method, settings and arrays bitwise; each part is a folder that loads alone."""
    overlay = shaken(init_overlay(method, CONFIG, params, KEY, **STACKS[method]))
    save_adapter(tmp_path, overlay)
    again = load_adapter(tmp_path, CONFIG, params)
    assert (again.method, again.spec) == (overlay.method, overlay.spec)
    jax.tree.map(np.testing.assert_array_equal, (again.params, again.frozen), (overlay.params, overlay.frozen))
    for part in stack_parts(overlay):
        alone = load_adapter(tmp_path / part.method, CONFIG, params)
        assert alone.spec == part.spec
        jax.tree.map(np.testing.assert_array_equal, alone.params, part.params)
    assert set(adapter_state_dict(overlay)) == set().union(*(adapter_state_dict(part) for part in stack_parts(overlay)))
    assert jax.tree.structure(overlay_axes(overlay, CONFIG), is_leaf=lambda x: isinstance(x, tuple)).num_leaves == len(
        jax.tree.leaves(overlay)
    )


def test_fields_go_to_the_parts_that_know_them(params):
    """A field that several parts know goes to all of them; one under a part's name goes to it alone and comes first."""
    overlay = init_overlay("lora+bitfit", CONFIG, params, KEY, r=3, target_modules="v_proj")
    lora, bitfit = overlay.spec
    assert lora.fields.r == 3 and lora.fields.target_modules == bitfit.fields.target_modules == ("v_proj",)
    fields = dict(r=3, target_modules="v_proj", lora={"r": 2, "lora_alpha": 5}, bitfit={"target_modules": ["up_proj"]})
    lora, bitfit = init_overlay("lora+bitfit", CONFIG, params, KEY, **fields).spec
    assert (lora.fields.r, lora.fields.lora_alpha, lora.fields.target_modules) == (2, 5.0, ("v_proj",))
    assert bitfit.fields.target_modules == ("up_proj",)


def test_a_stack_is_born_as_its_parts_are(params):
    """Parts that draw, draw; a fresh stack of identities is bitwise the base."""
    overlay = init_overlay("lora+ln_tuning", CONFIG, params, KEY, **STACKS["lora+ln_tuning"])
    assert flatten(overlay.params)["lora/layers/self_attn/q_proj/lora_A"].any()
    assert np.array_equal(logits(params, overlay).view(np.int32), logits(params).view(np.int32))
    assert init_overlay("lora+bitfit", CONFIG, params, KEY, lora_dropout=0.1).draws and not overlay.draws


@pytest.mark.parametrize(
    "method, fields, message",
    [
        ("lora+lora", {}, "'lora\\+lora': names the same method twice"),
        ("lora+ln_tunin", {}, "'ln_tunin': not known; did you mean 'ln_tuning'"),
        ("lora + bitfit", {}, "'lora ': not known; did you mean 'lora'"),
        ("lora+", {}, "overlay method '': not known"),
        ("ia3+boft", dict(boft={"boft_block_size": 4}), "'ia3\\+boft': layers/.*: two overlays both set 'post' there"),
        ("oft+boft", dict(oft_block_size=8, boft_block_size=4), "two overlays both set 'rotation' there"),
        ("lora+bitfit", dict(lora_alpa=3), "lora_alpa: none of lora, bitfit has such a field; did you mean 'lora_alpha'"),
        ("lora+bitfit", dict(lora={"alpha": 3}), "alpha = 3: is not a field that lora supports"),
        ("lora+bitfit", dict(lora=3), "lora = 3: must map lora's fields to values"),
        ("lora+ln_tuning", dict(target_modules="q_proj"), "'q_proj' matches no norm"),
    ],
)
def test_refusals(params, method, fields, message):
    """What cannot be one overlay is one line, said before anything is trained."""
    with pytest.raises(QtjaxError, match=message) as error:
        init_overlay(method, CONFIG, params, KEY, **fields)
    assert "\n" not in str(error.value)


def test_a_stack_with_an_adapter_that_cannot_be_merged_says_which(params):
    """houlsby in a stack: the others stack with it, and merge names it."""
    overlay = trained("lora+houlsby", params, r=2)
    assert np.isfinite(logits(params, overlay)).all()
    with pytest.raises(QtjaxError, match="lora\\+houlsby cannot be merged into weights: houlsby: the adapter behind"):
        merge(CONFIG, params, overlay)


@pytest.mark.parametrize(
    "parts, message",
    [
        (["lora", "../x"], "'../x': not known"),
        (["lora"], "a stack has two parts or more"),
        ("lora", "must name the parts"),
        (["bitfit", "lora"], "holds a lora adapter.*calls it 'bitfit'"),
        (["lora", "ia3"], "ia3: no such folder"),
    ],
)
def test_a_stack_folder_that_lies_is_refused(params, parts, message, tmp_path):
    """The list of parts names known methods that stand in their folders."""
    save_adapter(tmp_path, init_overlay("lora+bitfit", CONFIG, params, KEY))
    if parts == ["bitfit", "lora"]:
        (tmp_path / "bitfit").rename(tmp_path / "other")
        (tmp_path / "lora").rename(tmp_path / "bitfit")
        (tmp_path / "other").rename(tmp_path / "lora")
    (tmp_path / "qtjax_stack.json").write_text(json.dumps({"parts": parts}))
    with pytest.raises(QtjaxError, match=message):
        load_adapter(tmp_path, CONFIG, params)


def test_one_folder_holds_one_adapter(tmp_path):
    """A plain adapter saved where a stack stood is what is read, and the other way round."""
    params = base_params()
    stack = trained("lora+ln_tuning", params)
    plain = trained("lora", params, r=3)
    for first, second in ((stack, plain), (plain, stack)):
        save_adapter(tmp_path, first)
        save_adapter(tmp_path, second)
        assert load_adapter(tmp_path, CONFIG, params).method == second.method
