"""Budget forcing: thinking that has ended goes on, for accuracy beyond the last budget (arXiv 2503.07572).

In an extension the `</think>` that ended a trace is replaced by a word that goes on, and thinking continues for a
number of tokens; a trace that was cut goes on as it is, one that ended with EOS is over. The prompt and all thinking so
far are the prompt of another rollout: they are prefilled again in every extension, once a trace.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from tto_jax import continuing
from tto_jax.continuing import Extension
from tto_jax.core.types import Prompts, Traces
from tto_jax.rollout import RolloutConfig
from tto_jax.settings import Settings

STREAM = 0xE7B2  # keeps the extensions' keys apart from the evaluation's


def words(settings: Settings, given: Sequence[str]) -> list[list[int]]:
    """Token ids of the words that go on. Raises ValueError where one has no tokens, or one that ends thinking."""
    tokenizer, found = settings.tokenizer, []
    for word in given:
        try:
            ids = tokenizer.encode(word)
        except ValueError as error:
            raise ValueError(f"evaluation.extension_words={word!r}: {error}") from error
        if not ids or tokenizer.think_end_id in ids or tokenizer.eos_id in ids:
            raise ValueError(
                f"evaluation.extension_words={word!r} is the tokens {ids}: at least one, and none that ends thinking "
                f"({tokenizer.think_end_id}) or the text ({tokenizer.eos_id}); such as '\\nWait'"
            )
        found.append(ids)
    return found


def prompt_pad(settings: Settings, options) -> int:
    """Tokens of the longest prompt of an extension: of all extensions, so that one program serves them."""
    longest = max(map(len, words(settings, options.extension_words)))
    steps = options.extensions
    return settings.prompt_pad + options.budgets[-1] + steps * longest + (steps - 1) * options.extension_tokens


def check(settings: Settings, options) -> None:
    """Raises ValueError if the extensions that the options ask for do not fit into the model's context."""
    if not options.extensions:
        return
    needed = prompt_pad(settings, options) + options.extension_tokens + settings.answer_pad
    if needed > settings.model.max_position:
        raise ValueError(
            f"evaluation.extensions={options.extensions} of evaluation.extension_tokens={options.extension_tokens} "
            f"after {options.budgets[-1]} tokens take {needed} tokens with prompt and answer, more than "
            f"model.max_position={settings.model.max_position}; choose fewer, or shorter ones"
        )


def extend(
    settings: Settings,
    config: RolloutConfig,
    params,
    prompts: Prompts,
    traces: Traces,
    first_trace: int,
    options,
    poll: Callable[[], None],
) -> list[Extension]:
    """All extensions of the traces of this process, one rollout each. With several processes all must call.

    Args:
      config: of the rollout that sampled the traces.
      prompts: B rows, on the host; traces: N = B G rows of them, numbered from `first_trace` for each problem.
      options: of the evaluation, with at least one extension.
    """
    rows = continuing.Rows.of(prompts, config.group_size, first_trace)
    thought = [row[:n].tolist() for row, n in zip(traces.tokens, traces.length)]
    ended, over, found = traces.ended, traces.eos, []
    ids, pad = words(settings, options.extension_words), prompt_pad(settings, options)
    start = jax.random.fold_in(jax.random.key(options.seed), STREAM)
    for step in range(options.extensions):
        rng = [
            np.random.default_rng([STREAM, options.seed, *map(int, row), step])
            for row in zip(rows.problem, rows.number)
        ]
        chosen = [int(one.integers(len(ids))) if end else -1 for one, end in zip(rng, ended)]
        thought = [row[:-1] + ids[c] if c >= 0 else row for row, c in zip(thought, chosen)]
        key = jax.random.fold_in(start, step)
        new, forks, answers = continuing.sample(
            settings, config, params, rows, thought, pad, options.extension_tokens, key, poll
        )
        word = [options.extension_words[c] if c >= 0 else "" for c in chosen]
        before = np.array([*map(len, thought)], np.int32)
        found.append(Extension(before, before, word, over, new, forks, answers))
        went_on = zip(thought, over, new.tokens, new.length)
        thought = [row if done else row + more[:size].tolist() for row, done, more, size in went_on]
        ended, over = new.ended & ~over, over | new.eos
    return found
