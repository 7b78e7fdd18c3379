"""A recipe as it is examined: its own data, template, loss and options, on a network and steps that take seconds."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from llmkit.data.loader import RowLoader
from llmkit.losses import LossSum
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.heads import ActorCritic, SequenceClassifier, init_head
from llmkit.rollout.config import KLConfig
from llmkit.rollout.rewards.config import LengthReward
from llmkit.tokenizer import Tokenizer
from llmkit.tools.opening import context, task_of
from llmkit.training.config import EvalConfig, GuardConfig, LogConfig, SampleConfig, SaveConfig
from llmkit.training.dist import Ranks
from llmkit.training.engine import Engine
from llmkit.training.freeze import freeze
from llmkit.training.policy import PolicyTask
from llmkit.training.preferring import feedback_loss, pair_loss
from llmkit.training.setup import model_config, row_len
from llmkit.training.task import Context

ROWS = 300  # of each source that are looked at
ROW_LEN = 256  # of the small network's rows
STEPS = 6
_Z0 = 0.1  # kto's divergence, a constant here


class NotHere(Exception):
    """A check says nothing of this recipe; the text tells why."""


class Trainer:
    """A task with its network and engine, before the first step."""

    def __init__(self, task: Any, ctx: Context, engine: Engine):
        self.task, self.ctx, self.engine = task, ctx, engine

    @property
    def loader(self) -> RowLoader:
        loader: RowLoader = self.task.loader
        return loader

    @property
    def policy(self) -> nn.Module:
        """The network without what only training needs beside it."""
        module: nn.Module = self.engine.module
        if isinstance(module, ActorCritic):
            return module.actor
        return getattr(module, "student", module)

    def loss(self, module: nn.Module, batch: Any) -> LossSum:
        """The recipe's, of a micro-batch."""
        recipe = self.task.recipe
        if recipe.stage == "reward":
            found: LossSum = self.task.judging.loss(module, batch)
        elif recipe.stage == "dpo":
            chosen: Any = feedback_loss(recipe, _Z0) if recipe.loss == "kto" else pair_loss(recipe)
            found = chosen(module, batch)
        elif isinstance(self.task, PolicyTask):
            found = self.task.loss(module, batch)
        else:
            found = self.task.loss_fn(module, batch)
        return found

    def gradient(self, batches: list[Any]) -> tuple[float, Tensor]:
        """Loss and gradient of a step that is not made."""
        metrics = self.engine.update(batches, self.loss, accept=lambda metrics: False)
        return metrics["loss"], self.engine.flat_grad.clone()


