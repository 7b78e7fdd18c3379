"""Text <-> ids, and the only place that turns a conversation into ids and a loss mask."""

from llmkit.tokenizer.config import SPECIAL, TokenizerConfig
from llmkit.tokenizer.tokenizer import ChatEncoding, StreamDecoder, Tokenizer

__all__ = ["SPECIAL", "ChatEncoding", "StreamDecoder", "Tokenizer", "TokenizerConfig"]
