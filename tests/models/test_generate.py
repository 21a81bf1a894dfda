"""Cached generation: greedy text equals transformers', sampling follows its law, nothing compiles per token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtjax.checkpoints import load_pretrained
from qtjax.models import ModelConfig, abstract_params, apply, generate
from qtjax.models.generate import _sample
from qtjax.tree import flatten, unflatten

TINY = ModelConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rope_theta=1000.0,
)  # fmt: skip


def params_of(config: ModelConfig) -> dict:
    """Random weights from numpy: drawing them on the device would cost seconds of compilation per test."""
    rng = np.random.default_rng(0)
    flat = flatten(abstract_params(config))
    return unflatten({p: jnp.asarray(rng.normal("norm" in p, 0.3, s.shape), s.dtype) for p, s in flat.items()})


def left_padded(vocab: int, lengths: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, length in enumerate(lengths):
        mask[row, mask.shape[1] - length :] = 1
    return np.random.default_rng(seed).integers(3, vocab, mask.shape) * mask, mask


def torch_greedy(model, ids, mask, new_tokens, eos=None) -> np.ndarray:
    """What transformers' generate appends, filled with 0 after the end, [B, new_tokens]."""
    import torch

    out = model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=new_tokens, do_sample=False,
        eos_token_id=eos, pad_token_id=0,
    )[:, ids.shape[1] :].numpy()  # fmt: skip
    return np.pad(out, ((0, 0), (0, new_tokens - out.shape[1])))


@pytest.mark.parity
@pytest.mark.parametrize("name", ("llama-gqa-untied", "llama-mha-tied", "llama-llama3-rope", "mistral-window"))
def test_greedy_equals_transformers(reference, name):
    """A left-padded batch of prompts continues token for token like torch's generate (window 8 is passed on the way)."""
    folder, model = reference(name)
    config, params = load_pretrained(folder)
    ids, mask = left_padded(config.vocab_size, (11, 4, 1, 7))
    ours = generate(config, params, ids, mask, max_new_tokens=20, eos_token_id=(), pad_token_id=0)
    theirs = torch_greedy(model, ids, mask, 20, eos=-1)
    assert len(set(theirs.ravel())) > 8, "a reference that repeats one token proves nothing"
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parity
def test_rows_stop_at_eos_like_transformers(reference):
    """Each row ends with (and includes) its first EOS, whichever of several it is; the rest is padding."""
    folder, model = reference("llama-gqa-untied")
    config, params = load_pretrained(folder)
    ids, mask = left_padded(config.vocab_size, (9, 5, 3, 8))
    free = np.asarray(generate(config, params, ids, mask, max_new_tokens=16, eos_token_id=(), pad_token_id=0))
    eos = (int(free[0, 4]), int(free[1, 9]))  # rows end at different steps, some perhaps never
    ours = generate(config, params, ids, mask, max_new_tokens=16, eos_token_id=eos, pad_token_id=0)
    np.testing.assert_array_equal(ours, torch_greedy(model, ids, mask, 16, eos=list(eos)))
    for row, whole in zip(np.asarray(ours), free):
        ends = np.flatnonzero(np.isin(whole, eos))
        stop = ends[0] + 1 if len(ends) else 16
        np.testing.assert_array_equal(row, np.where(np.arange(16) < stop, whole, 0))


@pytest.mark.parity
@pytest.mark.shared
def test_stories260k_greedy_text(shared, torch):
    """A pretrained LLaMA tells the same story, prompts of unequal length batched, stopped at its EOS."""
    import transformers

    folder = shared / "models" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config, params = load_pretrained(folder)
    prompts = [[1, *tokenizer.encode(text, add_special_tokens=False)] for text in ("Once upon a time", "Lily and her dog", "The")]
    mask = np.array([[0] * (max(map(len, prompts)) - len(p)) + [1] * len(p) for p in prompts])
    ids = np.array([[0] * (mask.shape[1] - len(p)) + p for p in prompts])
    ours = np.asarray(generate(config, params, ids, mask, max_new_tokens=48, pad_token_id=0))
    theirs = torch_greedy(model, ids, mask, 48, eos=2)
    assert [tokenizer.decode(row) for row in ours] == [tokenizer.decode(row) for row in theirs]
    assert "was" in tokenizer.decode(ours[0]), "a story is expected"


