"""A stand-in for vLLM 0.32: the classes, signatures and checks on arguments that rollouts use, and what it does with them.

It samples from the folder that it is told, with a forward pass over whole texts for every token. As in vLLM, a prompt's
first scores stay in a prefix cache until that is reset, weights are gone after a deep sleep, log-probabilities are raw
unless `logprobs_mode` says otherwise, and what a call does not know is refused. `faults` makes it do what must be noticed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__version__ = "0.32.0"

calls: list[str] = []
"""What was asked of the engines of this process, in order."""


@dataclass
class Faults:
    """What goes wrong. All of it does so without a word in vLLM too."""

    temperature: float = 1.0  # a factor
    bf16: bool = False  # computes with other numbers
    deaf: bool = False  # keeps its weights when it is told to reload
    keeps_cache: bool = False  # resets no prefix cache
    finish: str | None = None  # how answers end
    drops_stop: bool = False  # leaves the stop token out
    nan: bool = False


faults = Faults()


@dataclass
class SamplingParams:
    """As `vllm.sampling_params.SamplingParams`."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}.")
        if self.temperature < 0.0:
            raise ValueError(f"temperature must be non-negative, got {self.temperature}.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if not isinstance(self.top_k, int) or self.top_k < -1:
            raise ValueError(f"top_k must be 0 (disable), or at least 1, got {self.top_k}.")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError("Overflow when unpacking long")  # torch.Generator.manual_seed
        if self.logprobs is not None and self.logprobs < -1:
            raise ValueError(f"logprobs must be non-negative or -1, got {self.logprobs}.")
        if not all(isinstance(i, int) for i in self.stop_token_ids or ()):
            raise ValueError(f"stop_token_ids must contain only integers, got {self.stop_token_ids}.")
        if self.detokenize is False and self.stop:
            raise ValueError("stop strings are only supported when detokenize is True.")


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: None
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class _Request:
    prompt: list[int]
    params: SamplingParams
    draws: torch.Generator
    ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish: str | None = None


_LLM = {  # the keyword arguments of vllm.LLM
    "runner", "convert", "tokenizer", "tokenizer_mode", "skip_tokenizer_init", "trust_remote_code", "tensor_parallel_size",
    "dtype", "quantization", "revision", "tokenizer_revision", "chat_template", "seed", "gpu_memory_utilization",
    "cpu_offload_gb", "enforce_eager", "disable_custom_all_reduce", "hf_token", "hf_overrides", "kv_cache_memory_bytes",
    "compilation_config", "quantization_config", "logits_processors",
}  # fmt: skip
_ENGINE_ARGS = {  # those of EngineArgs that it hands on, some of them
    "max_model_len", "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching", "enable_sleep_mode",
    "logprobs_mode", "max_logprobs", "generation_config", "distributed_executor_backend", "load_format", "model_impl",
    "disable_log_stats",
}  # fmt: skip
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LLM:
    """As `vllm.LLM`."""

    def __init__(self, model: str, **kwargs: Any):
        for name in kwargs.keys() - _LLM - _ENGINE_ARGS:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument '{name}'")
        assert kwargs["dtype"] in _DTYPES, kwargs["dtype"]
        assert kwargs.get("distributed_executor_backend") in ("uni", "mp", "external_launcher", None)
        assert kwargs.get("logprobs_mode", "raw_logprobs") in ("raw_logprobs", "processed_logprobs")
        assert 0 < kwargs.get("gpu_memory_utilization", 0.92) <= 1
        self._told = kwargs
        self._dtype = _DTYPES[kwargs["dtype"]]
        self._tags: set[str] = set()  # asleep
        self._cache: dict[tuple[int, ...], torch.Tensor] = {}
        self._prompts: set[tuple[int, ...]] = set()
        self._path = Path(model)
        self._model: Any = None
        self._load(self._path)
        calls.append("start")

    def _load(self, folder: Path) -> None:
        from llmkit.model.weights import load_model

        self._model = load_model(folder, self._dtype)

    # --- weights and sleep -------------------------------------------------------------------------------------------

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        if method != "reload_weights":
            raise AttributeError(f"'Worker' object has no attribute '{method}'")
        return [self._reload(*args, **(kwargs or {}))]

    def _reload(
        self, weights_iterator: Any = None, weights_path: str | None = None, is_checkpoint_format: bool = True
    ) -> None:
        assert "weights" not in self._tags, "weights are written into memory that is not mapped"
        assert weights_iterator is None and is_checkpoint_format
        calls.append("reload")
        if weights_path is not None:
            self._path = Path(weights_path)
        if not faults.deaf:
            self._load(self._path)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        if not self._told.get("enable_sleep_mode"):
            raise ValueError("Sleep mode is not enabled in the model config")
        assert level == 2
        calls.append("sleep")
        self._cache, self._tags = {}, {"weights", "kv_cache"}
        self._model = None

    def wake_up(self, tags: list[str] | None = None) -> None:
        calls.append("wake " + ",".join(tags or ["all"]))
        self._tags -= set(tags or self._tags)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        calls.append("reset")
        if not faults.keeps_cache:
            self._cache = {}
        return True

    # --- answers -----------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: list[Any], sampling_params: Any = None, use_tqdm: bool = True, lora_request: Any = None
    ) -> list[RequestOutput]:
        assert not self._tags and self._model is not None, "the engine sleeps"
        if len(prompts) != len(sampling_params):
            raise ValueError("The lengths of prompts and params must be the same.")
        calls.append(f"generate {len(prompts)}")
        requests = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            if prompt.keys() - {"prompt_token_ids", "prompt", "cache_salt"}:
                raise ValueError(f"unknown prompt: {prompt}")
            ids = prompt["prompt_token_ids"]
            if not ids or len(ids) >= self._told["max_model_len"]:
                raise ValueError(f"The prompt (length {len(ids)}) does not fit {self._told['max_model_len']}")
            if max(ids) >= self._model.config.vocab_size:
                raise ValueError(f"Token id {max(ids)} is out of vocabulary")
            assert params.n == 1 and params.temperature >= 0.01 and params.seed is not None
            self._prompts.add(tuple(ids))
            requests.append(_Request(ids, params, torch.Generator().manual_seed(params.seed)))
        for start in range(0, len(requests), self._told["max_num_seqs"]):
            going = requests[start : start + self._told["max_num_seqs"]]
            while going:
                self._step(going)
                going = [r for r in going if r.finish is None]
        return [self._output(i, r) for i, r in enumerate(requests)]

    @torch.no_grad()
    def _step(self, going: list[_Request]) -> None:
        texts = [r.prompt + r.ids for r in going]
        new = [i for i, text in enumerate(texts) if tuple(text) not in self._cache]
        if new:
            ids_BT = torch.zeros(len(new), max(len(texts[i]) for i in new), dtype=torch.int64)
            for row, i in enumerate(new):
                ids_BT[row, : len(texts[i])] = torch.tensor(texts[i])
            model = self._model
            hidden_BTD = model.to(torch.bfloat16 if faults.bf16 else self._dtype)(ids_BT)
            last_B = torch.tensor([len(texts[i]) - 1 for i in new])
            logits_BV = model.logits(hidden_BTD[torch.arange(len(new)), last_B]).float()
            for row, i in enumerate(new):
                self._cache[tuple(texts[i])] = logits_BV[row]
        for r, text in zip(going, texts, strict=True):
            self._sample(r, self._cache[tuple(text)])
        self._cache = {k: v for k, v in self._cache.items() if k in self._prompts}

    def _sample(self, r: _Request, logits_V: torch.Tensor) -> None:
        p = r.params
        raw_V = logits_V.log_softmax(-1)
        logits_V = logits_V / (p.temperature * faults.temperature)
        if p.min_p:
            probs_V = logits_V.softmax(-1)
            logits_V = logits_V.masked_fill(probs_V < p.min_p * probs_V.max(), -math.inf)
        if p.top_k > 0:
            logits_V = logits_V.masked_fill(logits_V < logits_V.topk(p.top_k).values[-1], -math.inf)
        if p.top_p < 1:
            probs_V, order_V = logits_V.softmax(-1).sort(descending=True)
            cut_V = probs_V.cumsum(-1) - probs_V >= p.top_p
            logits_V = logits_V.index_fill(0, order_V[cut_V], -math.inf)
        drawn_V = logits_V.log_softmax(-1)
        token = int(torch.multinomial(drawn_V.exp(), 1, generator=r.draws))
        told_V = drawn_V if self._told.get("logprobs_mode") == "processed_logprobs" else raw_V
        r.ids.append(token)
        r.logprobs.append({token: Logprob(math.nan if faults.nan else told_V[token].item(), 1)})
        if token in (p.stop_token_ids or ()):
            r.finish = "stop"
        elif len(r.ids) == p.max_tokens or len(r.prompt) + len(r.ids) >= self._told["max_model_len"]:
            r.finish = "length"

    def _output(self, i: int, r: _Request) -> RequestOutput:
        ids, logprobs = r.ids, r.logprobs
        if faults.drops_stop and r.finish == "stop":
            ids, logprobs = ids[:-1], logprobs[:-1]
        told = None if r.params.logprobs is None else logprobs
        out = CompletionOutput(0, "", ids, None, told, faults.finish or r.finish)
        return RequestOutput(str(i), None, r.prompt, None, [out], True)
