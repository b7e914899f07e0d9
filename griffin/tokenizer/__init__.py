"""Text <-> ids, special tokens, chats; read from every kind of tokenizer that model folders hold."""

from griffin.tokenizer.files import load_tokenizer
from griffin.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
