"""Live comparisons with peft: random bases that transformers makes, rows with padding, and the gates of what must agree."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtjax import models
from qtjax.checkpoints import adapter_state_dict, load_pretrained, save_pretrained
from qtjax.models import Quantized
from qtjax.tree import flatten, unflatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

_apply = jax.jit(models.apply, static_argnums=0)


def make_base(folder, family, fields, seed):
    """A random model, norms and biases random too, saved by transformers: (folder, config, params)."""
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**fields)).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    return folder, *load_pretrained(folder)


def base_fixture(bases, first_seed=0):
    """A module's fixture that runs its tests over every base of {name: (family, fields)}."""

    @pytest.fixture(scope="module", params=bases)
    def base(request, tmp_path_factory):
        """A random base that transformers made: (folder, config, params)."""
        seed = first_seed + sorted(bases).index(request.param)
        return make_base(tmp_path_factory.mktemp(request.param), *bases[request.param], seed)

    return base


def bases_fixture(bases):
    """A module's fixture of all bases by name, for tests that choose."""

    @pytest.fixture(scope="module")
    def made(tmp_path_factory):
        """Random bases that transformers made, by name: (folder, config, params)."""
        return {name: make_base(tmp_path_factory.mktemp(name), *bases[name], seed) for seed, name in enumerate(bases)}

    return made


@pytest.fixture
def peft_with_butterflies(monkeypatch):
    """peft computes butterflies with a CUDA extension only; here its one operation stands in plain torch."""

    class BlockDiagonal:
        @staticmethod
        def apply(blocks):
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: True)
    monkeypatch.setattr("peft.tuners.boft.layer.FastBlockDiag", BlockDiagonal)


def torch_base(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def dequantised(folder, config, params):
    """The folder, holding the values that a quantised base computes with, as torch's base."""
    plain = {path: x.dequantize(jnp.float32) if isinstance(x, Quantized) else x for path, x in flatten(params).items()}
    save_pretrained(folder, config.replace(quantization=None), unflatten(plain))
    return folder


def peft_trainables(model):
    """{key in an adapter file: parameter} of what peft trains."""
    return {k.replace(".default", ""): w for k, w in model.named_parameters() if w.requires_grad}


def same_gradients(overlay, gradient, theirs, floor=0.0):
    """The gradient of the overlay's trainables is {key: peft's}, each within 1e-3 of its norm (plus `floor`)."""
    ours = adapter_state_dict(overlay.replace(params=gradient))
    for key, reference in theirs.items():
        assert np.linalg.norm(ours[key] - reference) <= 1e-3 * np.linalg.norm(reference) + floor, key
    return ours


@dataclass(frozen=True)
class Rows:
    """Rows to compare on: ids, mask int [B, L], 0 at padding."""

    ids: np.ndarray
    mask: np.ndarray

    @property
    def real(self):
        return self.mask == 1

    @property
    def labels(self):
        """As transformers takes them: -100 at padding."""
        return np.where(self.real, self.ids, -100)

    def run_torch(self, model, labels=None, **more):
        """The output of a torch model; with labels (True: those of the rows) it has a loss."""
        if labels is not None:
            more["labels"] = torch.tensor(self.labels if labels is True else labels)
        return model(input_ids=torch.tensor(self.ids), attention_mask=torch.tensor(self.mask), **more)

    def torch_logits(self, model, **more):
        """Of the real slots: peft returns logits at a prompt's virtual tokens as well."""
        with torch.no_grad():
            logits = self.run_torch(model, **more).logits
        return logits[:, logits.shape[1] - self.ids.shape[1] :].numpy()

    def logits(self, config, params, overlay=None, task_ids=None):
        return _apply(config, params, self.ids, self.mask, overlay=overlay, task_ids=task_ids)

    def loss(self, logits, weight=None):
        """Mean next-token nll over real targets, as transformers has it; weight [B, L - 1]: other targets."""
        weight = jnp.asarray(self.mask[:, 1:] if weight is None else weight)
        logp = jax.nn.log_softmax(logits[:, :-1])
        return -(jnp.take_along_axis(logp, self.ids[:, 1:, None], -1)[..., 0] * weight).sum() / weight.sum()

    def apart(self, got, expected):
        """The largest difference at real slots."""
        return np.abs(np.asarray(got) - np.asarray(expected))[self.real].max()

    def close(self, got, expected):
        """float32 in another order: 2e-4, of a tenth of the largest logit where that is above 10."""
        difference = self.apart(got, expected)
        assert difference <= 2e-4 * max(1.0, np.abs(np.asarray(expected))[self.real].max() / 10), difference


def padded_rows(vocabulary, length, end):
    """Two random rows, the second one padded from `end` on."""
    ids = np.random.default_rng(3).integers(3, vocabulary, (2, length))
    mask = np.ones_like(ids)
    mask[1, end:] = 0
    return Rows(ids, mask)
