"""The embedded default: the `smol` model (its folder) and `smol-instruct` (its data), both made by qtjax itself."""

from pathlib import Path

from qtjax.smol.instruct import check, load_rows

__all__ = ["check", "load_rows", "model_folder"]


def model_folder() -> str:
    """The folder of the shipped model: config, tokenizer, weights; `load_pretrained("smol")` reads it."""
    return str(Path(__file__).parent / "model")
