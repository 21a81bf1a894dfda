"""Multiple choice ranks by the choices' own likelihood, normalised as documented."""

import numpy as np
import pytest

from qtjax.config import DataSection
from qtjax.errors import QtjaxError
from qtjax.evals import Likelihood, Question, choice, multiple_choice, read_question

ADAPTERS = {
    "instruction": "Please choose the correct answer to the question: Hot?\n\nAnswer1: cold Answer2: warm\n\nAnswer format: answer1/answer2",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}
QUESTIONS = [
    read_question({"question": "What is the opposite of hot?", "choices": ["cold", "the red sun", "blue"], "answer": 0}),
    read_question({"prompt": "A dog is an", "choices": ["animal", "number"], "answer": "B"}),
    read_question({"question": "Which is first?", "choices": ["one", "two"], "answer": "A"}, "chat"),
    read_question(ADAPTERS),
]


def test_each_choice_is_scored_given_its_prompt(model, tokenizer, token_nll):
    """Plain questions: prompt, space, choice. Trained style: the chat template's rendering, its closing token not scored."""
    config, params = model
    found = multiple_choice(config, params, tokenizer, QUESTIONS, DataSection(), row_length=160, rows=2)
    for question, scored in zip(QUESTIONS, found.nll, strict=True):
        for text, nll in zip(question.choices, scored, strict=True):
            if question.trained:
                turns = [{"role": "user", "content": question.prompt}]
                prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
                whole = prompt + text
            else:
                prompt, whole = question.prompt, f"{question.prompt} {text}"
            bos = [] if question.trained or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            ids = bos + tokenizer(whole, add_special_tokens=False)["input_ids"]
            start = len(bos) + len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            assert nll == pytest.approx(token_nll(ids)[start:].sum(), rel=2e-5)
    predicted = [int(np.argmin(nll)) for nll in found.nll]
    assert found.acc == np.mean([p == q.answer for p, q in zip(predicted, QUESTIONS)])
    assert found.chance == pytest.approx((1 / 3 + 3 / 2) / 4) and (found.count, found.cut) == (4, 0)


def test_acc_acc_norm_and_acc_token_by_hand(monkeypatch, model, tokenizer):
    """Sums, sums per character and means per token each choose another answer; ties go to the earlier choice."""
    question = Question("Q", ("abcd", "abcdefghijkl", "ab cd"), 0)
    fixed = {
        # sums 4, 8, 5; per character 1, 0.67, 1; per token 2, 4, 1
        0: Likelihood(np.array([4.0, 8.0, 5.0]), np.zeros(3), np.array([2, 2, 5])),
        1: Likelihood(np.array([3.0, 3.0, 3.0]), np.zeros(3), np.array([1, 1, 1])),
    }
    for answer, expected in ((0, (1, 0, 0)), (1, (0, 1, 0)), (2, (0, 0, 1))):
        monkeypatch.setattr(choice, "likelihood", lambda *a, **k: fixed[0])
        found = multiple_choice(*model, tokenizer, [question._replace(answer=answer)], DataSection(), row_length=64)
        assert (found.acc, found.acc_norm, found.acc_token) == expected
    monkeypatch.setattr(choice, "likelihood", lambda *a, **k: fixed[1])
    assert multiple_choice(*model, tokenizer, [question], DataSection(), row_length=64).acc == 1


def test_long_prompts_lose_their_beginning_and_are_counted(model, tokenizer, token_nll):
    """The choice is scored after the last tokens of the prompt; a choice longer than a row is an error."""
    config, params = model
    long = Question("word " * 60 + "the dog is", ("red", "blue"), 0)
    found = multiple_choice(config, params, tokenizer, [long], DataSection(), row_length=32)
    (ids, mask), _ = choice.encode(tokenizer, [long], DataSection())
    assert found.cut == 2 and found.nll[0][0] == pytest.approx(token_nll(ids[-32:])[mask[-32:]].sum(), rel=2e-5)
    with pytest.raises(QtjaxError, match="does not fit a row of 8"):
        multiple_choice(config, params, tokenizer, [Question("a", ("b", "one two three four " * 3), 0)], DataSection(), row_length=8)


def test_without_a_template_the_trained_style_is_bos_prompt_choice(tokenizer):
    """As training does: tokens(prompt) and tokens(choice) side by side, the EOS not scored."""
    data = DataSection(chat_template="none")
    ids, mask = choice.encode(tokenizer, [Question("a dog", (" is", " was"), 0, trained=True)], data)[0]
    prompt, said = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("a dog", " is"))
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert ids.tolist() == bos + prompt + said + [tokenizer.eos_token_id]
    assert np.flatnonzero(mask).tolist() == list(range(len(bos + prompt), len(bos + prompt + said)))
