"""Limits of the engine. Torch-free."""

from __future__ import annotations

from pydantic import Field

from llmkit.config import Config


class EngineConfig(Config):
    """How many requests are written at once, and how much memory their keys and values may take."""

    max_rows: int = Field(32, ge=1)
    """Most requests that are written side by side; the others wait."""
    cache_tokens: int = Field(16384, ge=16)
    """Tokens of all requests together whose keys and values are kept: those being written, and, while there is room,
    prompts of the past. Rows x context, where that is less."""
    block_tokens: int = Field(16, ge=1)
    """Keys and values are handed out, shared and counted in blocks of so many tokens."""
    prefill_tokens: int = Field(512, ge=1)
    """Most prompt tokens that are read in one step, so that a long prompt doesn't hold up those who write."""
    reuse_prefixes: bool = True
    """Whether prompts that begin alike share what was computed for that beginning."""
    draft_tokens: int = Field(4, ge=1, le=32)
    """Tokens that a draft model proposes at a time; without one it means nothing."""
