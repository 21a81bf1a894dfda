"""How much the size of a scoring batch decides: the same scores ranked within batches of several sizes and within all of them.

    python -m qtjax.score --config configs/smol.py --out runs/scores
    python -m benchmarks.batch_sizes --scores runs/scores/eu.parquet --keep 0.25

Reads eu.parquet of qtjax.score, whose samples were all scored under the same weights, shuffles it into batches, chooses within
each, and compares with the choice among all samples at once. A batch keeps a whole number of samples, so that sizes of which
`keep` is no whole number keep fewer. Chance would share as much as is kept. Prints a Markdown table.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.table import shown
from qtjax.errors import QtjaxError, door
from qtjax.flags import parse_flags
from qtjax.pruning import select_samples


def kept_in_batches(perplexity: np.ndarray, entropy: np.ndarray, keep: float, size: int, seed: int) -> np.ndarray:
    """bool [N], chosen within shuffled batches of `size`; what is left over after the last whole batch is a smaller one."""
    order = np.random.default_rng(seed).permutation(len(perplexity))
    kept = np.zeros(len(perplexity), bool)
    for at in range(0, len(order), size):
        batch = order[at : at + size]
        padded = np.resize(batch, size)  # one shape, one program; what repeats is not valid
        choice = select_samples(perplexity[padded], entropy[padded], keep, valid=np.arange(size) < len(batch))
        kept[batch[np.asarray(choice.keep)[: len(batch)]]] = True
    return kept


def main(argv: Sequence[str] | None = None) -> None:
    own = parse_flags(
        "python -m benchmarks.batch_sizes",
        __doc__.splitlines()[0],
        argv,
        {
            "scores": ("", "eu.parquet of qtjax.score"),
            "keep": (0.25, "fraction (0-1] of the samples to keep"),
            "sizes": ("16,32,64,128,256", "samples per scoring batch, comma-separated"),
            "seeds": (5, "shuffles of each"),
        },
    )
    file = Path(own["scores"])
    if not file.is_file():
        raise QtjaxError(f"--scores {own['scores']!r}: no such file; write it with python -m qtjax.score --out FOLDER, as FOLDER/eu.parquet")
    try:
        sizes = [int(size) for size in own["sizes"].split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or own["seeds"] < 1:
        raise QtjaxError(f"--sizes {own['sizes']} --seeds {own['seeds']}: must be whole numbers of 1 or more")
    try:
        table = pq.read_table(file, columns=["perplexity", "entropy"])
    except pa.ArrowException as error:
        raise QtjaxError(f"--scores {file}: is not a table of scores ({str(error).splitlines()[0]}); write it with python -m qtjax.score") from None
    perplexity, entropy = (table[name].to_numpy() for name in ("perplexity", "entropy"))
    whole = np.asarray(select_samples(perplexity, entropy, own["keep"]).keep)
    text = " ".join(argv if argv is not None else sys.argv[1:])
    print(f"`python -m benchmarks.batch_sizes {text}`: {len(whole):,} samples\n")
    print("| samples per scoring batch | kept (%) | of the choice among all, kept too (%) |\n|---:|---:|---:|")
    for size in sizes:
        kept = [kept_in_batches(perplexity, entropy, own["keep"], size, seed) for seed in range(own["seeds"])]
        shared = [(each & whole).sum() / whole.sum() for each in kept]
        print(f"| {size} | {100 * np.mean(kept):.1f} | {shown(shared, '.1f', 100)} |")


if __name__ == "__main__":
    door(main)
