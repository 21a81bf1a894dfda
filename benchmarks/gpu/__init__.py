"""Training, scoring and Q-Tuning on one GPU beside transformers and peft: `python -m benchmarks.gpu` (__main__.py says how)."""
