"""What a run writes down, as file formats: metrics (JSONL), TensorBoard events, EU records (Parquet). No jax, no model."""
