"""A model of ours as lm-eval's `TemplateLM`, so that its tasks can be asked of it (EleutherAI/lm-evaluation-harness).

Numbers equal those of lm-eval's own backend for transformers: no bos unless the tokenizer's file adds one, control tokens in a
text count as such, the softmax is over all rows of the embedding, and what is too long loses its beginning.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit.config import UserError
from llmkit.evaluation.asking import continuation_logprobs, continuations
from llmkit.inference.batch import check_model
from llmkit.inference.config import SamplingConfig
from llmkit.model.gpt import GPT
from llmkit.tokenizer import Tokenizer

_MAX_NEW = 256  # of an answer whose task says nothing


def library() -> Any:
    """The module lm_eval. Raises UserError where it is not installed."""
    try:
        import lm_eval
    except ImportError:
        raise UserError("lm-eval is not installed: pip install 'llmkit[eval]', or leave --harness out") from None
    return lm_eval


def adds_bos(folder: Path) -> bool:
    """Whether transformers would put a bos before every text: tokenizer.json's post-processor says so."""
    file = folder / "tokenizer.json"
    found = json.loads(file.read_bytes()).get("post_processor") if file.is_file() else None
    steps = (found or {}).get("processors", [found or {}])
    return any(
        "SpecialToken" in (step.get("single") or [{}])[0] for step in steps if step.get("type") == "TemplateProcessing"
    )


class TextEncoder:
    """Texts with control tokens written out, as lm-eval hands them over, -> ids."""

    def __init__(self, tokenizer: Tokenizer, bos: bool):
        self.tokenizer, self.bos = tokenizer, bos and tokenizer.bos_id is not None
        names = sorted(tokenizer.special, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    def __call__(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        parts = [text] if self._pattern is None else self._pattern.split(text)
        ids: list[int] = []
        for k, part in enumerate(parts):
            if k % 2:
                ids.append(self.tokenizer.special[part])
            elif part:
                ids += self.tokenizer.encode_on(part, ids)
        bos = self.tokenizer.bos_id
        if self.bos and add_special_tokens is not False and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids


def lm_eval_model(model: GPT, tokenizer: Tokenizer, folder: Path, batch_tokens: int = 8192) -> Any:
    """The model as lm-eval asks for it: an instance of its TemplateLM.

    Raises:
        UserError: lm-eval is not installed, the model is bidirectional, or the tokenizer is another model's.
    """
    library()
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    check_model(model, tokenizer.vocab_size)
    encoder, longest = TextEncoder(tokenizer, adds_bos(folder)), model.config.max_seq_len

    class Adapter(TemplateLM):  # type: ignore[misc]
        """Requests of lm-eval, answered by a GPT."""

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

        @property
        def max_length(self) -> int:
            return longest

        @property
        def tokenizer_name(self) -> str:
            return str(folder).replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return encoder(string, add_special_tokens)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            pairs = []
            for _texts, context, rest in requests:
                whole, n = [*context, *rest][-(longest + 1) :], min(len(rest), longest)
                pairs.append((whole[: len(whole) - n], whole[len(whole) - n :]))
            found = continuation_logprobs(model, pairs, None, batch_tokens=batch_tokens)
            for (texts, _context, _rest), told in zip(requests, found, strict=True):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, told)
            return found

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            rows: list[Any] = []
            counts = []
            for request in requests:
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=longest,
                    context_len=1,
                )
                own = [(None, *make_disjoint_window(window)) for window in windows]
                rows += own
                counts.append(len(own))
            values = iter(self._loglikelihood_tokens(rows))
            return [sum(next(values)[0] for _ in range(n)) for n in counts]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
            for i, request in enumerate(requests):
                alike[_settings(request.args[1], longest)].append(i)
            found: dict[int, str] = {}
            for (stop, n_new, temperature), numbers in alike.items():
                ids = [self.tok_encode(requests[i].args[0])[-(longest - n_new) :] for i in numbers]
                ids = [row or [self.prefix_token_id] for row in ids]
                sampling = SamplingConfig(temperature=temperature, max_new_tokens=n_new, stop=stop)
                written = continuations(model, tokenizer, ids, sampling, batch_tokens, lambda n: None)
                found |= {i: text.text for i, text in zip(numbers, written, strict=True)}
            return [found[i] for i in range(len(requests))]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            if add_generation_prompt:
                return tokenizer.render_chat(chat_history, add_generation_prompt=True)
            *before, last = chat_history  # the answer's beginning is given, and goes on
            return tokenizer.render_chat(before, add_generation_prompt=True) + last["content"]

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return tokenizer.chat_template if chat_template else None

    return Adapter()


def _settings(asked: dict[str, Any], longest: int) -> tuple[tuple[str, ...], int, float]:
    """Stop strings, most new tokens, temperature: what a task asks for, as far as the context allows."""
    until = asked.get("until") or []
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    n_new = min(int(asked.get("max_gen_toks") or _MAX_NEW), max(1, longest // 2))
    temperature = float(asked.get("temperature") or 0.0) if asked.get("do_sample") else 0.0
    return stop, n_new, temperature
