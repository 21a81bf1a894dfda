"""An overlay over another base than its own: one line, whatever the method."""

import jax
import jax.numpy as jnp
import pytest
from tests.overlays.cases import SMALL, TASKS
from tests.overlays.tiny_model import CONFIG, base_params

from qtjax import models
from qtjax.errors import QtjaxError
from qtjax.overlays import METHODS, abstract_overlay, init_overlay

# Deeper, and wider, each with everything else the same.
OTHERS = {"layers": CONFIG.replace(num_hidden_layers=4), "width": CONFIG.replace(hidden_size=48)}
FREE = {("prompt", "layers"), ("ptuning", "layers"), ("mpt", "layers"), ("prefix", "width")}  # of what they do not know


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("other", OTHERS)
def test_apply_refuses_an_overlay_of_another_base(method, other):
    """Other layers or another width: a QtjaxError that names the method and says so, before anything is compiled."""
    config = CONFIG.replace(quantization="nf4" if method == "qlora" else None)
    overlay = abstract_overlay(method, config, **(SMALL[method] or {}))
    params = models.abstract_params(OTHERS[other].replace(quantization=config.quantization))
    ids, tasks = jax.ShapeDtypeStruct((2, 5), jnp.int32), jnp.zeros(2, jnp.int32) if method in TASKS else None

    def run():
        return jax.eval_shape(
            lambda p, o, i: models.apply(OTHERS[other].replace(quantization=config.quantization), p, i, overlay=o, task_ids=tasks),
            params, overlay, ids,
        )  # fmt: skip

    if (method, other) in FREE:
        run()
        return
    with pytest.raises(QtjaxError, match=f"{method} .*another base") as error:
        run()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_generation_refuses_it_as_well(method):
    """Of another width: the same line as `apply`, not an answer or a traceback of the compiler."""
    overlay = init_overlay(method, CONFIG, base_params(), jax.random.key(0), **SMALL[method])
    other = CONFIG.replace(hidden_size=48, head_dim=16)
    with pytest.raises(QtjaxError, match=f"{method} .*another base"):
        models.generate(other, base_params(other), [[1, 2, 3]], max_new_tokens=2, overlay=overlay)


def test_fresh_experts_that_could_not_learn_are_refused():
    """X-LoRA over fresh frozen experts has no gradient at all: said, with what to give instead."""
    with pytest.raises(QtjaxError, match="adapters = 3: fresh experts.*use_trainable_adapters"):
        init_overlay("xlora", CONFIG, base_params(), jax.random.key(0))
