"""Q-Tuning of a model that configs/pretrain_base.py made, on a mixture of P3, chain of thought, GSM8K and multiple choice.

Source    the paper's rule, arXiv 2509.23873 (v2), 25 % of the samples x 50 % of a Q2 sample's tokens, mask mode.
Model     2.4 million parameters, full-parameter training.
Data      2,000 rows of six tasks, some 300 held out: python -m benchmarks.base --out runs/base
Cost      126 steps of 32 scored samples; some minutes on two CPU cores.
Expected  held-out loss falls, accuracy stays near chance for a model of this size; docs/results.md has the numbers.
Command   python -m qtjax.train --config configs/base.py
"""

from qtjax.config import Config, DataSection, EvalSection, ModelSection, PruneSection, RunSection, TrainSection


def get_config() -> Config:
    return Config(
        model=ModelSection(path="runs/pretrain_base/model"),
        data=DataSection(path="runs/base/train.jsonl", eval_path="runs/base/test.jsonl", max_length=256),
        prune=PruneSection(sample_keep=0.25, token_keep=0.5, batch_size=32, mode="mask"),
        train=TrainSection(epochs=2.0, learning_rate=1e-3, warmup_fraction=0.03, row_length=256, rows=8, checkpoint_every=64),
        eval=EvalSection(max_samples=400, generate_samples=200, max_new_tokens=128, batch_size=64),
        run=RunSection(folder="runs/base_sft"),
    )
