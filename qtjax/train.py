"""python -m qtjax.train --config configs/smol.py: fine-tune with Q-Tuning, resuming by itself."""

from pathlib import Path

from rich.console import Console

from qtjax.config import Config, load_config
from qtjax.errors import door
from qtjax.pages import with_own_pages


def use_compile_cache(config: Config) -> None:
    """Keeps compiled programs in the run folder (or run.compile_cache), so that a restart does not compile again."""
    import jax

    folder = Path(config.run.compile_cache or Path(config.run.folder) / "compile_cache").absolute()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def main() -> None:
    config, own = load_config(
        "python -m qtjax.train",
        "Fine-tune a LLaMA-family model with joint sample and token pruning (Q-Tuning). Started again with the same"
        " arguments a run continues where it stopped; a finished run prints its table.",
        extra={
            "quiet": (False, "print only the closing table"),
            "coordinator": ("", "a run of several processes: HOST:PORT of the first, or auto (SLURM, TPU pod, MPI); empty: one process"),
            "processes": (0, "how many, with HOST:PORT"),
            "process": (-1, "which of them this is, counted from 0, with HOST:PORT"),
        },
    )
    import jax

    from qtjax.parallel import join_processes, leaving_together
    from qtjax.training.story import run

    join_processes(own["coordinator"], own["processes"], own["process"])
    use_compile_cache(config)
    quiet = own["quiet"] or jax.process_index() > 0  # one process speaks for all
    with leaving_together():
        run(config, Console(quiet=quiet, stderr=True), quiet=quiet)


if __name__ == "__main__":
    with_own_pages(keep=True)
    door(main)
