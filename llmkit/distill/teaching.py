"""The teacher: a frozen model that is only asked, whole on every rank or spread over them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmkit.config import UserError
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, document_mask
from llmkit.model.hf import read_config
from llmkit.stages.recipes import DistillRecipe
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training.dist import Ranks
from llmkit.training.setup import frozen_model


def precision_of(recipe: DistillRecipe) -> str:
    """What the teacher is computed in: as the student, in bf16 where that has masters in fp32."""
    mixed = recipe.precision in ("bf16", "fp16")
    return recipe.teacher_precision or ("bf16" if mixed else recipe.precision)


def teacher_config(recipe: DistillRecipe) -> GPTConfig:
    """The teacher's shape. Raises UserError for a model that can't say what comes next."""
    config = read_config(resolve_model(recipe.teacher))
    if not config.causal:
        raise UserError(f"teacher ({recipe.teacher}): a model with causal: false can't say which token comes next")
    return config


def teacher_tokenizer(recipe: DistillRecipe) -> Tokenizer:
    """The teacher's own."""
    return Tokenizer.load(resolve_model(recipe.teacher))


def check_length(recipe: DistillRecipe, config: GPTConfig, row_len: int) -> None:
    """Raises UserError if the teacher has not learnt rows as long as the student's."""
    if row_len > config.max_seq_len:
        raise UserError(
            f"teacher ({recipe.teacher}): its context is {config.max_seq_len} tokens, the rows have {row_len}: set "
            f"batch.max_len={config.max_seq_len}"
        )


def load_teacher(recipe: DistillRecipe, ranks: Ranks) -> GPT:
    """The teacher, frozen, on this rank's device; with `shard_teacher` a share of each of its layers."""
    model = frozen_model(recipe.teacher, ranks.device, precision_of(recipe))
    if recipe.shard_teacher and ranks.world > 1:
        ranks.shard(model.model.layers)
    return model


def teacher_folder(recipe: DistillRecipe) -> Path:
    """Where its files are."""
    return resolve_model(recipe.teacher)


def attention_mask(docs_BT: Tensor, one_document: bool) -> Tensor | None:
    """What `GPT.forward` must be told of a batch's documents; None where causal attention alone keeps them apart."""
    return None if one_document else document_mask(docs_BT)


@torch.no_grad()
def states(teacher: GPT, ids_BT: Tensor, positions_BT: Tensor, mask: Tensor | None) -> Tensor:
    """The teacher's states after its final norm [B, T, D]."""
    # Not teacher(...): only its layers are spread over the ranks, and they are called as modules.
    return teacher.forward(ids_BT, positions_BT, mask)