def test_cached_equals_uncached():
    """Token by token with the cache = argmax of a full forward pass over everything so far, for both attention kinds."""
    step = jax.jit(apply, static_argnums=0)
    for config in (TINY, TINY.replace(model_type="mistral", sliding_window=4)):
        params = params_of(config)
        ids, mask = left_padded(config.vocab_size, (6, 3))
        ours = np.asarray(generate(config, params, ids, mask, max_new_tokens=8, eos_token_id=()))
        width = ids.shape[1]
        row = np.concatenate([ids, np.zeros((2, 8), ids.dtype)], axis=1)
        real = np.concatenate([mask, np.ones((2, 8), mask.dtype)], axis=1)
        positions = np.maximum(real.cumsum(1) - 1, 0)
        for t in range(8):
            logits = np.asarray(step(config, params, row, attention_mask=real, position_ids=positions))
            row[:, width + t] = logits[:, width + t - 1].argmax(-1)
        np.testing.assert_array_equal(ours, row[:, width:])


def test_batch_rows_are_independent():
    """A row's continuation is the same alone and beside longer prompts (left padding has no influence)."""
    params = params_of(TINY)
    ids, mask = left_padded(TINY.vocab_size, (9, 4))
    both = np.asarray(generate(TINY, params, ids, mask, max_new_tokens=10, eos_token_id=()))
    alone = np.asarray(generate(TINY, params, ids[1:, 5:], mask[1:, 5:], max_new_tokens=10, eos_token_id=()))
    np.testing.assert_array_equal(both[1], alone[0])


def test_sampling_is_a_function_of_the_key():
    """The same key gives the same text, another key another, temperature 0 the greedy one whatever the key."""
    params = params_of(TINY)
    ids, mask = left_padded(TINY.vocab_size, (5, 5, 5))

    def draw(seed, temperature=1.0, top_p=1.0):
        key = jax.random.key(seed)
        return np.asarray(
            generate(TINY, params, ids, mask, max_new_tokens=12, temperature=temperature, top_p=top_p, key=key, eos_token_id=())
        )

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()
    np.testing.assert_array_equal(draw(0, temperature=0.0), draw(1, temperature=0.0))
    np.testing.assert_array_equal(draw(3, temperature=1e-4), draw(0, temperature=0.0))
    np.testing.assert_array_equal(draw(3, top_p=1e-6), draw(0, temperature=0.0))


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Probabilities after temperature and top-p, straight from the definition (Holtzman et al. 2020), float64."""
    p = np.exp(logits / temperature - (logits / temperature).max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1]
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize("temperature, top_p", ((1.0, 1.0), (0.7, 0.9), (1.6, 0.5), (1.0, 0.3)))
def test_top_p_law(temperature, top_p):
    """Drawn frequencies are the nucleus distribution: nothing outside it, each token within 5 standard errors."""
    logits = np.array([2.0, 1.5, 0.1, -0.3, 1.1, -2.0, 0.7, -4.0])
    draws = 40_000
    rows = jnp.broadcast_to(jnp.array(logits, jnp.float32), (draws, 8))
    drawn = _sample(rows, jnp.float32(temperature), jnp.float32(top_p), jax.random.key(0))
    share = np.bincount(np.asarray(drawn), minlength=8) / draws
    expected = nucleus(logits, temperature, top_p)
    assert (share[expected == 0] == 0).all()
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-9).all()


def test_nothing_compiles_per_token_or_per_prompt():
    """One compilation serves 1 or 24 produced tokens' worth of steps, other prompts, paddings, keys, temperatures."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    params = params_of(TINY)

    def draw(seed, lengths, **knobs):
        ids, mask = left_padded(TINY.vocab_size, lengths, seed)
        return generate(TINY, params, ids, mask, max_new_tokens=24, eos_token_id=(5,), pad_token_id=0, **knobs)

    draw(0, (7, 7)), draw(0, (7, 7), temperature=0.5, top_p=0.9, key=jax.random.key(0))
    keys = [jax.random.key(i) for i in range(4)]
    before = len(compiled)
    assert before > 0, "the listener hears nothing"
    for seed in range(4):
        draw(seed, (7, 3))
        draw(seed, (7, 2), temperature=0.3 + seed, top_p=0.5, key=keys[seed])
    assert len(compiled) == before
