"""Your own model on your own rows: LoRA with the paper's settings, 5 % of the rows held out.

Source    arXiv 2509.23873: LoRA r=8, alpha=16 on all linear layers, learning rate 1e-4, cosine, 3 epochs, cutoff 2048 (here
          1024), 25 % of the samples x 50 % of a Q2 sample's tokens. Scoring batch 128.
Cost      per epoch one forward pass over all rows and a training step on about a quarter of them.
Command   python -m qtjax.train --config configs/sft.py --model.path FOLDER --data.path rows.jsonl --run.folder runs/mine
          --overlay.method none trains all parameters (then a learning rate of about 1e-5 for large models).
"""

from qtjax.config import Config, DataSection, EvalSection, ModelSection, OverlaySection, PruneSection, RunSection, TrainSection


def get_config() -> Config:
    return Config(
        model=ModelSection(path="path/to/hf-folder"),
        data=DataSection(path="path/to/rows.jsonl", eval_fraction=0.05, max_length=1024),
        prune=PruneSection(sample_keep=0.25, token_keep=0.5, batch_size=128),
        overlay=OverlaySection(method="lora"),  # r 8, lora_alpha 16, all linear modules: its defaults
        train=TrainSection(epochs=3.0, learning_rate=1e-4, warmup_fraction=0.03, rows=8, compare_full_data=2),
        eval=EvalSection(max_samples=512),
        run=RunSection(folder="runs/sft"),
    )
