"""What a student learns from: tokenizers, shapes, data, and what the teacher says of them before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmkit.data.chats import ChatData, ChatRows, Chats, prepare_chats
from llmkit.data.config import DataConfig
from llmkit.data.loader import RowLoader, RowMaker, TextRows
from llmkit.data.prepare import Prepared, prepare as prepare_shards
from llmkit.distill.alignment import AlignedRows, check_tokenizers
from llmkit.distill.answers import source_of_answers, teacher_dialogues
from llmkit.distill.cache import TeacherCache, TeacherRows, teacher_key
from llmkit.distill.teaching import (
    check_length,
    load_teacher,
    precision_of,
    teacher_config,
    teacher_folder,
    teacher_tokenizer,
)
from llmkit.distill.units import ChatUnits, RowUnits
from llmkit.model.adapters import base_of, is_adapter
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT
from llmkit.model.pruning import student_config
from llmkit.stages.recipes import DistillRecipe
from llmkit.training.dist import Ranks
from llmkit.training.setup import model_config, row_len, tokenizer_of

Data = ChatData | Prepared
Sources = Sequence[Any]  # Chats, or TokenShards
Say = Callable[[str], Any]


class Lessons:
    """What is learnt from: tokenizers, shapes, data, and what a cache holds of the teacher."""

    def __init__(self, recipe: DistillRecipe, ranks: Ranks, should_stop: Callable[[], bool], say: Say):
        """Looks at tokenizers and shapes.

        Raises:
            UserError: they don't fit each other.
        """
        self.recipe, self.ranks, self.should_stop, self.say = recipe, ranks, should_stop, say
        self.tokenizer = tokenizer_of(recipe, should_stop)
        self.teacher_config, self.teacher_tokenizer = teacher_config(recipe), teacher_tokenizer(recipe)
        self.same_tokens = check_tokenizers(self.tokenizer, self.teacher_tokenizer, recipe.losses)
        self.model_config = self._shape()
        self.row_len = row_len(recipe, self.model_config)
        if self.same_tokens:
            check_length(recipe, self.teacher_config, self.row_len)
        self.data: Data
        self._caches: dict[str, list[TeacherCache]] = {}
        self._teacher: GPT | None = None

    def _shape(self) -> GPTConfig:
        if self.recipe.from_teacher is None:
            return model_config(self.recipe, self.tokenizer.vocab_size)
        return student_config(self.teacher_config, self.recipe.from_teacher)

    def prepare(self, part: tuple[int, int] | None = None) -> bool:
        """Reads and encodes the data, and asks the teacher what the recipe wants to know beforehand.

        Args:
            part: (job, jobs) for a share of the teacher's work.

        Returns:
            whether all of it is there; with `part` other jobs may still be at work.

        Raises:
            Interrupted: what is done is kept.
        """
        recipe = self.recipe
        if recipe.examples == "documents":
            self.data = prepare_shards(
                recipe.data, self.tokenizer, should_stop=self.should_stop, progress=self.ranks.is_main
            )
        else:
            conversations = self._answered(part)
            if conversations is None:
                return False
            self.data = prepare_chats(
                conversations,
                self.tokenizer,
                row_len=self.row_len,
                train_on=recipe.train_on,
                should_stop=self.should_stop,
                say=self.say,
            )
        if recipe.cache is not None:
            for split in ("train", "valid", "test"):
                sources = getattr(self.data, split)
                self._caches[split] = [self._cached(split, i, part) for i in range(len(sources))]
        self._teacher = None
        return not any(cache.missing() for caches in self._caches.values() for cache in caches)

    def _answered(self, part: tuple[int, int] | None) -> DataConfig | None:
        """The data, with the teacher's answers to the training questions in place of theirs where it is to give them.

        None: other jobs are still to give some.
        """
        recipe = self.recipe
        if recipe.teacher_answers is None:
            return recipe.data
        sources = []
        for source in recipe.data.sources:
            file = teacher_dialogues(
                recipe.teacher_answers,
                source,
                recipe.data,
                self.teacher_tokenizer,
                self._loaded,
                folders=self._folders,
                precision=precision_of(recipe),
                seed=recipe.seed,
                part=part,
                should_stop=self.should_stop,
                say=self.say,
            )
            if not file.exists():
                return None
            sources.append(source_of_answers(source, file))
        return recipe.data.model_copy(update={"path": None, "train": tuple(sources)})

    def _loaded(self) -> GPT:
        """The whole teacher, loaded once for all that it is asked before training."""
        if self._teacher is None:
            alone = self.recipe.model_copy(update={"shard_teacher": False})
            self._teacher = load_teacher(alone, Ranks(device=self.ranks.device))
        return self._teacher

    @property
    def _folders(self) -> list[Path]:
        """Those that the teacher's weights are in."""
        folder = teacher_folder(self.recipe)
        return [folder, base_of(folder)] if is_adapter(folder) else [folder]

    def _cached(self, split: str, i: int, part: tuple[int, int] | None) -> TeacherCache:
        recipe = self.recipe
        assert recipe.cache is not None
        source = getattr(self.data, split)[i]
        units = ChatUnits(source) if isinstance(source, Chats) else RowUnits(self._plain_rows([source]), 0)
        cache = Path(recipe.data.cache_dir)
        return TeacherCache.prepare(
            units,
            self._loaded,
            folder=cache,
            key=teacher_key(self._folders, self.tokenizer.hash, precision_of(recipe), cache),
            top_k=recipe.cache.top_k,
            dtype=recipe.cache.dtype,
            temperature=recipe.temperature,
            vocab_size=self.tokenizer.vocab_size,
            batch_tokens=recipe.batch.micro_tokens or 8192,
            device=self.ranks.device,
            should_stop=self.should_stop,
            say=self.say,
            part=part,
        )

    def rows(self, split: str, which: Sequence[int] | None = None) -> RowMaker:
        """The rows of a split's sources, with what is known of the teacher."""
        sources = getattr(self.data, split)
        chosen = range(len(sources)) if which is None else which
        plain, recipe = self._plain_rows([sources[i] for i in chosen]), self.recipe
        if recipe.cache is not None:
            return TeacherRows(plain, [self._caches[split][i] for i in chosen])
        if self.same_tokens:
            return plain
        return AlignedRows(
            plain,
            self.tokenizer,
            self.teacher_tokenizer,
            max_len=self.teacher_config.max_seq_len,
            chat=recipe.examples == "conversations" and recipe.data.chat,
            pin_memory=self.ranks.device.type == "cuda",
        )

    def _plain_rows(self, sources: Sources) -> Any:
        pin_memory = self.ranks.device.type == "cuda"
        data, sizes = self.recipe.data, {"row_len": self.row_len, "pad_id": self.tokenizer.pad_id}
        if self.recipe.examples == "conversations":
            return ChatRows(sources, packing=data.packing, pin_memory=pin_memory, **sizes)
        return TextRows(
            sources,
            packing=data.packing,
            cross_document_attention=data.cross_document_attention,
            pin_memory=pin_memory,
            **sizes,
        )

    def describe(self, loader: RowLoader) -> str:
        """How much there is to learn from."""
        what = "conversations" if self.recipe.examples == "conversations" else "tokens"

        def n(split: Sources) -> int:
            return sum(len(s) if isinstance(s, Chats) else s.n_tokens for s in split)

        epochs = loader.epoch(self.recipe.steps)
        aligned = f"; {loader.rows.aligned_frac():.0%} aligned" if isinstance(loader.rows, AlignedRows) else ""
        return (
            f"{n(self.data.train):,} {what} to train on, {n(self.data.valid):,} held out; {epochs:.2f} epochs{aligned}"
        )
