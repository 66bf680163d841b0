"""Thinking that goes on: rollouts whose prompts hold what was thought before, and what is kept of them.

Everything before is prefilled again, once a trace: prompts of different traces have nothing in common that the rollout
could share.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from tto_jax import completions, data, rollout, sharding
from tto_jax.core.budgets import BudgetSchedule
from tto_jax.core.types import Answers, Prompts, Traces
from tto_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class Rows:
    """N traces of this process that go on."""

    prompt: list[list[int]]  # token ids, without padding
    problem: np.ndarray  # u32[N], ids
    number: np.ndarray  # i32[N], of the trace among those of its problem

    @classmethod
    def of(cls, prompts: Prompts, group_size: int, first_trace: int) -> "Rows":
        """Of B prompts on the host, with so many traces each."""
        each = [row[:n].tolist() for row, n in zip(prompts.tokens, prompts.length)]
        return cls(
            prompt=[ids for ids in each for _ in range(group_size)],
            problem=np.repeat(prompts.id, group_size),
            number=np.tile(first_trace + np.arange(group_size, dtype=np.int32), len(each)),
        )

    def then(self, thinking: Sequence[list[int]], pad: int, pad_id: int) -> Prompts:
        """Prompts followed by thinking, on the devices; their ids tell (problem, trace), as random keys must."""
        rows = [before + after for before, after in zip(self.prompt, thinking)]
        tokens, length = data.pad_right(rows, pad, pad_id, "prompt_pad", np.int32)
        pairs = np.stack([self.problem, self.number.astype(np.uint32)], axis=1)
        ids = np.array([zlib.crc32(pair.tobytes()) for pair in pairs], np.uint32)
        return sharding.put_rows(Prompts(tokens=tokens, length=length, id=ids))


@dataclasses.dataclass(frozen=True)
class Extension:
    """N traces that went on, on the host. What a trace that is over got means nothing."""

    before: np.ndarray  # i32[N], tokens of all thinking before: with the word, without the `</think>`
    seen: np.ndarray  # i32[N], tokens of thinking that followed the prompt
    word: list[str]  # what replaced the `</think>`; empty: nothing, the trace had been cut
    over: np.ndarray  # bool[N], ended with EOS before
    traces: Traces  # the continuations
    forks: np.ndarray  # i32[N, 1]: their lengths
    answers: Answers  # [N, 1, A, E]


def sample(
    settings: Settings,
    config: rollout.RolloutConfig,
    params,
    rows: Rows,
    thinking: Sequence[list[int]],
    pad: int,
    tokens: int,
    key: jax.Array,
    poll: Callable[[], None],
) -> tuple[Traces, np.ndarray, Answers]:
    """One rollout of rows that go on, on the host: traces [N], forks i32[N, 1], answers [N, 1, A, E].

    Args:
      config: of the rollout that sampled the traces.
      thinking: token ids that follow the prompts; pad: tokens of the longest prompt with them.
      tokens: of thinking that is sampled, at most.
      key: of this rollout.
    """
    config = dataclasses.replace(config, group_size=1, trace_pad=tokens)
    schedule = sharding.put(BudgetSchedule.from_prior((tokens,)))
    prompts = rows.then(thinking, pad, settings.tokenizer.pad_id)
    sampled = rollout.sample(settings.model, config, params, prompts, sharding.put(key), schedule, 0, poll)
    return sharding.local_rows(sampled[:3])


def take(extension: Extension, rows: np.ndarray) -> Extension:
    """Some of the rows."""
    fields = {field.name: getattr(extension, field.name) for field in dataclasses.fields(Extension)}
    word = fields.pop("word")
    return Extension(word=[word[i] for i in rows], **jax.tree.map(lambda x: x[rows], fields))


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
                before.append(last | {"word": "", "text": "", "sampled": 0, "seen": 0})
            else:
                new = {name: more[name] for name in ("ended", "eos", "text")}
                new |= {"inserted": more["inserted"][0], "answers": more["answers"][0], "sampled": more["tokens"]}
                new |= {"word": extension.word[n], "seen": int(extension.seen[n])}
                before.append(new | {"tokens": int(extension.before[n]) + more["tokens"]})
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
