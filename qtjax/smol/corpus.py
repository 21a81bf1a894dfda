"""The text that smol is pretrained on: `python -m qtjax.smol.corpus --books FILE [FILE...] --out corpus.jsonl`.

A share of public-domain books, cut into documents, and a share of our own lessons (qtjax.smol.lessons), shuffled.
The same files, size, share and seed give the same bytes.
"""

import argparse
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from qtjax.errors import QtjaxError, door
from qtjax.smol.draw import Draw
from qtjax.smol.lessons import lesson, small_chorus

CHARACTERS_PER_TOKEN = {"books": 3.0, "lessons": 3.0, "primer": 2.0}  # measured with smol's tokenizer, rounded down
DOCUMENT_CHARACTERS = 600  # about 200 tokens, so that a document fits 256
BOOKS_PERCENT = 25
LAST_YEAR = 1900  # published so long ago that the authors' terms of life + 70 years have ended nearly everywhere


def year_of(title: str, text: str) -> int | None:
    """A book's year of publication: "## Year: 1864" in its head, or the last four-digit number of its title."""
    found = re.findall(r"Year: (\d{4})", text[:500]) or re.findall(r"(?<!\d)(\d{4})(?!\d)", title)
    return int(found[-1]) if found else None


def read_books(path: str, last_year: int = LAST_YEAR) -> Iterator[str]:
    """The texts of a .jsonl or .jsonl.gz file with columns "text" and, perhaps, "title", up to `last_year`; a book
    whose year is unknown is left out. Raises QtjaxError for a missing file or a malformed line."""
    if not Path(path).is_file():
        raise QtjaxError(f"--books {path}: no such file")
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                title, text = row.get("title", ""), row["text"]
            except (ValueError, KeyError, AttributeError):
                raise QtjaxError(f"{path}, line {number}: must be a JSON object with a text column") from None
            year = year_of(title, text)
            if year is not None and year <= last_year:
                yield text


def documents(book: str, size: int = DOCUMENT_CHARACTERS) -> list[str]:
    """A book cut at sentence ends into documents of at most `size` characters; headings, tables and pieces under a
    quarter of that are left out, curly quotes made straight, white space single."""
    plain = book.translate(str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "-", "–": "-", "_": None, "*": None}))
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n|\n(?=[A-Z\"'])", plain)]
    paragraphs = [p for p in paragraphs if re.search(r"[a-z][.!?][\"']?$", p) and not p.startswith("#")]
    out, text = [], ""
    for sentence in (s for p in paragraphs for s in re.split(r"(?<=[a-z][.!?]) (?=[A-Z\"'])", p)):
        if len(text) + 1 + len(sentence) > size:
            out.append(text)
            text = ""
        text = f"{text} {sentence}" if text else sentence
    return [text for text in [*out, text] if size // 4 <= len(text) <= size]


def build(books: Sequence[str], tokens: int, seed: int, books_percent: int = BOOKS_PERCENT, last_year: int = LAST_YEAR) -> list[str]:
    """About `tokens` tokens of documents, books and lessons by share, shuffled. Without `books`: lessons alone.

    Raises: QtjaxError for impossible numbers or if the books do not suffice for their share.
    """
    if tokens <= 0 or seed < 0 or not 0 <= books_percent <= 100:
        raise QtjaxError(f"--tokens {tokens} must be above 0, --seed {seed} 0 or more, --books-percent {books_percent} 0 to 100")
    draw = Draw(seed, stream=2)
    share = books_percent / 100 if books else 0.0
    out: list[str] = []
    pool = [d for path in books for book in read_books(path, last_year) for d in documents(book)] if share else []
    draw.shuffle(pool)
    budget = tokens * share * CHARACTERS_PER_TOKEN["books"]
    while budget > 0:
        if not pool:
            raise QtjaxError(f"--books: too little text up to {last_year} for --tokens {tokens}; give more files or lower --books-percent")
        out.append(pool.pop())
        budget -= len(out[-1])
    budget = tokens * (1 - share) * CHARACTERS_PER_TOKEN["lessons"]
    while budget > 0:
        out.append(lesson(draw))
        budget -= len(out[-1])
    draw.shuffle(out)
    return out


def primer(tokens: int, seed: int) -> list[str]:
    """About `tokens` tokens of the plainest copying: short lines of 10 to 12 symbols, sung again and again.

    Attention to what followed the same symbol before forms on these within some hundred steps, and much later on
    text; a model that starts from it learns the lessons faster.
    """
    draw, out = Draw(seed, stream=3), []
    budget = tokens * CHARACTERS_PER_TOKEN["primer"]
    while budget > 0:
        out.append(" ".join(small_chorus(draw) for _ in range(3)))
        budget -= len(out[-1])
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qtjax.smol.corpus", description="Writes smol's pretraining text as JSONL.")
    parser.add_argument("--books", nargs="*", default=[], help="JSONL(.gz) files of books: text, title with the year")
    parser.add_argument("--out", required=True, help='JSONL file to write, one {"text": ...} a line')
    parser.add_argument("--tokens", type=int, default=6_000_000, help="size in tokens, about (default: %(default)s)")
    parser.add_argument("--books-percent", type=int, default=BOOKS_PERCENT, help="share of books, 0 to 100 (default: %(default)s)")
    parser.add_argument("--last-year", type=int, default=LAST_YEAR, help="newest year of publication used (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="fixes the choice, the lessons and the order (default: %(default)s)")
    parser.add_argument("--primer", action="store_true", help="write copying exercises alone, for the first steps")
    args = parser.parse_args(argv)
    out = primer(args.tokens, args.seed) if args.primer else build(args.books, args.tokens, args.seed, args.books_percent, args.last_year)
    with open(args.out, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in out)
    print(f"{args.out}: {len(out)} documents, {sum(map(len, out))} characters, about {args.tokens} tokens")


if __name__ == "__main__":
    door(main)
