"""Text <-> ids, special tokens, chats; read from every kind of tokenizer that model folders hold."""

from griffin.tokenizer.files import load_tokenizer
from griffin.tokenizer.tokenizer import TRAINED_SPECIALS, Tokenizer

__all__ = ["TRAINED_SPECIALS", "Tokenizer", "load_tokenizer"]
