"""The table of scoring batch sizes: a batch that holds everything decides as all do, a smaller one keeps its own share."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmarks import batch_sizes

from qtjax.errors import QtjaxError
from qtjax.pruning import select_samples

RNG = np.random.default_rng(0)
PERPLEXITY, ENTROPY = (np.exp(RNG.normal(size=200)).astype(np.float32) for _ in range(2))


def test_a_batch_of_everything_keeps_what_all_keep():
    """Shuffling first changes nothing where no two scores are equal."""
    whole = np.asarray(select_samples(PERPLEXITY, ENTROPY, 0.25).keep)
    np.testing.assert_array_equal(batch_sizes.kept_in_batches(PERPLEXITY, ENTROPY, 0.25, 200, 3), whole)


def test_every_batch_keeps_its_budget_and_the_smaller_last_one_its_own():
    """200 samples in batches of 64: 3 x floor(16) + floor(0.25 x 8)."""
    kept = batch_sizes.kept_in_batches(PERPLEXITY, ENTROPY, 0.25, 64, 3)
    order = np.random.default_rng(3).permutation(200)
    assert [kept[order[at : at + 64]].sum() for at in range(0, 200, 64)] == [16, 16, 16, 2]
    last = order[192:]
    np.testing.assert_array_equal(kept[last], np.asarray(select_samples(PERPLEXITY[last], ENTROPY[last], 0.25).keep))


def test_the_table_and_its_errors(tmp_path, capsys):
    """100 % at the size of everything; a missing file and a size of 0 are one line each."""
    file = tmp_path / "eu.parquet"
    pq.write_table(pa.table({"perplexity": PERPLEXITY, "entropy": ENTROPY}), file)
    batch_sizes.main(["--scores", str(file), "--sizes", "200,50", "--seeds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "| 200 | 25.0 | 100.0 ± 0.0 |" and 24 < float(lines[-1].split("|")[3].split()[0]) < 100
    assert lines[-1].startswith("| 50 | 24.0 |")  # 12 of each 50
    with pytest.raises(QtjaxError, match="--scores .*no such file"):
        batch_sizes.main([])
    pq.write_table(pa.table({"perplexity": PERPLEXITY}), tmp_path / "half.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    for name in ("half", "text"):
        with pytest.raises(QtjaxError, match=f"{name}.parquet: is not a table of scores"):
            batch_sizes.main(["--scores", str(tmp_path / f"{name}.parquet")])
    with pytest.raises(QtjaxError, match="--sizes 0"):
        batch_sizes.main(["--scores", str(file), "--sizes", "0"])
