"""EU scores from hidden states and a head: pure functions that know no model and do no I/O."""

from qtjax.scoring.factors import LOSSES
from qtjax.scoring.head import token_scores
from qtjax.scoring.loss import head_loss, head_loss_and_nll
from qtjax.scoring.plane import EUScores, sample_scores, target_mask

__all__ = ["LOSSES", "EUScores", "head_loss", "head_loss_and_nll", "sample_scores", "target_mask", "token_scores"]
