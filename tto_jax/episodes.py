"""Forks of thinking traces where their texts say so: at delimiters, paragraphs, or by a rule of the user's own."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tto_jax.tasks.episodes import MARKERS, Delimiters, Rule, paragraphs
from tto_jax.tokenizer import Tokenizer

RULES = ("budgets", "delimiters", "paragraphs", "blocks")


@dataclasses.dataclass(frozen=True)
class Episodes:
    """Cuts traces into at most `size` episodes, in place of budgets: tokens i32[N,C], length i32[N] -> i32[N,size]."""

    size: int
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    text_rule: Rule | None  # None: blocks of so many tokens
    block: int = 0

    def __call__(self, tokens: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Forks of finished traces; the last one is the end of the trace."""
        if self.text_rule is None:
            return forks_at_blocks(length, self.block, self.size)
        return forks_at_delimiters(self.tokenizer, self.text_rule, tokens, length, self.size)


def of_section(options: dict, tokenizer: Tokenizer, longest: int) -> Episodes | None:
    """What a configuration's section `episodes` asks for; None: budgets. longest: tokens of the longest trace.

    Raises ValueError for an unknown rule and for numbers that make no sense.
    """
    rule, most, block = options["rule"], options["most"], options["block"]
    if rule not in RULES:
        raise ValueError(f"episodes.rule={rule!r} is unknown: choose one of {RULES}")
    if rule == "budgets":
        return None
    if most < 0 or most == 1:
        raise ValueError(f"episodes.most={most}: choose 0 (as many as the rule makes), or at least 2")
    if rule == "blocks":
        if not 1 <= block < longest:
            raise ValueError(
                f"episodes.block={block}: choose 1 to {longest - 1} tokens, as a trace has {longest} at most"
            )
        number = -(-longest // block)
        return Episodes(min(most or number, number), tokenizer, None, block)
    if rule == "paragraphs":
        if not most:
            raise ValueError("episodes.most=0 with rule 'paragraphs': a text has any number of them; choose 6")
        return Episodes(most, tokenizer, paragraphs(most, options["separator"]))
    names = ("separator", "gap", "max_cuts", "group")
    try:
        found = Delimiters(tuple(options["markers"]) or MARKERS, **{name: options[name] for name in names})
    except ValueError as error:
        raise ValueError(f"episodes: {error}") from error
    if found.size < 2:
        raise ValueError(f"episodes.max_cuts={found.max_cuts}, group={found.group}: one episode, nothing is cut")
    return Episodes(min(most or found.size, found.size), tokenizer, found)


def forks_at_blocks(length: np.ndarray, block: int, size: int) -> np.ndarray:
    """Forks i32[N,size] at the ends of blocks of `block` tokens; the last block is what is left. length: i32[N]."""
    ends = np.append(block * np.arange(1, size), np.iinfo(np.int32).max)
    return np.minimum(np.asarray(length)[:, None], ends).astype(np.int32)


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
