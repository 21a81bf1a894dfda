"""Row script: nll and entropy of every answer token by qtjax, forward only: the pass that `python -m qtjax.score` makes.

options: none; the job's `config` is as in qtjax_train.py.
"""

from importlib.metadata import version

import numpy as np
from measuring import Meter, Samples, read_job, read_samples

from qtjax.config import Config, from_json
from qtjax.data.packing import Sample
from qtjax.evals.rows import scored_rows
from qtjax.parallel import make_mesh
from qtjax.train import use_compile_cache
from qtjax.training.open_model import open_model


def packed(samples: Samples, indices: list) -> list[Sample]:
    return [Sample(samples.ids[i].astype(np.int32), samples.targets[i], np.arange(len(samples.ids[i]), dtype=np.int32)) for i in indices]


def scores(config: Config, opened, mesh, samples: Samples, indices: list) -> tuple[np.ndarray, np.ndarray]:
    """nll and entropy float32 [targets] in nats, sample after sample."""
    row_length = config.row_length
    out = np.zeros((2, len(indices), row_length), np.float32)
    launches = scored_rows(
        opened.config, opened.params, packed(samples, indices), row_length=row_length, rows=config.train.rows, overlay=opened.overlay, mesh=mesh
    )
    for rows, found in launches:
        there = rows.loss_mask
        for signal, values in zip(out, found):
            signal[rows.sample[there], rows.position_ids[there]] = values[there]
    return tuple(np.concatenate([row[np.flatnonzero(samples.targets[i])] for row, i in zip(signal, indices)]) for signal in out)


def main() -> None:
    job = read_job()
    samples, meter, config = read_samples(job["data"]), Meter(job), from_json(job["config"])
    use_compile_cache(config)
    mesh = make_mesh(config.mesh)
    opened = open_model(config.model, mesh=mesh)
    order, warmup, found = samples.order, job["warmup"], []
    # Packed together, not step by step: nothing is updated in between.
    for part in (order[:1], order[1:warmup], order[warmup : job["steps"]]):
        indices = part.ravel().tolist()
        if indices:
            found.append(scores(config, opened, mesh, samples, indices))
            if not meter.mark(None, indices, samples.tokens(indices)):
                break
    np.savez(job["scores"], nll=np.concatenate([n for n, _ in found]), entropy=np.concatenate([e for _, e in found]))
    meter.write(versions={"jax": version("jax")})


if __name__ == "__main__":
    main()
