"""Accuracy at budgets or after episodes: rollouts whose answers are decoded from the shared traces at these forks.

Keys depend on the seed, the problem, the trace and the answer only: runs are compared on common random numbers,
whatever the rows of a rollout, the mesh and the processes. A set is divided into parts; in a rollout every shard of the
rows samples one, and the process that has the shard grades it and keeps its completions.
"""

import dataclasses
import io
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tto_jax import completions, continuing, data, episodes, extrapolation, grading, linearised, rollout, sharding
from tto_jax.core.budgets import BudgetSchedule
from tto_jax.core.sampling import SampleConfig
from tto_jax.models.decoder import Params
from tto_jax.settings import Settings
from tto_jax.tasks import Problem

STREAM = 0xE7A1  # keeps the evaluation's keys apart from training's
MOST_ROWS = 256  # more do not make a rollout faster, and a part is what a kill can lose
UNKNOWN_MEMORY = 8 * 2**30  # bytes, taken for a device's where it does not tell, as a CPU


@dataclasses.dataclass(frozen=True)
class Options:
    """What is sampled."""

    budgets: tuple[int, ...]  # tokens
    traces: int  # n, of each problem
    answers: int  # A, of each trace at each budget
    temperature: float
    seed: int
    rows: int = 0  # most traces of one part; 0: see `default_rows`
    ids: bool = False  # prompts and tokens are kept beside the texts
    episodes: dict | None = None  # the section `episodes`: answers are forced after each of them; None: at the budgets
    start: bool = False  # answers before any thinking, too: the first column, budget 0
    extensions: int = 0  # how often thinking that has ended goes on after the last budget, see `extrapolation`
    extension_tokens: int = 0  # of thinking in each, or in a round, at most
    extension_words: tuple[str, ...] = ()  # one of which replaces the `</think>`
    linearise: int = 0  # tokens of linearised thinking from which cut traces go on, see `linearised`; 0: they do not
    rounds: int = 0  # how often

    def __post_init__(self):
        BudgetSchedule.from_prior(self.budgets)
        least_of = {"traces": 1, "answers": 1, "rows": 0, "temperature": 0.0, "extensions": 0, "linearise": 0}
        least_of |= {"extension_tokens": 1} if self.goes_on else {}
        for name, least in (least_of | ({"rounds": 1} if self.linearise else {})).items():
            if not getattr(self, name) >= least:
                raise ValueError(f"evaluation.{name}={getattr(self, name)}: it must be at least {least}")
        if self.extensions and self.linearise:
            raise ValueError(
                f"evaluation.extensions={self.extensions} with evaluation.linearise={self.linearise}: thinking goes on "
                "in one way, extensions or rounds; choose 0 for the other"
            )
        if self.extensions and not self.extension_words:
            raise ValueError(
                f"evaluation.extensions={self.extensions} with extension_words=(): name words that go on, such as "
                "('\\nWait', '\\nBut wait'), or of an embedded task words of its vocabulary"
            )
        if self.episodes is not None:
            episodes.of_section(self.episodes, None, self.budgets[-1])
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"evaluation.seed={self.seed}: seeds lie in [0, 2**32)")
        if self.temperature == 0 and (self.traces > 1 or self.answers > 1):
            raise ValueError(
                f"evaluation.temperature=0 with traces={self.traces}, answers={self.answers}: greedy samples are all "
                "alike; choose 1 and 1, or a positive temperature"
            )

    @classmethod
    def from_config(cls, config, rows: int = 0) -> "Options":
        """Of a configuration's section `evaluation`, without extensions and rounds: those are the page's only."""
        return cls(
            budgets=tuple(config.budgets),
            traces=config.traces,
            answers=config.answers,
            temperature=config.temperature,
            seed=config.seed,
            rows=rows,
        )

    @property
    def goes_on(self) -> bool:
        """Whether there is thinking after the last budget, in extensions or in rounds."""
        return bool(self.extensions or self.linearise)

    @property
    def columns(self) -> tuple[int, ...]:
        """Of the results' columns, in their order: budgets in tokens, or numbers of episodes; 0 for a start."""
        found = self.budgets
        if self.episodes is not None:
            size = episodes.of_section(self.episodes, None, self.budgets[-1]).size
            found = tuple(range(1, size + 1))
        return (0, *found) if self.start else found

    def for_page(self, config) -> "Options":
        """These, with what only the page does of a configuration: answers after episodes, the start, what goes on."""
        wanted = config.evaluation
        if wanted.forks not in episodes.RULES:
            raise ValueError(f"evaluation.forks={wanted.forks!r} is unknown: choose one of {episodes.RULES}")
        changes = {"start": wanted.start}
        if wanted.forks != "budgets":
            changes["episodes"] = config.episodes.to_dict() | {"rule": wanted.forks}
        if wanted.extensions:
            changes |= {name: wanted[name] for name in ("extensions", "extension_tokens")}
            changes["extension_words"] = tuple(wanted.extension_words)
        if wanted.linearise:
            changes |= {name: wanted[name] for name in ("linearise", "rounds", "extension_tokens")}
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of every answer of one set, on the host. A start counts among the S columns."""

    correct: np.ndarray  # f32[B, n, S, A]
    formatted: np.ndarray  # bool[B, n, S, A]
    vote: np.ndarray  # i32[B, n, S, A], equal for equal answers of a problem: 0 right, -1 none
    answer_length: np.ndarray  # i32[B, n, S, A], sampled tokens
    inserted: np.ndarray  # i32[B, n, S], tokens before them
    forks: np.ndarray  # i32[B, n, S]
    length: np.ndarray  # i32[B, n]
    ended: np.ndarray  # bool[B, n], with `</think>`
    prompt_length: np.ndarray  # i32[B]
    id: np.ndarray  # u32[B]
    grading: dict[str, int]  # answers that were judged in each way
    seconds: float = 0.0  # spent on sampling and grading
    new_tokens: int = 0  # sampled in these seconds, by all processes; the others were read back
    extended: "Evaluation | None" = None  # its columns: the trace's end, then after each extension or round

    @property
    def tokens(self) -> int:
        """Sampled, of traces and answers; without what went on."""
        return int(self.length.sum()) + int(self.answer_length.sum())


ARRAYS = tuple(field.name for field in dataclasses.fields(Evaluation))[:-4]


@dataclasses.dataclass(frozen=True)
class Part:
    """What a shard samples in one rollout: all traces of some problems, or some traces of one problem."""

    number: int
    problems: range
    traces: range


def default_rows(settings: Settings, options: Options, problems: int) -> int:
    """Traces of a part: those that take about half of a device's memory, at most 256; at most an even share of
    `problems` for each shard of the context's mesh.

    Counted for each trace: the KV of a prompt, of the trace and of its answers; three arrays of logits at the answers;
    one layer's attention scores of the answers (or of the prompt's prefill). An extension's prompt holds the trace, a
    round's its window.
    """
    model, size = settings.model, len(options.columns) * options.answers
    prompt, trunk = settings.prompt_pad, settings.prompt_pad + options.budgets[-1]
    if options.goes_on:
        prompt = (linearised if options.linearise else extrapolation).prompt_pad(settings, options)
        trunk = max(trunk, prompt + options.extension_tokens)
    width = 2 * jnp.dtype(model.dtype).itemsize * model.num_layers * model.num_kv_heads * model.head_dim
    kv = width * (trunk + size * settings.answer_pad)
    scores = 4 * model.num_heads * max(size * trunk, prompt**2)
    device = jax.local_devices()[0].memory_stats() or {}
    memory = device.get("bytes_limit", UNKNOWN_MEMORY) // 2
    share = -(-problems // sharding.whole_rows(1)) * options.traces
    return int(np.clip(memory // (kv + 3 * 4 * size * model.vocab_size + scores), 1, min(MOST_ROWS, share)))


def parts(problems: int, traces: int, rows: int) -> Iterator[Part]:
    """Parts of at most `rows` traces, in the order of problems and traces."""
    pieces = -(-traces // rows)
    group = -(-traces // pieces)  # traces of a problem in a rollout: as even as can be
    batch = max(rows // group, 1) if pieces == 1 else 1
    number = 0
    for begin in range(0, problems, batch):
        for first in range(0, traces, group):
            yield Part(number, range(begin, min(begin + batch, problems)), range(first, min(first + group, traces)))
            number += 1


def rounds(todo: Sequence[Part], shards: int) -> Iterator[list[Part]]:
    """At most `shards` parts at a time, which one rollout samples: their traces have the same numbers."""
    for first in sorted({part.traces.start for part in todo}):
        alike = [part for part in todo if part.traces.start == first]
        for begin in range(0, len(alike), shards):
            yield alike[begin : begin + shards]


def evaluate(
    settings: Settings,
    params: Params,
    problems: Sequence[Problem],
    options: Options,
    *,
    folder: epath.Path | None = None,
    on_part: Callable[[int, float], None] = lambda traces, accuracy: None,
    poll: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Samples and scores `options.traces` traces of every problem, `options.answers` answers of each at every budget.

    Args:
      settings: of the run; its rollout gives the tokens that are inserted.
      params: of the model, on the context's mesh. With several processes it has all their devices.
      problems: at least one; their prompts fit.
      options: what is sampled.
      folder: where the completions are kept, of all processes. Parts that are there are read back, not sampled again.
      on_part: called after every part with its number of traces and its accuracy at the last budget.
      poll: called between the segments of a rollout and at its end; what it raises ends the evaluation.

    Returns:
      The scores, on every process: the same, to the bit, whether parts were read back or not.
    """
    if not len(problems):
        raise ValueError("there are no problems to evaluate")
    rows = options.rows or default_rows(settings, options, len(problems))
    # Whole before anything else is begun: collectives of two programs may meet in another order on another process.
    params = jax.block_until_ready(rollout.weights(settings.model, params))
    plan = list(parts(len(problems), options.traces, rows))
    config = dataclasses.replace(
        settings.rollout,
        group_size=len(plan[0].traces),
        trace_pad=int(options.budgets[-1]),
        slots=0,  # a part has the rows that fit
        answer_slots=0,
        answers=options.answers,
        sample=SampleConfig(temperature=options.temperature),
    )
    found, extended, seconds, new_tokens = {}, {}, 0.0, 0

    def add(part, lines):
        found[part.number] = columns = completions.columns(lines)
        if options.goes_on:
            extended[part.number] = continuing.columns(lines)
        on_part(len(lines), float(columns["correct"][:, -1].mean()))

    there = completions.parts_in(folder) if folder else ()
    for part in plan:
        if folder and (path := completions.part_path(folder, part.number)).name in there:
            add(part, _read_back(path, part, problems))
    todo = [part for part in plan if part.number not in found]
    for together in rounds(todo, sharding.whole_rows(1)):
        begin = time.perf_counter()
        warm = together[0] is not todo[0]
        mine = _sample(settings, config, params, problems, together, len(plan[0].problems), options, poll, warm)
        for number, lines in mine.items() if folder else ():
            completions.write(completions.part_path(folder, number), lines)
        everyone = completions.gather(mine)
        seconds += time.perf_counter() - begin
        for part in together:
            add(part, everyone[part.number])
            new_tokens += int(sum(found[part.number][name].sum() for name in ("length", "answer_length")))
            new_tokens += continuing.sampled(everyone[part.number]) if options.goes_on else 0
        poll()
    result = _assemble([found[part.number] for part in plan], len(problems), seconds, new_tokens)
    if not options.goes_on:
        return result
    return dataclasses.replace(
        result, extended=_assemble([extended[part.number] for part in plan], len(problems), 0.0, 0)
    )


