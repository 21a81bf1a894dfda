"""What a run tells at its end."""

import json
from types import SimpleNamespace

import pyarrow as pa

from qtjax.config import DataSection
from qtjax.training.story import provenance


def test_provenance_is_counted_however_the_rows_say_it(tmp_path):
    """By text; rows that say nothing are unknown, and what is no text is taken as it is written."""
    origins = ["web", None, ["a", "b"], {"of": 1}, "web"]
    rows = [{"prompt": "p", "completion": "c", "provenance": origin} for origin in origins] + [{"prompt": "p", "completion": "c"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = pa.table({"row": [0, 1, 2, 3, 4, 5, 4], "keep": [True, False, True, True, False, True, True]})
    session = SimpleNamespace(
        config=SimpleNamespace(data=DataSection(path=str(file), eval_fraction=0.0)), loop=SimpleNamespace(pruners=SimpleNamespace(decides=True))
    )
    folder = SimpleNamespace(writes=True, tokens=tmp_path, flush=lambda: None, read_samples=lambda: records)
    assert provenance(session, folder) == {
        "unknown": {"seen": 2, "kept": 1}, "['a', 'b']": {"seen": 1, "kept": 1},
        "web": {"seen": 3, "kept": 2}, "{'of': 1}": {"seen": 1, "kept": 1},
    }  # fmt: skip
