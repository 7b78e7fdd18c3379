"""Answers that vLLM writes with the policy's weights: a Hugging Face folder goes to it, ids and log-probabilities come back.

Written to the API of vLLM 0.22 to 0.32 (`LLM`, `SamplingParams`, `LLM.collective_rpc("reload_weights")`, sleep mode), and
started as TRL 1.16 starts it inside a trainer: in this process, one engine for each rank, with the executor
`external_launcher`, which takes the ranks and devices that torchrun gave out.

What is asked of it, and why:

* Weights are handed over before every rollout and evaluation, by path: an engine that reloads "its own" checkpoint may
  read old weights (vllm#32718), and after a deep sleep it has none (vllm#29341).
* The prefix cache is emptied then: keys and values in it are those of the weights before.
* Prompts go in and answers come out as ids; nothing is decoded and encoded again.
* `processed_logprobs`: of the distribution that was drawn from, after temperature and filters.
* Every answer is a request of its own with its own seed. (With n > 1, vLLM seeds the samples of a prompt with seed + k.)
* The folder's embedding has a row for each token and no more, so that nothing else can be drawn.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from llmkit.config import MachineError, UserError
from llmkit.inference.batch import check_prompt, not_finite
from llmkit.inference.sampling import sample_seeds
from llmkit.inference.stream import Generation, TextStream
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT
from llmkit.model.saving import merged_tensors
from llmkit.rollout.collect import Generate
from llmkit.rollout.config import RolloutConfig
from llmkit.storage import machine_errors
from llmkit.tokenizer import Tokenizer
from llmkit.training.checkpoint import safetensors_stream
from llmkit.training.dist import Ranks

_OLDEST = (0, 22)
_WEIGHTS = "model.safetensors"
_MEMORY = Path("/dev/shm")  # files in main memory, on Linux


def require_vllm(device: torch.device) -> Any:
    """The module. Raises UserError if it is not installed, too old, or built for other devices."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "rollout.engine: vllm needs vLLM, which is not installed: `pip install llmkit[vllm]`, or take engine: own"
        )
    import vllm
    from vllm.platforms import current_platform

    found = re.match(r"(\d+)\.(\d+)", vllm.__version__)
    if found is not None and (int(found[1]), int(found[2])) < _OLDEST:
        raise UserError(
            f"rollout.engine: vllm: vLLM {vllm.__version__} is older than what this was written for: install "
            f"{'.'.join(map(str, _OLDEST))} or newer"
        )
    if current_platform.device_type != device.type:
        raise UserError(
            f"rollout.engine: vllm: the run's device is {device.type}, but this build of vLLM computes on "
            f"{current_platform.device_type}: install the one for {device.type}, set `device`, or take engine: own"
        )
    return vllm


