"""Multi-query associative recall, MQAR, as zoology's public generator makes it (Arora et al., arXiv:2312.04927)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from griffin.data.packing import Batch
from griffin.eval.synthetic.task import Ints, distinct, generator, make_batch
from griffin.loss import NOT_COUNTED

# (input_seq_len, num_kv_pairs) of zoology's figure 2, each with a vocabulary of 8,192 and fillers of token 0.
FIGURE_2 = ((64, 4), (128, 8), (256, 16))


@dataclass(frozen=True, kw_only=True)
class MQAR:
    """T = input_seq_len tokens: num_kv_pairs pairs (key, value), then each key once more, its value to be said at once.

    Keys are different numbers in 1 .. V/2 - 1, values different ones in V/2 .. V - 1, each choice as likely. The n
    queries stand at 2 n + 2 g with different gaps g in 0 .. (T - 2 n) / 2 - 1, drawn one after another, the first
    key's first, with p(g) proportional to (g + 1)^(power_a - 1): a power law, as of repeated words in text; 1 is
    uniform. Every other token is 0, or with random_non_queries drawn evenly from the vocabulary. Targets: at each
    query the key's value, nowhere else.

    Names, ranges and distributions are zoology's; its draws are not (it draws with NumPy's legacy generator).

    Raises:
        ValueError: sizes that zoology refuses: T is odd, not below V, or too short for pairs and queries.
    """

    vocab_size: int = 8192
    input_seq_len: int = 64
    num_kv_pairs: int = 4
    power_a: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self) -> None:
        T, n = self.input_seq_len, self.num_kv_pairs
        if n < 1 or T % 2 or 4 * n > T or self.vocab_size <= T:
            raise ValueError(
                f"input_seq_len={T} must be even, at least 4 * num_kv_pairs={4 * n} and below vocab_size="
                f"{self.vocab_size}"
            )
        if n > (self.vocab_size // 2) - 1:
            raise ValueError(f"num_kv_pairs={n} needs as many keys below vocab_size/2={self.vocab_size // 2}")

    @property
    def chance(self) -> float:
        return 1 / self.num_kv_pairs  # a guess among the values it has seen

    def batch(self, seed: int, step: int, rows: int) -> Batch:
        draws, T, n, half = generator(seed, step), self.input_seq_len, self.num_kv_pairs, self.vocab_size // 2
        keys = 1 + distinct(draws, rows, half - 1, n)
        values = half + distinct(draws, rows, self.vocab_size - half, n)
        queries = 2 * n + 2 * self._gaps(draws, rows)
        tokens = np.zeros((rows, T), dtype=np.int64)
        tokens[:, 0 : 2 * n : 2], tokens[:, 1 : 2 * n : 2] = keys, values
        np.put_along_axis(tokens, queries, keys, axis=1)
        targets = np.full_like(tokens, NOT_COUNTED)
        np.put_along_axis(targets, queries, values, axis=1)
        if self.random_non_queries:
            tokens = np.where(tokens == 0, draws.integers(0, self.vocab_size, tokens.shape), tokens)
        return make_batch(tokens, targets)

    def _gaps(self, draws: np.random.Generator, rows: int) -> Ints:
        """(rows, n) different gaps: the largest of log weight + Gumbel noise are drawn by weight, none twice."""
        space = (self.input_seq_len - 2 * self.num_kv_pairs) // 2
        log_weight = (self.power_a - 1) * np.log(np.arange(1, space + 1))
        ranked = np.argsort(-(log_weight + draws.gumbel(size=(rows, space))), axis=1)
        return ranked[:, : self.num_kv_pairs].astype(np.int64)
