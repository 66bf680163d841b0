"""Budget forcing: thinking that has ended goes on, for accuracy beyond the last budget (arXiv 2503.07572).

In an extension the `</think>` that ended a trace is replaced by a word that goes on, and thinking continues for a
number of tokens; a trace that was cut goes on as it is, one that ended with EOS is over. The prompt and all thinking so
far are the prompt of another rollout: they are prefilled again in every extension, once a trace.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from tto_jax import completions, continuing, rollout, sharding
from tto_jax.core.budgets import BudgetSchedule
from tto_jax.core.types import Answers, Prompts, Traces
from tto_jax.settings import Settings

STREAM = 0xE7B2  # keeps the extensions' keys apart from the evaluation's


@dataclasses.dataclass(frozen=True)
class Extension:
    """N traces that went on, on the host. What a trace that is over got means nothing."""

    before: list[list[int]]  # of each row, thinking before: with the word, without the `</think>`
    word: list[str]  # what replaced the `</think>`; empty: nothing, the trace had been cut
    over: np.ndarray  # bool[N], ended with EOS before
    traces: Traces  # the continuations
    forks: np.ndarray  # i32[N, 1]: their lengths
    answers: Answers  # [N, 1, A, E]


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
    config: rollout.RolloutConfig,
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
    config = dataclasses.replace(config, group_size=1, trace_pad=options.extension_tokens)
    schedule = sharding.put(BudgetSchedule.from_prior((options.extension_tokens,)))
    start = jax.random.fold_in(jax.random.key(options.seed), STREAM)
    for step in range(options.extensions):
        rng = [
            np.random.default_rng([STREAM, options.seed, *map(int, row), step])
            for row in zip(rows.problem, rows.number)
        ]
        chosen = [int(one.integers(len(ids))) if end else -1 for one, end in zip(rng, ended)]
        thought = [row[:-1] + ids[c] if c >= 0 else row for row, c in zip(thought, chosen)]
        on_device = rows.then(thought, pad, settings.tokenizer.pad_id)
        key = sharding.put(jax.random.fold_in(start, step))
        sampled = rollout.sample(settings.model, config, params, on_device, key, schedule, 0, poll)
        new, forks, answers = sharding.local_rows(sampled[:3])
        word = [options.extension_words[c] if c >= 0 else "" for c in chosen]
        found.append(Extension(thought, word, over, new, forks, answers))
        went_on = zip(thought, over, new.tokens, new.length)
        thought = [row if done else row + more[:size].tolist() for row, done, more, size in went_on]
        ended, over = new.ended & ~over, over | new.eos
    return found


def take(extension: Extension, rows: np.ndarray) -> Extension:
    """Some of the rows."""
    pick = lambda x: [x[i] for i in rows]  # noqa: E731
    arrays = extension.over, extension.traces, extension.forks, extension.answers
    return Extension(pick(extension.before), pick(extension.word), *jax.tree.map(lambda x: x[rows], arrays))


def lines_with(lines: list[dict], extensions: list[tuple[Extension, list[dict]]]) -> list[dict]:
    """The lines of N traces with the list `extensions`: one object for each, with `word` and the text that follows it.

    extensions: each with the lines of its continuations, as `completions.lines` makes them. A trace that is over keeps
    its length and its last answers.
    """
    for extension, continued in extensions:
        for n, (line, more) in enumerate(zip(lines, continued)):
            before = line.setdefault("extensions", [])
            if extension.over[n]:
                last = before[-1] if before else _end(line)
                before.append(last | {"word": "", "text": "", "sampled": 0})
            else:
                new = {name: more[name] for name in ("ended", "eos", "text")}
                new |= {"inserted": more["inserted"][0], "answers": more["answers"][0], "sampled": more["tokens"]}
                before.append(new | {"word": extension.word[n], "tokens": len(extension.before[n]) + more["tokens"]})
    return lines


def _end(line: dict) -> dict:
    """A trace's end, before any extension, in the form of an extension."""
    last = {"inserted": line["inserted"][-1], "answers": line["answers"][-1]}
    return last | {name: line[name] for name in ("ended", "eos", "tokens")}


def sampled(lines: Sequence[dict]) -> int:
    """Tokens of all continuations and their answers, without what was inserted."""
    new = [extension for line in lines for extension in line["extensions"] if extension["sampled"]]
    return sum(x["sampled"] + sum(answer["tokens"] for answer in x["answers"]) for x in new)


def columns(lines: Sequence[dict]) -> completions.Columns:
    """The lines as arrays whose columns are not budgets: the trace at its end, then after each extension."""
    return completions.columns([_by_extension(line) for line in lines])


def _by_extension(line: dict) -> dict:
    states = [_end(line), *line["extensions"]]
    told = {"forks": "tokens", "inserted": "inserted", "answers": "answers"}
    by_state = {name: [state[key] for state in states] for name, key in told.items()}
    return line | by_state | {"tokens": states[-1]["tokens"], "ended": states[-1]["ended"]}
