"""Text <-> ids, special tokens, chats; read from every kind of tokenizer that model folders hold."""

from griffin.tokenizer.chat_template import GEMMA
from griffin.tokenizer.files import load_tokenizer
from griffin.tokenizer.tokenizer import TRAINED_SPECIALS, Dialogue, Tokenizer

__all__ = ["GEMMA", "TRAINED_SPECIALS", "Dialogue", "Tokenizer", "load_tokenizer"]