def _sample(settings, config, params, problems, together, size, options, poll, warm) -> dict[int, list[dict]]:
    """The lines of those parts of a round that this process has, by number.

    Every shard has room for `size` problems; repeated problems, traces and parts only fill it. Unless `warm`, what
    longer traces need is compiled first.
    """
    shards = sharding.whole_rows(1) // jax.process_count()  # those of a process are consecutive
    first = jax.process_index() * shards
    mine = together[first : first + shards]
    filled = [*mine, *together[-1:] * (shards - len(mine))]
    batches = [
        next(data.evaluation_batches(_of(part, problems), settings.tokenizer, size, settings.prompt_pad))
        for part in filled
    ]
    prompts = jax.tree.map(lambda *x: np.concatenate(x), *[batch.prompts for batch in batches])
    on_device = sharding.put_rows(prompts)
    key = sharding.put(jax.random.fold_in(jax.random.key(options.seed), STREAM))
    numbers = together[0].traces
    cuts = _cuts(options, settings.tokenizer)
    if not warm and len(config.buckets) > 1:
        rollout.compile_all(settings.model, config, params, on_device, key, cuts)
    sampled = rollout.sample(settings.model, config, params, on_device, key, cuts, numbers.start, poll)
    local = sharding.local_rows(sampled[:3])
    if options.start:
        local = (local[0], *jax.tree.map(lambda x: np.roll(x, 1, axis=1), local[1:]))
    extensions = []
    if options.goes_on:
        go_on = linearised.go_on if options.linearise else extrapolation.extend
        extensions = go_on(settings, config, params, prompts, local[0], numbers.start, options, poll)
    if not mine:
        return {}

    # Without what only fills; rows are of a shard's problems, rows of the rollout of their traces.
    rows = np.concatenate([size * shard + np.arange(len(part.problems)) for shard, part in enumerate(mine)])
    of_trace = (rows[:, None] * config.group_size + np.arange(len(numbers))).reshape(-1)
    traces, forks, answers = jax.tree.map(lambda x: x[of_trace], local)
    chosen = [problem for part in mine for problem in _of(part, problems)]
    names = [name for part in mine for name in _names(part, problems)]
    if options.ids:
        names = [name | {"prompt": problems[name["index"]].prompt} for name in names]
    length = np.repeat(prompts.length[rows], len(numbers))

    def lines_of(*sampled):
        graded = grading.grade(settings.task, settings.tokenizer, chosen, *sampled)
        return completions.lines(settings.tokenizer, names, length, *sampled, graded, options.ids)

    extensions = [continuing.take(extension, of_trace) for extension in extensions]
    continued = [(one, lines_of(one.traces, one.forks, one.answers)) for one in extensions]
    lines = iter(continuing.lines_with(lines_of(traces, forks, answers), continued))
    return {part.number: list(itertools.islice(lines, len(part.problems) * len(numbers))) for part in mine}