class Vllm:
    """One rank's vLLM engine, on that rank's device. It begins with the first rollout, and sleeps between two."""

    def __init__(self, config: RolloutConfig, tokenizer: Tokenizer, ranks: Ranks, out: Path):
        """Imports nothing yet.

        Args:
            config: engine, sampling and lengths.
            tokenizer: of the policy; vLLM is given none.
            ranks: which process this is, and where it computes.
            out: the run's folder.
        """
        self.config, self.tokenizer, self.ranks, self.out = config, tokenizer, ranks, out
        self.folder: Path | None = None
        """Where this machine's ranks find the weights; chosen by one of them when their size is known."""
        self._llm: Any = None

    @property
    def sleeps(self) -> bool:
        """Whether the engine gives its memory back between rollouts."""
        return self.config.vllm.sleep and self.ranks.device.type == "cuda"

    @contextlib.contextmanager
    def awake(self, model: GPT) -> Iterator[Generate]:
        """Gives these weights to the engine; what writes with them, until the context ends. A collective.

        Args:
            model: whole; adapters are merged on the way.

        Raises:
            UserError: vLLM is missing or does not fit.
            MachineError: there is no room for the weights.
        """
        try:
            self.ranks.together(lambda: self._hand_over(model))
            self.ranks.together(lambda: self._take(model))
        finally:
            self._forget()
        try:
            yield lambda prompts, seeds, n: self._write(model, prompts, seeds, n)
        finally:
            if self.sleeps:
                self._llm.sleep(level=2)

    def close(self) -> None:
        """Ends the engine and removes the folder."""
        began, self._llm = self._llm is not None, None
        if began and self.ranks.processes == 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # vLLM's own, of one process
        if self.folder is not None and not self.ranks.local_rank:
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- weights -----------------------------------------------------------------------------------------------------

    def _hand_over(self, model: GPT) -> None:
        """Writes the folder, whole or not at all: one process of a machine for all of them."""
        if self.ranks.local_rank:
            return
        tensors = merged_tensors(model, self.tokenizer.vocab_size)
        if self.folder is None:
            for left in self._places():  # by a start that was killed
                shutil.rmtree(left, ignore_errors=True)
            self.folder = self._roomy(sum(t.numel() * t.element_size() for t in tensors.values()))
        with machine_errors(self.folder):
            if not (self.folder / "config.json").is_file():
                # Never into a folder that is there: in /dev/shm anyone may have made one of this name.
                self.folder.mkdir(parents=True, mode=0o700)
                shape = model.config.model_copy(update={"vocab_size": self.tokenizer.vocab_size})
                facts = {"stage": "rollout", "step": 0}
                for name, content in model_files(shape, model.head_weight.dtype, self.tokenizer, facts).items():
                    (self.folder / name).write_bytes(content)
            part = self.folder / f"{_WEIGHTS}.part"
            with part.open("wb") as f:
                for piece in safetensors_stream(tensors, (t.to("cpu") for t in tensors.values())):
                    f.write(piece)
            os.replace(part, self.folder / _WEIGHTS)

    def _places(self) -> list[Path]:
        """Folders that the weights may be in, the best first: names of this run and machine, so that a next start finds
        what this one left."""
        node = f"node-{self.ranks.process // self.ranks.per_node}"
        key = hashlib.sha256(str(self.out.resolve()).encode()).hexdigest()[:16]
        if self.config.vllm.folder is not None:
            return [Path(self.config.vllm.folder) / f"llmkit-{key}-{node}"]
        return [_MEMORY / f"llmkit-{key}-{node}", self.out / "hand_over" / node]

    def _roomy(self, size: int) -> Path:
        """The first of them that takes so many bytes; the last one without being asked."""
        first, last = self._places()[0], self._places()[-1]
        fits = first.parent.is_dir() and shutil.disk_usage(first.parent).free > 1.1 * size
        return first if fits else last

    def _forget(self) -> None:
        """The weights are read: their file would only fill memory."""
        if self.folder is not None and not self.ranks.local_rank:
            for name in (_WEIGHTS, f"{_WEIGHTS}.part"):
                (self.folder / name).unlink(missing_ok=True)

    def _take(self, model: GPT) -> None:
        """The engine reads the folder."""
        if self.folder is None:
            self.folder = next(place for place in self._places() if (place / _WEIGHTS).is_file())
        if self._llm is None:
            self._llm = self._start(model)
            return
        if self.sleeps:
            torch.cuda.empty_cache()  # what the trainer's allocator only keeps for later is vLLM's now
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self.folder)})
        if self.sleeps:
            self._llm.wake_up(tags=["kv_cache"])
        if self._llm.reset_prefix_cache() is False:
            raise MachineError("vLLM did not empty its prefix cache, which is of older weights: start the run again")

    def _start(self, model: GPT) -> Any:
        vllm = require_vllm(self.ranks.device)
        on_gpu = self.ranks.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
        with self._launched():
            return vllm.LLM(
                model=str(self.folder),
                skip_tokenizer_init=True,
                generation_config="vllm",
                dtype=str(model.head_weight.dtype).removeprefix("torch."),
                max_model_len=model.config.max_seq_len,
                max_num_seqs=self.config.batch_size,
                gpu_memory_utilization=self.config.vllm.memory_frac,
                enable_sleep_mode=self.sleeps,
                enforce_eager=self.config.vllm.eager,
                logprobs_mode="processed_logprobs",
                distributed_executor_backend="external_launcher" if on_gpu else "uni",
                seed=0,
            )

    @contextlib.contextmanager
    def _launched(self) -> Iterator[None]:
        """The environment in which `external_launcher` looks for its place: torchrun's, or that of a single process."""
        if self.ranks.processes > 1:
            yield
            return
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        place = {"RANK": 0, "LOCAL_RANK": self.ranks.device.index or 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
        said = {**{name: str(value) for name, value in place.items()}, "MASTER_ADDR": "127.0.0.1"}
        before = {name: os.environ.get(name) for name in said}
        os.environ.update(said)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    # --- answers -----------------------------------------------------------------------------------------------------

    def _write(self, model: GPT, prompts: Sequence[Sequence[int]], seeds: Sequence[int], n: int) -> list[Generation]:
        """See `collect.Generate`. A prompt's n requests share its keys and values through the prefix cache."""
        from vllm import SamplingParams

        config, stops = self.config, sorted(self.tokenizer.stop_ids)
        requests, params = [], []
        for i, prompt in enumerate(prompts):
            check_prompt(prompt, i, model, self.tokenizer.vocab_size)
            for seed in sample_seeds(seeds[i], n):
                requests.append({"prompt_token_ids": list(prompt)})
                params.append(
                    SamplingParams(
                        temperature=config.temperature,
                        top_k=config.top_k,
                        top_p=config.top_p,
                        min_p=config.min_p,
                        seed=seed,
                        max_tokens=min(config.max_new_tokens, model.config.max_seq_len - len(prompt)),
                        stop_token_ids=stops,
                        ignore_eos=True,  # it would add what it takes for the end by itself
                        logprobs=0,  # of the sampled token alone
                        detokenize=False,
                    )
                )
        if not requests:
            return []
        outputs = self._llm.generate(requests, params, use_tqdm=False)
        if len(outputs) != len(requests):
            raise MachineError(f"vLLM gave {len(outputs)} answers to {len(requests)} requests")
        return [
            self._generation(i, request, output)
            for i, (request, output) in enumerate(zip(requests, outputs, strict=True))
        ]

    def _generation(self, index: int, request: dict[str, list[int]], output: Any) -> Generation:
        """vLLM's output, looked at closely: what is trained on must be what was sampled."""
        if list(output.prompt_token_ids) != request["prompt_token_ids"]:
            raise MachineError(f"vLLM answered another prompt than number {index}")
        (made,) = output.outputs
        ids = [int(i) for i in made.token_ids]
        if made.finish_reason not in ("stop", "length"):
            raise MachineError(f"vLLM ended answer {index} with '{made.finish_reason}' instead of 'stop' or 'length'")
        if not ids or made.logprobs is None or len(made.logprobs) != len(ids):
            raise MachineError(
                f"vLLM gave {len(made.logprobs or [])} log-probabilities for {len(ids)} tokens of answer {index}"
            )
        logprobs = [float(table[token].logprob) for token, table in zip(ids, made.logprobs, strict=True)]
        if not all(map(math.isfinite, logprobs)):
            raise not_finite(next(t for t, p in enumerate(logprobs) if not math.isfinite(p)), index)
        stream = TextStream(self.tokenizer)
        text = "".join(stream.push(token) for token in ids[:-1])
        ended_early = stream.stopped
        text += stream.push(ids[-1])
        if ended_early or stream.stopped != (made.finish_reason == "stop"):
            raise MachineError(
                f"vLLM ended answer {index} with '{made.finish_reason}', but the stop token is "
                f"{'among' if stream.stopped else 'not among'} its {len(ids)} tokens"
            )
        return Generation(ids, logprobs, text + stream.finish(), "stop" if stream.stopped else "length")
