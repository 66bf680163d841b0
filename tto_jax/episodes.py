"""Forks of thinking traces where their texts say so: at delimiters, paragraphs, or by a rule of the user's own."""

from collections.abc import Sequence

import numpy as np

from tto_jax.tasks.episodes import Rule
from tto_jax.tokenizer import Tokenizer


def forks_at_delimiters(
    tokenizer: Tokenizer, rule: Rule, tokens: np.ndarray, length: np.ndarray, size: int
) -> np.ndarray:
    """Forks i32[N,S] of traces: the ends of their episodes, in tokens; the last episode ends with the trace.

    A text's cut lies at the last boundary between tokens that is not behind it: a token that holds the end of one
    episode and the beginning of the next, and every part of a character, belongs to the next. Shorter traces have
    blocks without tokens at their end: fork = length there, as at budgets.

    Args:
      tokenizer: decodes the traces.
      rule: text -> offsets of new episodes, in characters, ascending.
      tokens: i32[N,C]; length: i32[N], tokens of each trace.
      size: S, static; episodes beyond the S-th are part of it.

    Raises:
      ValueError: size below 1, or offsets that do not ascend within the text.
    """
    if size < 1:
        raise ValueError(f"size={size}: a trace has at least 1 episode")
    rows = [_ends(tokenizer, rule, row[:n].tolist()) for row, n in zip(np.asarray(tokens), np.asarray(length))]
    forks = np.repeat(np.asarray(length, np.int32)[:, None], size, axis=1)
    for row, ends in zip(forks, rows):
        ends = ends[: size - 1]
        row[: len(ends)] = ends
    return forks


def _ends(tokenizer: Tokenizer, rule: Rule, ids: Sequence[int]) -> list[int]:
    """Tokens before each cut of one trace."""
    text = tokenizer.decode(ids)
    cuts = list(rule(text))
    if any(not 0 <= a <= b <= len(text) for a, b in zip([0, *cuts], cuts)):
        raise ValueError(f"the rule gave the offsets {cuts[:20]}: they must ascend within a text of {len(text)}")
    known = {0: 0, len(ids): len(text)}  # tokens -> characters
    return [_tokens_within(tokenizer, ids, cut, known) for cut in cuts]


def _tokens_within(tokenizer: Tokenizer, ids: Sequence[int], characters: int, known: dict[int, int]) -> int:
    """The most leading tokens whose text has at most so many characters; an unfinished character counts as one.

    Decoding of prefixes is right for every tokenizer, and the halving makes it cheap.
    """
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high + 1) // 2
        if middle not in known:
            known[middle] = len(tokenizer.decode(ids[:middle]))
        low, high = (middle, high) if known[middle] <= characters else (low, middle - 1)
    return low