def _cuts(options: Options, tokenizer) -> rollout.Cuts:
    """The start comes last, so that the samples at the other cuts do not depend on it."""
    tokens = np.array([*options.budgets, 0] if options.start else options.budgets, np.int32)
    if options.episodes is None:
        weights = np.full(tokens.shape, 1 / tokens.size, np.float32)
        return rollout.Cuts(sharding.put(BudgetSchedule(tokens=tokens, weights=weights)))
    found = episodes.of_section(options.episodes, tokenizer, options.budgets[-1])

    def rule(tokens, length):
        return np.pad(found(tokens, length), ((0, 0), (0, int(options.start))))

    return rollout.Cuts(sharding.put(BudgetSchedule.from_weights(np.ones(len(options.columns)))), rule=rule)


def _of(part: Part, problems: Sequence[Problem]) -> list[Problem]:
    return [problems[i] for i in part.problems]


def _names(part: Part, problems: Sequence[Problem]) -> list[dict]:
    return [{"id": int(problems[i].id), "index": i, "trace": t} for i in part.problems for t in part.traces]


def _read_back(path, part, problems) -> list[dict]:
    lines, names = completions.read(path), _names(part, problems)
    if [{name: line.get(name) for name in ("id", "index", "trace")} for line in lines] != names:
        raise ValueError(f"{path} does not hold the {len(names)} traces of its part: remove it, and they are sampled.")
    return lines


