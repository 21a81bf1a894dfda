"""Held-out loss, exact match, multiple choice: what a model can do before and after training."""

from qtjax.evals.answers import answer
from qtjax.evals.choice import MultipleChoice, multiple_choice
from qtjax.evals.choice_rows import Question, read_question
from qtjax.evals.exact_match import Answered, ExactMatch, Prompt, exact_match
from qtjax.evals.loss import HeldOutLoss, held_out_loss
from qtjax.evals.rows import Likelihood, likelihood
from qtjax.evals.suite import TASKS, HeldOut, evaluate, load_held_out, parse_tasks, stop_ids, stop_ids_of_chat

__all__ = [
    "TASKS",
    "Answered",
    "ExactMatch",
    "HeldOut",
    "HeldOutLoss",
    "Likelihood",
    "MultipleChoice",
    "Prompt",
    "Question",
    "answer",
    "evaluate",
    "exact_match",
    "held_out_loss",
    "likelihood",
    "load_held_out",
    "multiple_choice",
    "parse_tasks",
    "read_question",
    "stop_ids",
    "stop_ids_of_chat",
]
