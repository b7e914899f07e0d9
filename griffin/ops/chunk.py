"""Tokens of a chunk: time is cut in chunks of this many wherever something is kept or computed per chunk."""

CHUNK = 64
