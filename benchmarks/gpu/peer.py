"""The same rows in torch with transformers and peft, in a process of its own: `PYTHON -m benchmarks.gpu.peer JOB.json`.

Attention is torch's scaled_dot_product_attention; full training keeps float32 master weights under autocast (or, as a row of its own,
bfloat16 weights and moments), LoRA a bfloat16 base under peft; scoring takes nll and entropy from whole logits. Needs neither jax nor
qtjax; imports of torch stand inside functions, so that an interpreter without it can say so.
"""

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

from benchmarks.gpu.timing import Missing, serve, timed

PACKAGES = {kind: ("torch", "transformers") for kind in ("check", "full", "score")} | {"lora": ("torch", "transformers", "peft")}


def ready(job: dict[str, Any]) -> str:
    """The device's name in torch: cuda, or cpu where the job asks for it. Raises Missing."""
    for name in PACKAGES[job["kind"]]:
        if importlib.util.find_spec(name) is None:
            raise Missing(f"no package {name} in this interpreter")
    import torch

    torch.manual_seed(0)
    if job["backend"] == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise Missing(f"torch {torch.__version__} finds no CUDA device")
    return "cuda"


def new_model(job: dict[str, Any], device: str, dtype: str) -> Any:
    """Random weights of the shape, made on the device."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**job["hf"]), dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return placed(model, job, device)


def placed(model: Any, job: dict[str, Any], device: str) -> Any:
    """On the device, in training mode, recomputing activations where the job says so."""
    model = model.to(device)
    model.config.use_cache = False
    if job.get("memory") == "checkpoint":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


class Trainer:
    """AdamW as qtjax's default: no weight decay, gradients clipped to norm 1; a step accumulates over microbatches."""

    def __init__(self, model: Any, device: str, rate: float):
        import torch

        self.model, self.device = model, device
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=0.0, fused=True)

    def step(self, microbatches: Any) -> float:
        """One optimizer step on ids [M, rows, length]; the mean loss, for which it waits."""
        import torch

        total = 0.0
        for ids in microbatches:
            with torch.autocast(self.device, torch.bfloat16):
                loss = self.model(input_ids=ids, labels=ids).loss / len(microbatches)
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)


def with_adapter(model: Any, rank: int) -> Any:
    """A fresh LoRA on all linear modules."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"))


def token_scores(model: Any, ids: Any) -> tuple[Any, Any]:
    """nll and entropy float32 [rows, length - 1] of every token but the first, from whole logits."""
    import torch

    with torch.inference_mode():
        log_p = torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), dim=-1)
        nll = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
        return nll, torch.special.entr(log_p.exp()).sum(-1)


def batches(job: dict[str, Any], device: str) -> Any:
    """Random ids [M, rows, length] of one step or pass."""
    import torch

    return torch.randint(job["hf"]["vocab_size"], (job["tokens"] // (job["rows"] * job["length"]), job["rows"], job["length"]), device=device)


def peak_memory(device: str) -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Optimizer steps of job["tokens"] random tokens."""
    device = ready(job)
    model = new_model(job, device, "float32" if job["kind"] == "full" and job["weights"] == "float32" else "bfloat16")
    trainer = Trainer(with_adapter(model, job["rank"]) if job["kind"] == "lora" else model, device, 1e-5)
    given = batches(job, device)
    losses = [trainer.step(given)]
    seconds = timed(lambda: losses.append(trainer.step(given)), job["seconds"])
    return {"tokens": given.numel(), "seconds": seconds, "first_loss": losses[0], "last_loss": losses[-1], "memory_bytes": peak_memory(device)}


def score(job: dict[str, Any]) -> dict[str, Any]:
    """Scoring passes over job["tokens"] random tokens."""
    device = ready(job)
    model, given = new_model(job, device, "bfloat16").eval(), batches(job, device)

    def once() -> list[float]:
        sums = [tuple(x.mean() for x in token_scores(model, ids)) for ids in given]
        return [float(sum(each[i] for each in sums)) / len(sums) for i in (0, 1)]

    loss, entropy = once()
    return {
        "tokens": given.numel(), "seconds": timed(once, job["seconds"]), "first_loss": loss, "last_loss": loss, "entropy": entropy,
        "memory_bytes": peak_memory(device),
    }  # fmt: skip


def check(job: dict[str, Any]) -> dict[str, Any]:
    """What the models in job["folder"] give here: by model and kind as ours.check, plain float32 left out."""
    device = ready(job)
    import numpy as np
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    def loaded(folder: Path, dtype: str) -> Any:
        return placed(AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"), job, device)

    out: dict[str, Any] = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}, "models": {}}
    for name, kinds in job["kinds"].items():
        folder = Path(job["folder"]) / name
        ids = torch.from_numpy(np.load(folder / "ids.npy")).long().to(device)
        found = out["models"][name] = {}
        if "score" in kinds:
            nll, entropy = token_scores(loaded(folder, "bfloat16").eval(), ids)
            found["score"] = {"nll": nll.flatten().tolist(), "entropy": entropy.flatten().tolist()}
        if "full" in kinds:
            trainer = Trainer(loaded(folder, "float32"), device, job["rate"])
            found["full"] = [trainer.step(ids[None]) for _ in range(3)]
        if "lora" in kinds and importlib.util.find_spec("peft"):
            import peft

            out["versions"]["peft"] = peft.__version__
            model = peft.PeftModel.from_pretrained(loaded(folder, "bfloat16"), folder / "adapter", is_trainable=True)
            trainer = Trainer(model.train(), device, job["rate"])
            found["lora"] = [trainer.step(ids[None]) for _ in range(3)]
    return out


def out_of_memory(error: BaseException) -> bool:
    """Whether the device had no room."""
    with contextlib.suppress(ImportError):
        import torch

        return isinstance(error, torch.OutOfMemoryError)
    return False


if __name__ == "__main__":
    serve({"check": check, "full": train, "lora": train, "score": score}, out_of_memory)
