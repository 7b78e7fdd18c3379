"""Rows that are encoded once: a source's arrays as one file of the cache, keyed by everything they depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from llmkit import storage
from llmkit.config import UserError
from llmkit.data.cache import ContentHashes, cache_writable, key_of
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.data.sources import File
from llmkit.tokenizer import Tokenizer

Arrays = dict[str, NDArray[Any]]


class EncodedSources:
    """The encoded sources of a recipe: made when they are first asked for, and found in the cache from then on."""

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer):
        self.cfg, self.tokenizer = cfg, tokenizer
        self._hashes = ContentHashes(Path(cfg.cache_dir))

    def arrays(
        self,
        source: SourceConfig,
        files: Sequence[File],
        kind: str,
        inputs: Mapping[str, Any],
        make: Callable[[], Arrays],
    ) -> Arrays:
        """What `make` gives, or what it gave for the same files and inputs.

        Args:
            source: its columns and limit are part of the key, as are tokenizer and chat template.
            files: of the source (`files_of`); their content is part of the key.
            kind: of rows; it ends the file's name.
            inputs: whatever else the arrays depend on (JSON), a version of their layout among it.
            make: called if they are not in the cache. It may raise; then nothing is kept.

        Raises:
            UserError: a file can't be read, or the source's file in the cache is damaged.
            MachineError: the cache can't be written.
        """
        key = {
            "files": [(f.kind, f.compression, h) for f, h in zip(files, self._hashes.of(files), strict=True)],
            "columns": source.columns,
            "limit": source.limit,
            "tokenizer": (self.tokenizer.hash, self.tokenizer.template_hash),
            **inputs,
        }
        self._hashes.save()
        file = Path(self.cfg.cache_dir) / f"{key_of(key)[:32]}.{kind}.safetensors"
        if not file.is_file():
            arrays = make()
            with cache_writable(file.parent):
                storage.replace_file(file, save(arrays))
        return read_arrays(file)


def read_arrays(file: Path) -> Arrays:
    """The arrays of a file of the cache. Raises UserError if it is damaged."""
    try:
        return dict(load_file(file))
    except Exception as e:
        raise UserError(f"{file}: damaged: {e}: delete it and start again") from None
