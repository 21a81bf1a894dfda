"""Row script: qtjax's own run on full data, full fine-tuning or LoRA: the session that `python -m qtjax.train` opens, step by step.

options: none; the job's `config` is the run's, as JSON.
"""

import shutil
from importlib.metadata import version

import numpy as np
from measuring import Meter, read_job, read_samples
from rich.console import Console

from qtjax.config import from_json
from qtjax.train import use_compile_cache
from qtjax.training.run import open_session
from qtjax.training.run_folder import RunFolder


def main() -> None:
    job = read_job()
    samples, meter, config = read_samples(job["data"]), Meter(job), from_json(job["config"])
    use_compile_cache(config)
    shutil.rmtree(config.run.folder, ignore_errors=True)
    with RunFolder.open(config) as folder:
        session = open_session(config, folder, Console(quiet=True))
        loop, last = session.loop, session.total_steps
        assert last == job["steps"], f"the run has {last} steps, the others {job['steps']}"
        for step in range(last):
            indices = loop.plan.batch(step)
            assert np.array_equal(indices, samples.order[step]), f"step {step + 1} reads other samples than the other rows"
            metrics, _ = loop.step(step, last)
            if not meter.mark(metrics["loss"], indices, samples.tokens(indices)):
                break
        shapes = session.loop.shapes
        session.close()
    meter.write(versions={"jax": version("jax")}, compile_seconds=session.seconds["compile"], shapes=list(shapes), fill=metrics["fill"])


if __name__ == "__main__":
    main()
