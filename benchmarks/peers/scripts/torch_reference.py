"""Script: what every row is checked against. Scores of all samples under the untouched weights, the first steps' losses of full
fine-tuning and of LoRA by the plainest torch loop, and the adapter that every LoRA row starts from.

options: full, lora: whether that is wanted; steps: how many losses; rank, alpha.
"""

import json
from pathlib import Path

import numpy as np
import torch
from measuring import read_job, read_samples
from torch_loop import load, optimizer_of, step
from torch_score import by_sample, step_scores

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_adapter(job: dict) -> None:
    """A fresh LoRA on all seven projections: A is random, B is 0."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = load(job | {"method": "full"})
    rank, alpha = job["options"]["rank"], job["options"]["alpha"]
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    get_peft_model(base, settings).save_pretrained(job["adapter"])


def main() -> None:
    job = read_job()
    options, samples = job["options"], read_samples(job["data"])
    order = samples.order[: job["steps"]]
    model = load(job | {"method": "full"}).eval()
    found = [step_scores(model, samples, indices, {}) for indices in order.tolist()]
    np.savez(job["scores"], nll=np.concatenate([n for n, _ in found]), entropy=np.concatenate([e for _, e in found]))
    nll = [float(part.sum(dtype=np.float64)) for (flat, _), indices in zip(found, order) for part in by_sample(samples, indices, flat)]
    out = {"initial_nll": dict(zip(order.ravel().tolist(), nll)), "losses": {}}
    if options["lora"]:
        write_adapter(job)
    for method in ("full", "lora"):
        if options[method]:
            model = load(job | {"method": method})
            optimizer = optimizer_of(model, job)
            out["losses"][method] = [step(model, optimizer, samples, indices.tolist(), {}) for indices in order[: options["steps"]]]
    Path(job["out"]).write_text(json.dumps(out))


if __name__ == "__main__":
    main()
