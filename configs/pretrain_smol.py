"""The pretraining run that made the embedded model `smol` (its card: qtjax/smol/MODEL_CARD.md).

Source    our own; the shape is SmolLM2's (grouped-query attention, tied embeddings), scaled down to 1.05 million
          parameters: hidden 128, 4 layers, 4 heads over 2 key/value heads, vocabulary 2,048.
Data      corpus.jsonl, 25 % novels published up to 1900 and 75 % lessons that qtjax generates. Make it, and the
          tokenizer from it, first (the second command rewrites qtjax/smol/model/tokenizer.json with the same bytes):
            python -m qtjax.smol.corpus --books english_novels.jsonl.gz --out corpus.jsonl --tokens 8000000 --seed 0
            python -m qtjax.smol.tokenizer --corpus corpus.jsonl
Cost      6.3 million FLOPs a token; the card says what it took.
Expected  loss from 7.6 = ln 2048 at the start; the lessons end far lower than the novels.
Command   two runs: copying exercises first, on which attention to the context forms within 600 steps (their loss falls
          from 2.5 at step 120 to 0.8), then the corpus from where that ended:
            python -m qtjax.smol.corpus --primer --out primer.jsonl --tokens 1000000 --seed 0
            python -m qtjax.train --config configs/pretrain_smol.py --model.random-init true --data.path primer.jsonl \
              --train.max-steps 600 --train.final-lr-fraction 1 --run.folder runs/primer_smol
            python -m qtjax.train --config configs/pretrain_smol.py --model.path runs/primer_smol/model
"""

from qtjax.config import Config, DataSection, EvalSection, ModelSection, PruneSection, RunSection, TrainSection


def get_config() -> Config:
    return Config(
        model=ModelSection(path="smol", unroll_layers=True),
        data=DataSection(path="corpus.jsonl", format="text", chat_template="none", eval_fraction=0.01, max_length=256),
        prune=PruneSection(sample_pruner="none", token_pruner="none", batch_size=16),
        train=TrainSection(
            epochs=1.0,
            max_steps=2600,
            learning_rate=2e-3,
            warmup_fraction=0.04,
            final_lr_fraction=0.05,
            weight_decay=0.1,
            b2=0.98,  # few steps: the second moment has to follow quickly
            row_length=256,
            rows=8,
            checkpoint_every=250,
        ),
        eval=EvalSection(max_samples=256),
        run=RunSection(folder="runs/pretrain_smol"),
    )
