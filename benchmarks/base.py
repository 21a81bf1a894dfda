"""Everything the larger base model of docs/results.md is made of: its tokenizer, its random start, its text, its rows.

    python -m benchmarks.base --shared ../shared --out runs/base
    python -m qtjax.train --config configs/pretrain_base.py           # writes runs/pretrain_base/model
    python -m benchmarks.table --config configs/base.py --out runs/base_table ...

Writes into --out: init (a LLaMA of 2.4 million parameters with random weights and a byte-level BPE of 4,096 tokens), text.jsonl
(novels, encyclopedia, P3 and chain-of-thought rows as plain text, shuffled), train.jsonl and test.jsonl (a mixture of P3,
chain of thought, GSM8K, ARC-Easy, OpenBookQA and CommonsenseQA as prompt, completion, task), and a file of multiple-choice
questions for each of the last three. Test rows come from the sources' own test files; of P3 and chain of thought, which have
none, a tenth of the prompts is kept apart. Whatever repeats a tested prompt, or shares eight words in a row with a tested
multiple-choice question (ECQA holds CommonsenseQA's), is left out of text and training rows; a P3 or chain-of-thought test row
that shares twenty words in a row with either (P3 asks one question in several forms) is left out of the test. The same files and
seed give the same bytes.
"""

import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qtjax import models
from qtjax.atomic import write_atomic
from qtjax.checkpoints import save_pretrained
from qtjax.errors import QtjaxError, door
from qtjax.evals import read_question
from qtjax.flags import parse_flags
from qtjax.smol.corpus import documents, read_books
from qtjax.smol.tokenizer import save, train

VOCABULARY = 4096
RUN = 8  # words in a row that make a text repeat a question
PASSAGE = 20  # words in a row that make two rows hold the same passage
LONGEST = 800  # characters of a document or a row, about 220 tokens
KEPT = ("prompt", "completion", "task")
CHOICE = ("arc_easy", "openbookqa", "commonsenseqa")
Row = dict[str, Any]


def shape() -> models.ModelConfig:
    """2.4 million parameters, of which 0.8 million are the (tied) embedding."""
    return models.ModelConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
        head_dim=32, tie_word_embeddings=True, max_position_embeddings=512, bos_token_id=0, eos_token_id=(1,),
    )  # fmt: skip


def json_lines(path: Path) -> Iterator[Row]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def p3(sft: Path) -> Iterator[Row]:
    for row in json_lines(sft / "t0_p3_50k.jsonl.gz"):
        yield {"prompt": row["prompt"].strip(), "completion": row["completion"].strip(), "task": "p3"}


def chain_of_thought(sft: Path) -> Iterator[Row]:
    """Rationale, then the answer: "... So the answer is X."."""
    for file in sorted(sft.glob("flan_cot_*_train.tsv")):
        with open(file, encoding="utf-8", newline="") as lines:
            for fields in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
                if len(fields) == 3:
                    question, answer, why = (field.replace("\\n", "\n").strip() for field in fields)
                    said = f"the answer is {answer}"  # what a generation must hold to be right
                    yield {"prompt": question, "completion": f"{why} So {said}.", "answer": said, "task": "cot"}


def gsm8k(file: Path) -> Iterator[Row]:
    for row in json_lines(file):
        yield {"prompt": row["question"], "completion": re.sub(r"<<.*?>>", "", row["answer"]), "task": "gsm8k"}


def choices(file: Path, task: str) -> Iterator[Row]:
    """prompt, choices, answer (index), and the right choice's text as completion."""
    rows = json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else json_lines(file)
    for i, row in enumerate(rows):
        asked = read_question(row, "chat", f"{file.name} row {i}")
        yield {
            "question": asked.prompt, "choices": list(asked.choices), "answer": asked.answer, "prompt": asked.prompt,
            "completion": asked.choices[asked.answer], "task": task,
        }  # fmt: skip


def fits(row: Row) -> bool:
    return len(row["prompt"]) + len(row["completion"]) <= LONGEST and row["prompt"] != "" and row["completion"] != ""


def words(text: str) -> tuple[str, ...]:
    """Lower case, letters and digits only."""
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


