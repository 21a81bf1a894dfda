"""Row script: Tunix's PeftTrainer, full fine-tuning of its LLaMA on rows padded to the longest sample allowed, as it compiles once.

options: none. Tunix 0.1.7's LLaMA rotates with base 1,000,000 whatever its config says; here it takes the config's, which costs the same.
"""

import functools
import json
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from measuring import Meter, padded, read_job, read_samples
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params
from tunix.sft import hooks, peft_trainer, utils


class Steps(hooks.TrainingHooks):
    """Marks every optimizer step once its loss is there."""

    def __init__(self, meter: Meter, batches: list, samples):
        self.meter, self.batches, self.samples = meter, batches, samples

    def on_train_start(self, train_ctx):
        pass

    def on_train_end(self, train_ctx):
        pass

    def on_train_step_start(self, train_ctx):
        pass

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        indices = self.batches[len(self.meter.marks)]
        self.meter.mark(float(train_loss), indices, self.samples.tokens(indices))

    def on_eval_step_start(self, train_ctx):
        pass

    def on_eval_step_end(self, train_ctx, eval_loss):
        pass


def load(folder: str):
    """The HF folder as Tunix's LLaMA in float32."""
    raw = json.loads((Path(folder) / "config.json").read_text())
    theta = raw.get("rope_theta") or raw["rope_parameters"]["rope_theta"]
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=theta)
    config = llama.ModelConfig(
        num_layers=raw["num_hidden_layers"], vocab_size=raw["vocab_size"], embed_dim=raw["hidden_size"], hidden_dim=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"], head_dim=raw["head_dim"], num_kv_heads=raw["num_key_value_heads"], rope_theta=theta,
        norm_eps=raw["rms_norm_eps"], weight_tying=raw["tie_word_embeddings"],
    )  # fmt: skip
    mesh = jax.sharding.Mesh([[jax.devices()[0]]], ("fsdp", "tp"))
    return params.create_model_from_safe_tensors(folder, config, mesh, jnp.float32)


def model_input(x: peft_trainer.TrainingInput) -> dict:
    """As Tunix's own examples make it: input_mask is True at targets, and padding is known by its id (0, which no text has)."""
    real = x.input_tokens != 0
    return {
        "input_tokens": x.input_tokens, "input_mask": x.input_mask, "positions": utils.build_positions_from_mask(real),
        "attention_mask": utils.make_causal_attn_mask(real),
    }  # fmt: skip


def main() -> None:
    job = read_job()
    samples, meter = read_samples(job["data"]), Meter(job)
    order = samples.order[: job["steps"]]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(job["learning_rate"], weight_decay=0.0))
    trainer = peft_trainer.PeftTrainer(
        load(job["model"]), optimizer, peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=job["steps"], max_inflight_computations=1)
    )
    trainer = trainer.with_gen_model_input_fn(model_input)
    trainer.with_training_hooks(Steps(meter, order.tolist(), samples))

    def batches():
        for indices in order:
            ids, targets, _ = padded(samples, indices, job["max_length"])
            yield peft_trainer.TrainingInput(input_tokens=ids.astype("int32"), input_mask=targets)

    trainer.train(batches())
    meter.write(versions={"google-tunix": version("google-tunix"), "jax": version("jax")})


if __name__ == "__main__":
    main()
