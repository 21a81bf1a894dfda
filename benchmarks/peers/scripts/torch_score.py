"""Row script: nll and entropy of every answer token in torch, forward only.

options: attention sdpa | eager; logits all | answers (transformers' logits_to_keep); micro: samples a forward pass (0: all of the
step), sorted by length first.
"""

from importlib.metadata import version

import numpy as np
import torch
from measuring import Meter, Samples, padded, read_job, read_samples
from torch_loop import load, parts


@torch.inference_mode()
def scores(model: torch.nn.Module, samples: Samples, indices, logits: str) -> tuple[np.ndarray, np.ndarray]:
    """nll and entropy float32 [targets] in nats, sample after sample."""
    ids, targets, real = (torch.from_numpy(x) for x in padded(samples, indices))
    labels, wanted = ids[:, 1:], targets[:, 1:]
    given = {"input_ids": ids, "attention_mask": real.long()}
    if logits == "answers":
        keep = torch.cat([wanted, torch.zeros_like(wanted[:, :1])], dim=1)
        out, labels = model(**given, logits_to_keep=keep).logits, labels[wanted]
    else:
        out = model(**given).logits[:, :-1]
    total = out.logsumexp(-1)
    nll = total - out.gather(-1, labels[..., None])[..., 0]
    # Two arrays of the logits' size; log_softmax and its exponential would make four.
    entropy = total - (out - total[..., None]).exp_().mul_(out).sum(-1)
    return tuple((x if logits == "answers" else x[wanted]).numpy() for x in (nll, entropy))


def by_sample(samples: Samples, indices, flat: np.ndarray) -> list:
    """The values of each sample's targets."""
    return np.split(flat, np.cumsum([samples.targets[i].sum() for i in indices])[:-1])


def step_scores(model: torch.nn.Module, samples: Samples, indices, options: dict) -> tuple[np.ndarray, np.ndarray]:
    """`scores` of a step's samples, in its order whatever the order of the forward passes."""
    found: tuple[dict, dict] = ({}, {})
    for part in parts(samples, indices, options.get("micro", 0)):
        for signal, flat in zip(found, scores(model, samples, part, options.get("logits", "all"))):
            signal.update(zip(part, by_sample(samples, part, flat)))
    return tuple(np.concatenate([signal[i] for i in indices]) for signal in found)


def main() -> None:
    job = read_job()
    options, samples, meter = job["options"], read_samples(job["data"]), Meter(job)
    model = load(job).eval()
    out = []
    for indices in samples.order[: job["steps"]]:
        out.append(step_scores(model, samples, indices.tolist(), options))
        if not meter.mark(None, indices, samples.tokens(indices)):
            break
    np.savez(job["scores"], nll=np.concatenate([n for n, _ in out]), entropy=np.concatenate([e for _, e in out]))
    meter.write(versions={name: version(name) for name in ("torch", "transformers")}, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
