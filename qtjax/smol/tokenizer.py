"""smol's tokenizer: `python -m qtjax.smol.tokenizer --corpus corpus.jsonl [--out FOLDER]`.

Byte-level BPE (every text round-trips), digits split singly, trained on the pretraining corpus and on instruction
rows. Special tokens and chat template follow ChatML as SmolLM2 does: <|im_start|> also begins a plain document (BOS),
<|im_end|> ends a turn and a document (EOS); padding has a token of its own, so that it is never taken for an end.
Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads without remote code.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qtjax.errors import QtjaxError, door
from qtjax.smol import model_folder
from qtjax.smol.instruct import load_rows

VOCABULARY = 2048
BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": PAD,
    "model_max_length": 512,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


def train(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE of exactly `vocabulary` tokens where the texts have enough different words for it.

    Raises: QtjaxError if `vocabulary` cannot hold the 256 bytes and the special tokens.
    """
    if vocabulary < 256 + 3:
        raise QtjaxError(f"--vocabulary {vocabulary}: must be at least 259 (256 bytes and 3 special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def training_texts(corpus: str) -> Iterator[str]:
    """The documents of a corpus.jsonl, then the turns of the train split. Raises QtjaxError for a file it cannot read."""
    if not Path(corpus).is_file():
        raise QtjaxError(f"--corpus {corpus}: no such file; make it with python -m qtjax.smol.corpus")
    with open(corpus, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise QtjaxError(f'{corpus}, line {number}: must be {{"text": ...}}') from None
    for row in load_rows("train"):
        yield from (f"{turn['role']}\n{turn['content']}" for turn in row["messages"])


def save(tokenizer: Tokenizer, folder: str) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`, which is made if missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(folder, "tokenizer.json")))
    Path(folder, "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qtjax.smol.tokenizer", description="Trains smol's tokenizer.")
    parser.add_argument("--corpus", required=True, help="corpus.jsonl, from python -m qtjax.smol.corpus")
    parser.add_argument("--out", default=model_folder(), help="folder to write to (default: the shipped model's)")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="tokens (default: %(default)s)")
    args = parser.parse_args(argv)
    tokenizer = train(training_texts(args.corpus), args.vocabulary)
    save(tokenizer, args.out)
    print(f"{args.out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    door(main)
