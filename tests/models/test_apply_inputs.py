"""qtjax.apply takes what tokenizers return: lists as well as arrays."""

import jax
import numpy as np

from qtjax import models


def test_lists_mean_what_arrays_mean():
    """A mask, positions and segments given as Python lists change the logits as arrays do."""
    config = models.ModelConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, initializer_range=0.5,
    )  # fmt: skip
    params = models.init_params(config, jax.random.key(0))
    ids, mask = [[3, 4, 5, 6], [7, 8, 9, 1]], [[0, 0, 1, 1], [1, 1, 1, 1]]
    segments, positions = [[0, 0, 1, 1], [1, 1, 2, 2]], [[0, 0, 0, 1], [0, 1, 0, 1]]
    for given in ({"attention_mask": mask}, {"segment_ids": segments, "position_ids": positions}):
        lists = models.apply(config, params, ids, **given)
        arrays = models.apply(config, params, np.array(ids), **{k: np.array(v) for k, v in given.items()})
        np.testing.assert_array_equal(lists, arrays)
        assert np.abs(np.asarray(lists) - np.asarray(models.apply(config, params, ids))).max() > 1e-3
