"""Row script: nll and entropy of every answer token in torch, forward only.

options: attention sdpa | eager; logits all | answers (transformers' logits_to_keep).
"""

from importlib.metadata import version

import numpy as np
import torch
from measuring import Meter, Samples, padded, read_job, read_samples
from torch_loop import load


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


def main() -> None:
    job = read_job()
    options, samples, meter = job["options"], read_samples(job["data"]), Meter(job)
    model = load(job).eval()
    out = []
    for indices in samples.order[: job["steps"]]:
        out.append(scores(model, samples, indices, options.get("logits", "all")))
        if not meter.mark(None, indices, samples.tokens(indices)):
            break
    np.savez(job["scores"], nll=np.concatenate([n for n, _ in out]), entropy=np.concatenate([e for _, e in out]))
    meter.write(versions={name: version(name) for name in ("torch", "transformers")}, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
