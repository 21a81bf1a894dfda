"""Row script: TRL's SFTTrainer on the tokens as they are, its own settings but for the optimizer's and float32 on the CPU.

options: checkpoint: TRL's default gradient checkpointing (true unless said); packing; compile: torch_compile.
"""

from importlib.metadata import version

import torch
from datasets import Dataset
from measuring import Meter, Samples, read_job, read_samples
from torch_loop import load
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Steps(TrainerCallback):
    """Marks every optimizer step once its loss is known."""

    def __init__(self, meter: Meter, batches: list, samples: Samples):
        self.meter, self.batches, self.samples = meter, batches, samples

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            indices = self.batches[len(self.meter.marks)]
            if not self.meter.mark(float(logs["loss"]), indices, self.samples.tokens(indices)):
                control.should_training_stop = True


def main() -> None:
    job = read_job()
    options, samples = job["options"], read_samples(job["data"])
    order = samples.order[: job["steps"]].ravel().tolist()
    rows = Dataset.from_dict({
        "input_ids": [samples.ids[i].tolist() for i in order], "completion_mask": [samples.targets[i].astype(int).tolist() for i in order],
    })  # fmt: skip
    packing = options.get("packing", False)
    per_step = job["batch"]
    settings = {
        "output_dir": job["folder"], "use_cpu": True, "bf16": False, "completion_only_loss": True, "max_length": job["max_length"],
        "packing": packing, "learning_rate": job["learning_rate"], "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "num_train_epochs": 1, "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "per_device_train_batch_size": per_step, "torch_compile": options.get("compile", False),
    }  # fmt: skip
    if not options.get("checkpoint", True):
        settings["gradient_checkpointing"] = False
    meter, batches = Meter(job), []
    model = load(job | {"method": "full", "options": {}})
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**settings), train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[Steps(meter, batches, samples)],
    )  # fmt: skip
    if packing:  # the same samples in fewer rows: as many rows a step as hold a step's share of them
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = max(1, round(len(trainer.train_dataset) / job["steps"]))
        per_step = trainer.args.per_device_train_batch_size
    batches += held(trainer.train_dataset, samples, order, per_step)
    trainer.train()
    names = ("trl", "torch", "transformers")
    meter.write(versions={name: version(name) for name in names}, threads=torch.get_num_threads(), rows_per_step=per_step)


def held(rows: Dataset, samples: Samples, order: list, per_step: int) -> list:
    """Which samples each step trains on: those whose tokens its rows hold, one after the other."""
    known = {}
    for i in order:
        known.setdefault(tuple(samples.ids[i].tolist()), []).append(i)
    found = []
    for row in rows:
        lengths, at, own = row.get("seq_lengths") or [len(row["input_ids"])], 0, []
        for length in lengths:
            own.append(known[tuple(row["input_ids"][at : at + length])].pop())
            at += length
        found.append(own)
    return [sum(found[at : at + per_step], []) for at in range(0, len(found), per_step)]


if __name__ == "__main__":
    main()
