"""Models that backtrack, evaluated beyond their length: thinking goes on in rounds (arXiv 2503.07572).

Before each round the thinking so far is linearised (`tasks.backtracking`): what was taken back is gone, and the
corrected attempt stands in its place. The last tokens of what is left, a sliding window, follow the prompt, and
thinking goes on from there. A trace that has ended is over. Steps are numbered in all that is left, in and before the
window, and a linearised text is tokenized anew.
"""

from collections.abc import Callable

import jax
import numpy as np

from tto_jax import continuing
from tto_jax.continuing import Extension
from tto_jax.core.types import Prompts, Traces
from tto_jax.rollout import RolloutConfig
from tto_jax.settings import Settings
from tto_jax.tasks import backtracking
from tto_jax.tokenizer import Tokenizer

STREAM = 0xE7C3  # keeps the rounds' keys apart from the evaluation's and the extensions'
_EXAMPLE = backtracking.write([backtracking.Attempt(0, ("1",)), backtracking.Attempt(0, ("1",))])


def check(settings: Settings, options) -> None:
    """Raises ValueError if the model's words cannot say that it backtracks, or a round does not fit its context."""
    if not options.linearise:
        return
    try:
        read = settings.tokenizer.decode(settings.tokenizer.encode(_EXAMPLE))
        wrong = None if read == _EXAMPLE else f"it is read back as {read!r}"
    except ValueError as error:
        wrong = str(error)
    if wrong:
        raise ValueError(
            f"evaluation.linearise={options.linearise}: the model's texts have no steps that could be taken back, as "
            f"in {_EXAMPLE!r}: {wrong}; choose a model on texts that was trained to backtrack"
        )
    needed = prompt_pad(settings, options) + options.extension_tokens + settings.answer_pad
    if needed > settings.model.max_position:
        raise ValueError(
            f"evaluation.linearise={options.linearise} and evaluation.extension_tokens={options.extension_tokens} take "
            f"{needed} tokens with prompt and answer, more than model.max_position={settings.model.max_position}; "
            "choose less"
        )


def prompt_pad(settings: Settings, options) -> int:
    """Tokens of the longest prompt of a round: with its window."""
    return settings.prompt_pad + options.linearise


def linearised(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Thinking without what was taken back; the same ids where nothing was."""
    text = tokenizer.decode(ids)
    left = backtracking.linearise_unfinished(text)
    return ids if left == text else tokenizer.encode(left)


def go_on(
    settings: Settings,
    config: RolloutConfig,
    params,
    prompts: Prompts,
    traces: Traces,
    first_trace: int,
    options,
    poll: Callable[[], None],
) -> list[Extension]:
    """All rounds of the traces of this process, one rollout each. With several processes all must call.

    Arguments are those of `extrapolation.extend`; the options have at least one round.
    """
    rows = continuing.Rows.of(prompts, config.group_size, first_trace)
    left = [row[:n].tolist() for row, n in zip(traces.tokens, traces.length)]
    spent, over, found = traces.length, traces.ended | traces.eos, []
    start, pad = jax.random.fold_in(jax.random.key(options.seed), STREAM), prompt_pad(settings, options)
    for step in range(options.rounds):
        left = [ids if done else linearised(settings.tokenizer, ids) for ids, done in zip(left, over)]
        window = [ids[-options.linearise :] for ids in left]
        key = jax.random.fold_in(start, step)
        new, forks, answers = continuing.sample(
            settings, config, params, rows, window, pad, options.extension_tokens, key, poll
        )
        seen = np.array([*map(len, window)], np.int32)
        found.append(Extension(spent, seen, [""] * len(left), over, new, forks, answers))
        went_on = zip(left, over, new.tokens, new.length)
        left = [ids if done else ids + more[:size].tolist() for ids, done, more, size in went_on]
        spent, over = spent + np.where(over, 0, new.length), over | new.ended | new.eos
    return found
