"""Rewards as the command line names them, and what they say of a model's answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import model_validator

from llmkit.config import Config, UserError, locate, parse_yaml, validate
from llmkit.data.turns import encode_turn
from llmkit.rollout.rewards.config import LengthReward, ModelReward, RewardConfig, check_rewards
from llmkit.rollout.rewards.grading import Answer
from llmkit.stages import load_recipe
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tools.candidates import Asked

_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class RewardList(Config):
    """The rewards of a file without a stage."""

    rewards: tuple[RewardConfig, ...]
    """As in a recipe of ppo or grpo."""

    @model_validator(mode="after")
    def _named_apart(self) -> RewardList:
        check_rewards(self.rewards)
        return self


def read_rewards(texts: Sequence[str], option: str) -> tuple[RewardConfig, ...]:
    """The rewards that options name.

    Args:
        texts: each a recipe with `rewards` or a YAML file with such a list, `package.module:function`, the name of a kind
            (`exact`), or a mapping in YAML (`{kind: model, path: runs/demo/reward}`).
        option: what errors call it.
    """
    found: list[Any] = []
    for text in texts:
        if text.endswith((".yaml", ".yml")):
            found += _of_file(text, option)
        elif _FUNCTION.fullmatch(text):
            found.append({"kind": "python", "function": text})
        else:
            data, _ = parse_yaml(text, option)
            found += data if isinstance(data, list) else [data if isinstance(data, dict) else {"kind": text}]
    given = [r if isinstance(r, dict) else r.model_dump(mode="json") for r in found]
    checked: RewardList = validate(RewardList, {"rewards": given}, {(): option})
    return checked.rewards


def _of_file(path: str, option: str) -> list[Any]:
    file = locate(path)
    try:
        data, where = parse_yaml(file.read_text("utf-8"), path)
    except OSError as e:
        raise UserError(f"{option} {path}: {e.strerror}") from None
    if isinstance(data, dict) and "stage" in data:
        recipe = load_recipe(path)
        if not getattr(recipe, "rewards", ()):
            raise UserError(
                f"{option} {path}: a recipe of stage {recipe.stage} has no rewards: name one of ppo or grpo"
            )
        return list(recipe.rewards)
    listed: RewardList = validate(RewardList, data if isinstance(data, dict) else {"rewards": data}, where)
    return list(listed.rewards)


def answer_of(row: Asked, text: str, prompt_ids: list[int], ids: list[int], finished: bool) -> Answer:
    """An answer as rewards take it; the ids are empty where only texts are known."""
    asked = row.prompt if isinstance(row.prompt, list) else [{"role": "user", "content": row.prompt}]
    return Answer(
        prompt=row.prompt,
        text=text,
        ids=[*prompt_ids, *ids],
        n_prompt=len(prompt_ids),
        finished=finished,
        fields=row.fields,
        messages=[*asked, {"role": "assistant", "content": text}],
    )


def whole_answer(row: Asked, text: str, tokenizer: Tokenizer, chat: bool) -> Answer:
    """An answer of which only the text is known."""
    before, after = encode_turn(tokenizer, row.prompt, text, row.tools, chat)
    return answer_of(row, text, before, after, True)


def tokenizer_for(configs: Sequence[RewardConfig]) -> Tokenizer:
    """What encodes answers that come from a file: the reward model's tokenizer; without one, bytes, which nobody reads."""
    for config in configs:
        if isinstance(config, LengthReward) and config.unit == "tokens":
            raise UserError(
                f"{config.label}: answers of a file are nobody's tokens: set `unit: characters` in the length reward"
            )
    models = [config.path for config in configs if isinstance(config, ModelReward)]
    return Tokenizer.load(resolve_model(models[0])) if models else Tokenizer.train([], TokenizerConfig(kind="byte"))
