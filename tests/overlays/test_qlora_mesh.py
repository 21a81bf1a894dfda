"""A quantised base on eight devices lies cut where whole blocks allow it, and computes the same."""

import pytest

pytestmark = pytest.mark.slow

SCRIPT = '''
import sys
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from qtjax import models
from qtjax.checkpoints import load_pretrained, save_pretrained
from qtjax.config import MeshSection
from qtjax.overlays import init_overlay
from qtjax.parallel import make_mesh
from qtjax.training.state import Subject

config = models.ModelConfig(vocab_size=32, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=64, initializer_range=0.1)
save_pretrained(sys.argv[1], config, models.init_params(config, jax.random.key(0)))
mesh = make_mesh(MeshSection(fsdp=2, tensor=2))
ids = np.arange(40).reshape(4, 10) % 32
for kind in models.KINDS:
    own, alone = load_pretrained(sys.argv[1], quantization=kind)
    _, params = load_pretrained(sys.argv[1], quantization=kind, mesh=mesh)
    assert jax.tree.structure(params) == jax.tree.structure(alone)
    jax.tree.map(np.testing.assert_array_equal, params, alone)
    q, down = params["layers"]["self_attn"]["q_proj"]["kernel"], params["layers"]["mlp"]["down_proj"]["kernel"]
    cut = {"nf4": P(None, "tensor", "fsdp"), "int8": P(None, "fsdp", "tensor"), "int4": P(None, "fsdp", "tensor")}[kind]
    assert q.codes.sharding.spec == cut, q.codes.sharding
    # 96 inputs: nf4 has blocks across rows and stays whole; int4's two blocks of inputs go to two devices
    whole = {"nf4": P(), "int8": P(None, "tensor", "fsdp"), "int4": P(None, "tensor", "fsdp")}[kind]
    assert down.codes.sharding.spec == whole, down.codes.sharding
    overlay = init_overlay("qlora", own, params, jax.random.key(1), r=2)
    subject = Subject(own, overlay)
    _, frozen = subject.split(params)
    jax.tree.map(jax.device_put, frozen, subject.frozen_shardings(mesh))
    with jax.set_mesh(mesh):
        got = models.apply(own, params, ids)
    np.testing.assert_allclose(got, models.apply(own, alone, ids), atol=1e-4)
    _, drawn = load_pretrained(sys.argv[1], quantization=kind, mesh=mesh, random_init=True)
    assert drawn["layers"]["self_attn"]["q_proj"]["kernel"].codes.sharding.spec == cut
print("ok")
'''


def test_a_quantised_base_on_a_mesh(run_python, tmp_path):
    """Loading on a mesh gives the bits of loading on one device, shardings follow the base leaf's axes, logits are the same."""
    assert run_python(SCRIPT, str(tmp_path), devices=8).strip() == "ok"
