"""A reward model as a grader: it reads the very ids that the policy wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from llmkit.config import UserError
from llmkit.inference.scoring import score_sequences
from llmkit.model.reward_facts import read_reward_facts
from llmkit.model.weights import load_classifier
from llmkit.rollout.rewards.config import ModelReward
from llmkit.rollout.rewards.grading import Answer, Failed, Grade
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llmkit.model.heads import SequenceClassifier


class ModelGrader:
    """The score at an answer's last token, in standard deviations from the mean that is stored with the model."""

    def __init__(self, config: ModelReward, tokenizer: Tokenizer, device: torch.device):
        """Raises UserError for a folder without a trained head, or with another tokenizer or template."""
        self.config = config
        folder = resolve_model(config.path)
        _check_tokenizer(Tokenizer.load(folder), tokenizer, config.path)
        # On a CPU, half precision saves nothing and is slow.
        dtype = torch.float32 if device.type == "cpu" else None
        self.model: SequenceClassifier = load_classifier(folder, dtype, device, n_scores=1)
        self.model.requires_grad_(False)
        facts = read_reward_facts(folder)
        accuracy, least = None if facts is None else facts.reward_accuracy, config.min_accuracy
        if accuracy is not None and least is not None and accuracy < least:
            raise UserError(
                f"{config.path}: it ranks {accuracy:.0%} of its held-out pairs right, less than min_accuracy ({least:.0%}): "
                "train a better one, or set min_accuracy to null to be taught its mistakes"
            )
        self.facts = facts if config.normalise else None

    def describe(self) -> str:
        told = "scores as they are: its folder tells no mean and std" if self.config.normalise else "scores as they are"
        if self.facts is not None:
            told = f"mean {self.facts.reward_mean:.4g}, std {self.facts.reward_std:.4g}"
        return f"{self.config.path}, {told}"

    def check(self, fields: Mapping[str, Any]) -> None:
        """Any row will do."""

    def close(self) -> None:
        """There is nothing to end."""

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        """Scores all answers in batches of about one length.

        A conversation that is longer than the model can read loses its beginning: the end is what is judged.
        """
        longest = self.model.config.max_seq_len
        rows = [answer.ids[-longest:] for answer in answers]
        scores_NC = score_sequences(self.model, rows, batch_tokens=self.config.micro_tokens)
        assert scores_NC is not None
        return [self._grade(score) for score in scores_NC[:, 0].tolist()]

    def _grade(self, score: float) -> Grade:
        if score - score != 0:  # NaN and infinity
            return Failed(f"the reward model's score is {score}")
        score = score if self.facts is None else self.facts.normalised(score)
        bound = self.config.clip
        return score if bound is None else max(-bound, min(bound, score))


def _check_tokenizer(theirs: Tokenizer, ours: Tokenizer, name: str) -> None:
    if theirs.hash != ours.hash:
        raise UserError(
            f"{name}: its tokenizer is another than the policy's ({theirs.vocab_size} and {ours.vocab_size} tokens), so "
            "it cannot read what the policy writes: train a reward model from the policy's own base model"
        )
    if None not in (theirs.template, ours.template) and theirs.template_hash != ours.template_hash:
        raise UserError(
            f"{name}: its chat template is another than the policy's: set tokenizer.chat_template to the same for both"
        )