def _assemble(found: list[completions.Columns], problems: int, seconds: float, new_tokens: int) -> Evaluation:
    columns = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    columns = {name: x.reshape(problems, -1, *x.shape[1:]) for name, x in columns.items()}
    how, answer = columns.pop("how"), columns.pop("answer")
    columns |= {name: columns[name][:, 0] for name in ("id", "prompt_length")}
    return Evaluation(
        **columns,
        vote=votes(columns["correct"], answer),
        grading=dict(sorted(Counter(how.ravel().tolist()).items())),
        seconds=seconds,
        new_tokens=new_tokens,
    )


def votes(correct: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Classes of equal answers, problem by problem, for majority votes: i32[B, ...].

    All answers that scored are one class, 0; the others are told apart by their normal form, from 1 on; -1 where no
    answer was found. Wrong answers that are equal in value and differ in normal form are two classes.
    """
    found = np.full(correct.shape, -1, np.int32)
    for b in range(len(correct)):
        classes = {}
        flat = zip(correct[b].ravel().tolist(), answer[b].ravel().tolist())
        kinds = [0 if right else classes.setdefault(text, len(classes) + 1) if text else -1 for right, text in flat]
        found[b] = np.reshape(kinds, correct.shape[1:])
    return found


def save(path: epath.Path, sets: dict[str, Evaluation]) -> None:
    """All sets as one compressed .npz: the arrays of `Evaluation` one after the other, `set` i32[B] and `set_names`."""
    arrays = {name: np.concatenate([getattr(one, name) for one in sets.values()]) for name in ARRAYS}
    number = np.concatenate([np.full(len(one.id), i, np.int32) for i, one in enumerate(sets.values())])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays, set=number, set_names=np.array(list(sets)))
    path.write_bytes(buffer.getvalue())


def load(path: epath.Path) -> dict[str, Evaluation]:
    """What `save` has written; `grading` is empty. Raises ValueError if arrays are missing."""
    stored = np.load(io.BytesIO(path.read_bytes()))
    missing = sorted({*ARRAYS, "set", "set_names"} - set(stored.files))
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is of an older version; evaluate the run again.")
    arrays = {name: stored[name] for name in ARRAYS}
    return {
        str(name): Evaluation(**{key: x[stored["set"] == i] for key, x in arrays.items()}, grading={})
        for i, name in enumerate(stored["set_names"])
    }