class Patient:
    """What checks may ask of a recipe; everything is made when it is first asked for."""

    def __init__(self, recipe: Any, folder: Path):
        """`folder`: where all that is made goes."""
        self.recipe, self.folder = recipe, folder
        self._held = contextlib.ExitStack()
        self._n = 0

    def close(self) -> None:
        self._held.close()

    # --- the recipe's own data ---------------------------------------------------------------------------------------

    @cached_property
    def own(self) -> tuple[Any, Context]:
        """The task with the first rows of its data, in rows of the recipe's own length; no model was asked."""
        changes: dict[str, Any] = {"data": self._limited(self.recipe.data)}
        if self.recipe.text_tokenizer.path is None and (Path(self.recipe.out) / "tokenizer").is_dir():
            trained = {"path": str(Path(self.recipe.out) / "tokenizer")}
            changes["tokenizer"] = self.recipe.text_tokenizer.model_copy(update=trained)
        else:
            changes["out"] = str(self.folder / "own")
        if self.recipe.stage == "distill":
            changes |= {"cache": None, "teacher_answers": None}
        recipe = self.recipe.model_copy(update=changes)
        task, ctx = task_of(recipe), context(recipe, self.folder, Ranks())
        self._held.callback(getattr(task, "close", lambda: None))
        task.read(ctx)
        return task, ctx

    def _limited(self, data: Any) -> Any:
        def cut(sources: Any) -> Any:
            return tuple(s.model_copy(update={"limit": min(s.limit or ROWS, ROWS)}) for s in sources)

        changes = {"path": None, "train": cut(data.sources), "valid": cut(data.valid), "test": ()}
        return data.model_copy(update={**changes, "cache_dir": str(self.folder / "cache"), "workers": 1})

    @property
    def task(self) -> Any:
        return self.own[0]

    @property
    def tokenizer(self) -> Tokenizer:
        found: Tokenizer = self.task.tokenizer
        return found

    @cached_property
    def loader(self) -> RowLoader:
        """The recipe's rows. Raises NotHere for a stage that has none."""
        loader = self.task.open_rows(self.own[1])
        if loader is None:
            raise NotHere(f"stage {self.recipe.stage} learns from what it samples")
        self._held.callback(loader.close)
        found: RowLoader = loader
        return found

    @property
    def is_policy(self) -> bool:
        return self.recipe.stage in ("ppo", "grpo")

    @property
    def is_text(self) -> bool:
        """Whether the rows are text whose next tokens are learnt."""
        return self.recipe.stage in ("sft", "distill") or (
            self.recipe.stage == "pretrain" and self.recipe.objective == "causal"
        )

    # --- the small network -------------------------------------------------------------------------------------------

    @cached_property
    def shape(self) -> GPTConfig:
        """The recipe's network with its every kind of part, in two narrow layers."""
        full = (
            self.task.model_config
            if hasattr(self.task, "model_config")
            else model_config(self.recipe, self.tokenizer.vocab_size)
        )
        kv = 4 if full.kv_heads == full.n_heads else 1 if full.kv_heads == 1 else 2
        changes: dict[str, Any] = {
            "n_layers": 2, "n_heads": 4, "n_kv_heads": kv, "d_model": 32, "head_dim": None, "d_ff": 48, "dropout": 0.0,
            "n_full_layers": min(full.n_full_layers, 1),
        }  # fmt: skip
        if full.sliding_window is not None:
            changes["sliding_window"] = min(full.sliding_window, ROW_LEN // 4)
        if (experts := full.experts) is not None:
            fewer = {"n": min(experts.n, 4), "n_active": min(experts.n_active, 2), "d_ff": 16, "every": 1}
            shared = None if experts.shared_d_ff is None else 16
            changes["experts"] = experts.model_copy(update={**fewer, "shared_d_ff": shared, "dense_layers": ()})
        return full.model_copy(update=changes)

    @cached_property
    def row_len(self) -> int:
        own: int = row_len(self.recipe, self.task.model_config)
        return min(own, ROW_LEN)

    def _model(self, name: str, seed: int, judge: bool = False) -> str:
        """A folder with random weights, wide enough that attention is far from flat."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        module: nn.Module = SequenceClassifier(self.shape, 1) if judge else GPT(self.shape)
        init_weights(module, seed)
        with torch.no_grad():
            for p in module.parameters():
                if p.dim() == 2:
                    p.mul_(4)
        if isinstance(module, SequenceClassifier):
            init_head(module, seed)
        files = model_files(
            self.shape,
            torch.float32,
            self.tokenizer,
            {"stage": "doctor", "step": 0},
            head="classify" if judge else "lm",
        )
        for file, content in files.items():
            (folder / file).write_bytes(content)
        tensors = {n: t.contiguous() for n, t in module.state_dict().items()}
        (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
        return str(folder)

    @cached_property
    def small(self) -> Any:
        """The recipe on the small network."""
        recipe = self.recipe
        length, stage = self.row_len, recipe.stage
        changes: dict[str, Any] = {
            "data": self._limited(recipe.data).model_copy(update={"max_dropped_frac": 1.0}),
            "out": str(self.folder / "small"),
            "init_from": self._model("model", 0),
            "model": None,
            "tokenizer": None,
            "steps": STEPS,
            "stop_at": None,
            "precision": "fp64",
            "device": "cpu",
            "compile": False,
            "eval": EvalConfig(every=None, samples=SampleConfig()),
            "save": SaveConfig(every=2, keep=9, asynchronous=False),
            "log": LogConfig(tensorboard=False, plot=False),
            "guard": GuardConfig(),
            "batch": recipe.batch.model_copy(
                update={"tokens_per_step": 4 * length, "examples_per_step": 4, "micro_tokens": 4 * length,
                        "max_len": length}),
            "optim": recipe.optim.model_copy(
                update={"lr": recipe.optim.lr or 1e-3, "warmup_steps": 1, "warmup_frac": None, "ema_decay": None,
                        "ema_warmup": False}),
            "parallel": type(recipe.parallel)(),  # each process holds everything
            "lora": self._small_lora(),
            "freeze": tuple(p for p in recipe.freeze if not re.search(r"[2-9]|\d\d", p)),  # the small one has layers 0, 1
        }  # fmt: skip
        changes |= getattr(self, f"_small_{stage}", dict)()
        if self.is_policy:
            changes |= self._small_policy()
        return recipe.model_copy(update=changes)

    def _small_lora(self) -> Any:
        lora = self.recipe.lora
        if lora is None:
            return None
        by_layer = any(c.isdigit() for target in lora.targets for c in target)  # layers that the small one hasn't
        return lora.model_copy(
            update={"r": min(lora.r, 4), "dropout": 0.0, "quantize": None, "targets": () if by_layer else lora.targets}
        )

    def _small_sft(self) -> dict[str, Any]:
        return {"neftune_alpha": None}

    def _small_dpo(self) -> dict[str, Any]:
        return {"reference": None}

    def _small_reward(self) -> dict[str, Any]:
        return {"reference": None}

    def _small_distill(self) -> dict[str, Any]:
        soft = tuple(term for term in self.recipe.losses if term.kind == "soft")
        return {
            "teacher": self._model("teacher", 1), "losses": soft, "teacher_precision": None, "shard_teacher": False,
            "cache": None, "teacher_answers": None, "from_teacher": None, "on_policy_frac": 0.0,
            "term_norms_every": None, "ce_weight": self.recipe.ce_weight or 0.5,
        }  # fmt: skip

    def _small_ppo(self) -> dict[str, Any]:
        critic = self.recipe.critic.model_copy(
            update={"init_from": self._model("critic", 2, judge=True), "keep_head": True, "warmup_updates": 0}
        )
        return {"critic": critic}

    def _small_policy(self) -> dict[str, Any]:
        recipe = self.recipe
        prompts = min(max(4, self.row_len // 2), self.row_len - 12)
        n_samples = 1 if recipe.stage == "ppo" else 4
        rollout = {"engine": "own", "prompts_per_step": 4, "samples_per_prompt": n_samples, "max_new_tokens": 12,
                   "max_prompt_len": prompts, "max_refills": 0, "record_every": None}  # fmt: skip
        update = {"minibatches": 1, "epochs": 2, "target_kl": None}
        reward = {"kind": "length", "target": 1, "spread": 500, "unit": "characters"}  # differs from answer to answer
        kl = recipe.kl if recipe.kl.where != "none" else KLConfig(where="reward", coef=0.1)
        found: dict[str, Any] = {
            "rollout": recipe.rollout.model_copy(update=rollout),
            "update": recipe.update.model_copy(update=update),
            "rewards": (LengthReward.model_validate(reward),),
            "environment": None,
            "reference": None,
            "kl": kl,
            "eval": recipe.eval.model_copy(update={"every": None, "answers": None}),
        }
        if recipe.stage == "grpo":
            found |= {"dynamic_sampling": False, "drop_cut_off": False}
        return found

    @contextlib.contextmanager
    def trainer(self, rank: int = 0, world: int = 1, **changes: Any) -> Iterator[Trainer]:
        """The small network with an engine; `changes` go into its recipe. Of several ranks each is made by itself, and
        none waits for another."""
        self._n += 1
        out = self.folder / f"trainer-{self._n}"
        recipe = self.small.model_copy(update={"out": str(out), **changes})
        ctx, task = context(recipe, out, Ranks(device=torch.device("cpu"))), task_of(recipe)
        ctx_of_rank = context(recipe, out, Ranks(rank, world))
        try:
            task.prepare(ctx)
            module = task.build(ctx_of_rank)
            freeze(module, recipe.freeze)
            yield Trainer(task, ctx, Engine(module, recipe, Ranks(), task.parts))
        finally:
            getattr(task, "close", lambda: None)()

    def batch_of(self, **sizes: int) -> Any:
        """The small recipe's batch section with other sizes."""
        return self.small.batch.model_copy(update=sizes)
