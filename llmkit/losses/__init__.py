"""Losses: pure functions, tensors in, sums out. One module a family; each cites its paper."""

from llmkit.losses.base import IGNORE, LossSum
from llmkit.losses.sequence import classification, regression, squared_error
from llmkit.losses.vocabulary import linear_cross_entropy

__all__ = ["IGNORE", "LossSum", "classification", "linear_cross_entropy", "regression", "squared_error"]
