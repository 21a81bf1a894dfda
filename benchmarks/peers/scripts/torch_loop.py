"""Row script: a plain transformers/torch training loop, full or with peft's LoRA.

options: attention sdpa | eager; logits all | answers (transformers' logits_to_keep); micro: samples a forward pass (0: all of
the step), sorted by length first; grouped: batches of similar length, as transformers' group_by_length; fused: torch's fused
AdamW; compile: torch.compile.
"""

from importlib.metadata import version

import numpy as np
import torch
from measuring import Meter, Samples, padded, read_job, read_samples
from transformers import AutoModelForCausalLM


def load(job: dict) -> torch.nn.Module:
    """The model of the job in float32, with the adapter that LoRA starts from."""
    options = job["options"]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation=options.get("attention", "sdpa"))
    model.config.use_cache = False
    if job["method"] == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    model.train()
    return model


def optimizer_of(model: torch.nn.Module, job: dict) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = True if job["options"].get("fused") else None
    return torch.optim.AdamW(trained, lr=job["learning_rate"], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=fused)


def loss_sum(model: torch.nn.Module, samples: Samples, indices, logits: str) -> torch.Tensor:
    """Summed nll of the targets of some samples."""
    ids, targets, real = (torch.from_numpy(x) for x in padded(samples, indices))
    labels, wanted = ids[:, 1:], targets[:, 1:]
    given = {"input_ids": ids, "attention_mask": real.long()}
    if logits == "answers":
        keep = torch.cat([wanted, torch.zeros_like(wanted[:, :1])], dim=1)
        out = model(**given, logits_to_keep=keep).logits
        return torch.nn.functional.cross_entropy(out, labels[wanted], reduction="sum")
    out = model(**given).logits[:, :-1]
    return torch.nn.functional.cross_entropy(out.flatten(0, 1), labels.masked_fill(~wanted, -100).flatten(), reduction="sum")


def parts(samples: Samples, indices, micro: int) -> list:
    """The samples of a step by forward pass."""
    if not micro:
        return [indices]
    ordered = sorted(indices, key=lambda i: len(samples.ids[i]))
    return [ordered[at : at + micro] for at in range(0, len(ordered), micro)]


def step(model, optimizer, samples: Samples, indices, options: dict) -> float:
    """One optimizer step; the loss per target."""
    total, count = 0.0, samples.count(indices)
    for part in parts(samples, indices, options.get("micro", 0)):
        loss = loss_sum(model, samples, part, options.get("logits", "all")) / count
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def grouped(samples: Samples, order: np.ndarray, warmup: int) -> np.ndarray:
    """Batches of similar length, of the warm-up's samples and of the timed ones; the timed work is the same as in file order."""
    out = []
    for window in (order[:warmup], order[warmup:]):
        ordered = sorted(window.ravel().tolist(), key=lambda i: len(samples.ids[i]))
        batches = np.asarray(ordered, np.int64).reshape(window.shape)
        out.append(np.random.default_rng(0).permutation(batches))
    return np.concatenate(out)


def main() -> None:
    job = read_job()
    options, samples, meter = job["options"], read_samples(job["data"]), Meter(job)
    model = load(job)
    optimizer = optimizer_of(model, job)
    run = torch.compile(model, dynamic=True) if options.get("compile") else model
    order = grouped(samples, samples.order, job["warmup"]) if options.get("grouped") else samples.order
    for indices in order[: job["steps"]]:
        loss = step(run, optimizer, samples, indices.tolist(), options)
        if not meter.mark(loss, indices, samples.tokens(indices)):
            break
    names = ("torch", "transformers", *(["peft"] if job["method"] == "lora" else []))
    meter.write(versions={name: version(name) for name in names}, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
