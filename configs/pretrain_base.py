"""The larger base model of docs/results.md, pretrained from random weights; its weights are not shipped.

Source    our own; a LLaMA of 2.4 million parameters: hidden 192, 4 layers, 6 heads over 2 key/value heads, vocabulary 4,096.
Data      text.jsonl, novels, encyclopedia, P3 and chain-of-thought rows as plain text: python -m benchmarks.base --out runs/base
Cost      15 million FLOPs a token, 7 million tokens.
Expected  loss from 8.3 = ln 4096 at the start.
Command   python -m qtjax.train --config configs/pretrain_base.py
"""

from qtjax.config import Config, DataSection, EvalSection, ModelSection, PruneSection, RunSection, TrainSection


def get_config() -> Config:
    return Config(
        model=ModelSection(path="runs/base/init", unroll_layers=True),
        data=DataSection(path="runs/base/text.jsonl", format="text", chat_template="none", eval_fraction=0.005, max_length=256),
        prune=PruneSection(sample_pruner="none", token_pruner="none", batch_size=24),
        train=TrainSection(
            epochs=1.0,
            max_steps=1600,
            learning_rate=2e-3,
            warmup_fraction=0.04,
            final_lr_fraction=0.05,
            weight_decay=0.1,
            b2=0.98,  # few steps: the second moment has to follow quickly
            row_length=256,
            rows=8,
            checkpoint_every=100,
        ),
        eval=EvalSection(max_samples=256),
        run=RunSection(folder="runs/pretrain_base"),
    )
