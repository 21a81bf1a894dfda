"""Q-Tuning of the embedded model on the embedded data, offline, on a laptop's CPU.

Source    the paper's rule, arXiv 2509.23873 (v2), 25 % of the samples x 50 % of a Q2 sample's tokens, mask mode.
Model     smol: 1.05 million parameters, pretrained by configs/pretrain_smol.py; full-parameter training.
Data      smol-instruct: 2,048 rows (55 % clean, 15 % mislabelled, 20 % redundant, 10 % padded), 37 tokens each of
          which 15 are trained; 512 clean rows held out that ask for facts, lists and sums not shown in training.
Cost      256 steps of 64 scored samples, 616,000 tokens scored and a quarter of the rows trained on; little more than a
          minute on two CPU cores, compilation included.
Expected  exact match 0 % before (the base model has never seen a chat turn), about a third after; held-out loss from
          4.7 to about 0.6 nats.
Command   python -m qtjax.train --config configs/smol.py
"""

from qtjax.config import Config, DataSection, EvalSection, ModelSection, PruneSection, RunSection, TrainSection


def get_config() -> Config:
    return Config(
        model=ModelSection(path="smol"),
        data=DataSection(path="smol-instruct", split="train", eval_path="smol-instruct", eval_split="test", max_length=128),
        prune=PruneSection(sample_keep=0.25, token_keep=0.5, batch_size=64, mode="mask"),
        train=TrainSection(
            epochs=8.0,
            learning_rate=2e-3,  # a small model wants a large rate
            warmup_fraction=0.03,
            rows=8,  # of 128 slots; 16 survivors of 37 tokens fill 4.6
            checkpoint_every=64,
            compare_full_data=8,
        ),
        eval=EvalSection(max_samples=512, generate_samples=256, max_new_tokens=32, batch_size=64),
        run=RunSection(folder="runs/smol"),
    )