def apart(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(nine tenths, a tenth) of the prompts, all rows of a prompt on the same side."""
    held = [zlib.crc32(" ".join(words(row["prompt"])).encode()) % 10 == 0 for row in rows]
    return [row for row, h in zip(rows, held) if not h], [row for row, h in zip(rows, held) if h]


class Tested:
    """What may not be shown: prompts of the test rows, and questions of the choice files, also inside other texts."""

    def __init__(self, prompts: Sequence[str], questions: Sequence[str]):
        self.prompts = {words(prompt) for prompt in prompts}
        self.runs: dict[int, set[tuple[str, ...]]] = {}
        for question in map(words, questions):
            length = min(RUN, len(question))
            self.runs.setdefault(length, set()).update(question[i : i + length] for i in range(len(question) - length + 1))

    def shown_by(self, prompt: str) -> bool:
        found = words(prompt)
        if found in self.prompts:
            return True
        # A question of fewer than eight words counts where it stands from the beginning, as in "Who is it? Options: ...".
        return any(
            found[i : i + length] in known for length, known in self.runs.items() for i in range(len(found) - length + 1 if length == RUN else 1)
        )


def without_passages(test_rows: Sequence[Row], shown: Iterable[str]) -> list[Row]:
    """Without the P3 and chain-of-thought rows that have PASSAGE words in a row in common with what is shown."""

    def runs(text: str) -> Iterator[tuple[str, ...]]:
        found = words(text)
        return (found[i : i + PASSAGE] for i in range(len(found) - PASSAGE + 1))

    owners: dict[tuple[str, ...], set[int]] = {}
    for i, row in enumerate(test_rows):
        if row["task"] in ("p3", "cot"):
            for run in runs(f"{row['prompt']}\n{row['completion']}"):
                owners.setdefault(run, set()).add(i)
    repeated = set().union(*(owners[run] for text in shown for run in runs(text) if run in owners))
    return [row for i, row in enumerate(test_rows) if i not in repeated]


def drawn(rng: np.random.Generator, rows: Sequence[Row], count: int) -> list[Row]:
    if len(rows) < count:
        raise QtjaxError(f"only {len(rows)} rows of {rows[0]['task'] if rows else 'a task'} fit {LONGEST} characters, {count} are asked for")
    return [rows[i] for i in rng.choice(len(rows), count, replace=False)]


def write_lines(file: Path, rows: Sequence[Row]) -> None:
    write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def prepare(shared: Path, out: Path, seed: int, rows: int, characters: int) -> dict[str, int]:
    """Writes all files; returns how many rows each has."""
    sft, texts, evals = shared / "data/sft", shared / "data/text", shared / "data/eval"
    rng = np.random.default_rng(seed)
    sources = {
        "p3": apart([row for row in p3(sft) if fits(row)]),
        "cot": apart([row for row in chain_of_thought(sft) if fits(row)]),
        "gsm8k": tuple([row for row in gsm8k(sft / f"gsm8k_{part}.jsonl") if fits(row)] for part in ("train", "test")),
        "arc_easy": tuple(list(choices(sft / f"llmadapters_ARC-Easy_{part}.json", "arc_easy")) for part in ("train", "test")),
        "openbookqa": tuple(list(choices(sft / f"llmadapters_openbookqa_{part}.json", "openbookqa")) for part in ("train", "test")),
        "commonsenseqa": tuple(list(choices(evals / f"commonsenseqa_{part}.jsonl", "commonsenseqa")) for part in ("train", "dev")),
    }
    shares = {"p3": 0.35, "cot": 0.15, "gsm8k": 0.1, "arc_easy": 0.15, "openbookqa": 0.125, "commonsenseqa": 0.125}
    test_rows = [row for task, (_, held) in sources.items() for row in drawn(rng, held, round(shares[task] * 400))]
    tested = Tested([row["prompt"] for row in test_rows], [row["question"] for task in CHOICE for row in sources[task][1]])
    free = {task: [row for row in learnt if not tested.shown_by(row["prompt"])] for task, (learnt, _) in sources.items()}
    train_rows = [row for task, learnt in free.items() for row in drawn(rng, learnt, round(shares[task] * rows))]
    test_rows = [{name: row[name] for name in (*KEPT, "answer") if name in KEPT or row["task"] == "cot"} for row in test_rows]
    train_rows = [{name: row[name] for name in KEPT} for row in train_rows]
    for part in (train_rows, test_rows):
        rng.shuffle(part)
    taught = {row["prompt"] for row in train_rows}
    text = [{"text": d} for d in documents_of(texts)]
    text += [{"text": f"{row['prompt']}\n{row['completion']}"} for task in ("p3", "cot") for row in free[task] if row["prompt"] not in taught]
    rng.shuffle(text)
    total = np.cumsum([len(row["text"]) for row in text])
    text = text[: int(np.searchsorted(total, characters)) + 1]
    shown = itertools.chain((row["text"] for row in text), (f"{row['prompt']}\n{row['completion']}" for row in train_rows))
    files = {"text": text, "train": train_rows, "test": without_passages(test_rows, shown)}
    files |= {task: [{n: row[n] for n in ("question", "choices", "answer")} for row in sources[task][1]] for task in CHOICE}
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        write_lines(out / f"{name}.jsonl", lines)
    tokenizer = train((row["text"] for row in text[:30000]), VOCABULARY)
    save(tokenizer, str(out / "tokenizer"))
    save_pretrained(out / "init", shape(), models.init_params(shape(), jax.random.key(seed)), tokenizer_from=str(out / "tokenizer"))
    return {name: len(lines) for name, lines in files.items()}


def documents_of(texts: Path) -> Iterator[str]:
    """Novels up to 1925, and Wikitext's validation part; its test part is left for evaluation."""
    for name in ("english_novels.jsonl.gz", "classic_books_subset.jsonl.gz"):
        for book in read_books(str(texts / name), 1925):
            yield from documents(book, LONGEST)
    yield from documents((texts / "wikitext2_valid.txt").read_text(encoding="utf-8").replace(" @-@ ", "-").replace(" @,@ ", ","), LONGEST)


def main(argv: Sequence[str] | None = None) -> None:
    own = parse_flags(
        "python -m benchmarks.base", __doc__.splitlines()[0], argv,
        {
            "shared": ("../shared", "folder that holds data/sft, data/text and data/eval"), "out": ("runs/base", "folder to write to"),
            "rows": (2000, "rows of train.jsonl"), "characters": (40_000_000, "characters of text.jsonl at most"), "seed": (0, "of every draw"),
        },
    )  # fmt: skip
    shared = Path(own["shared"])
    if not (shared / "data/sft").is_dir():
        raise QtjaxError(f"--shared {shared}: holds no data/sft; name the folder of the reference data")
    counts = prepare(shared, Path(own["out"]), own["seed"], own["rows"], own["characters"])
    print(f"{own['out']}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))


if __name__ == "__main__":
    door(main)
