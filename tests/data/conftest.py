"""A small tokenizer with chat markers, trained here, and five real chat templates as their models write them."""

import pytest

# From the templates' published forms (line breaks and indentation removed, as they are used).
_ALTERNATE = (
    "{% if messages[0]['role'] == 'system' %}{% set offset = 1 %}{% else %}{% set offset = 0 %}{% endif %}"
    "BOS{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == offset) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}TURN{% endfor %}"
    "{% if add_generation_prompt %}PROMPT{% endif %}"
)


def _alternating(bos: str, turn: str, prompt: str) -> str:
    return _ALTERNATE.replace("BOS", bos).replace("TURN", turn).replace("PROMPT", prompt)


TEMPLATES = {
    "chatml": _alternating(
        "{{ bos_token }}",
        r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}",
        r"{{ '<|im_start|>assistant\n' }}",
    ),
    "llama-3": _alternating(
        "{{ bos_token }}",
        r"{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}",
        r"{{ '<|start_header_id|>' + 'assistant' + '<|end_header_id|>\n\n' }}",
    ),
    "zephyr": _alternating(
        "", r"{{ '<|' + message['role'] + '|>\n' + message['content'] | trim + eos_token + '\n' }}", r"{{ '<|assistant|>\n' }}"
    ),
    "llama-2-chat": (
        r"{% if messages[0]['role'] == 'system' %}{% set system_message = '<<SYS>>\n' + messages[0]['content'] | trim + '\n<</SYS>>\n\n' %}"
        r"{% set messages = messages[1:] %}{% else %}{% set system_message = '' %}{% endif %}{% for message in messages %}"
        r"{% if loop.index0 == 0 %}{% set content = system_message + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
        r"{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
        r"{% elif message['role'] == 'assistant' %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral": (
        r"{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        r"{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
        r"{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    ),
}

_SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE of about 330 tokens; every text round-trips, chat markers are single tokens, no template of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=_SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(["hello there how are you today the answer is four fine thanks user assistant system"] * 4, trainer)
    # Like LLaMA's: asked for special tokens it adds BOS, so that a second one would show.
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    return TEMPLATES


@pytest.fixture
def template_file(tmp_path):
    """Writes a template to a file, for data.chat_template."""

    def write(text: str) -> str:
        path = tmp_path / "template.jinja"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write
