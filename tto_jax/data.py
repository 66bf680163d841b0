"""Problems and demonstrations as batches of token ids, on the host."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from tto_jax.core.types import Prompts
from tto_jax.tasks.problem import EmbeddedTask, Problem, check_split
from tto_jax.tokenizer import Tokenizer

# Keeps the stream of demonstrations apart from other uses of the same seed.
_DEMONSTRATION_STREAM = 0xDE30
_TOKENIZED_AT_ONCE = 1024  # prompts: bounds the memory of `drop_overlong`


@dataclasses.dataclass(frozen=True)
class ProblemSource:
    """The first `size` problems of a task's split, by index."""

    task: EmbeddedTask
    split: str
    size: int

    def __post_init__(self):
        check_split(self.split)
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} must be in 0..{self.size - 1}")
        return self.task.problem(int(index), self.split)


@dataclasses.dataclass(frozen=True)
class FilteredSource(Sequence[Problem]):
    """Some problems of a source, in its order."""

    source: Sequence[Problem]
    indices: tuple[int, ...]  # ascending

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Problem:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Problem]:
        """Several at once."""
        for index in indices:
            if not 0 <= index < len(self.indices):
                raise IndexError(f"index {index} must be in 0..{len(self.indices) - 1}")
        return _read(self.source, [self.indices[index] for index in indices])


def drop_overlong(source: Sequence[Problem], tokenizer: Tokenizer, prompt_pad: int) -> tuple[Sequence[Problem], int]:
    """The problems whose prompts have at most `prompt_pad` tokens, in their order, and how many were dropped.

    Every prompt is tokenized once; the source itself comes back if nothing is dropped. Raises ValueError if nothing
    remains.
    """
    _check_positive(prompt_pad=prompt_pad)
    _check_some(source)
    lengths = []
    for start in range(0, len(source), _TOKENIZED_AT_ONCE):
        problems = _read(source, range(start, min(start + _TOKENIZED_AT_ONCE, len(source))))
        lengths += [len(row) for row in tokenizer.encode_prompts([problem.prompt for problem in problems])]
    kept = tuple(i for i, length in enumerate(lengths) if length <= prompt_pad)
    if not kept:
        raise ValueError(
            f"prompt_pad={prompt_pad}: none of the {len(lengths)} prompts fits, the shortest has {min(lengths)} tokens"
        )
    dropped = len(lengths) - len(kept)
    return (FilteredSource(source, kept) if dropped else source), dropped


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some problems, as text and as token ids."""

    problems: tuple[Problem, ...]  # B of them
    prompts: Prompts  # numpy arrays
    valid: np.ndarray  # bool[B], False: a repeated problem that only fills the last batch of an evaluation


def problem_batches(
    source: Sequence[Problem],
    tokenizer: Tokenizer,
    batch_size: int,
    prompt_pad: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator[Batch]:
    """Endless training batches; every epoch is shuffled anew.

    Problems are repeated before they are batched: nothing is dropped, a batch may span two epochs (or more, where
    `batch_size` exceeds the source). `get_state()` is a small dict of numbers; `set_state()` resumes exactly after the
    batch that was last returned. The state counts batches of all hosts together: it is the same on every host, and a
    run may resume with another number of hosts.

    Args:
        source: problems by index.
        tokenizer: encodes the prompts.
        batch_size: B, of all hosts together.
        prompt_pad: P; a longer prompt is an error (see `drop_overlong`).
        seed: of the shuffles, in 0..2**32 - 1.
        shard: (index of this host, number of hosts). A host reads and returns B / number consecutive problems of the
            batch; those of all hosts in their order are the batch of a single host.

    Returns:
        An iterator with a state.
    """
    _check_positive(batch_size=batch_size, prompt_pad=prompt_pad)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be in 0..2**32 - 1")
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard={shard} must be (index, count) with index in 0..count - 1")
    if batch_size % count:
        raise ValueError(f"batch_size={batch_size} must be divisible by the number of hosts, {count}")
    _check_some(source)
    size = batch_size // count
    make = functools.partial(
        _host_batch, source=source, first=index * size, size=size, tokenizer=tokenizer, pad=prompt_pad
    )
    # Indices are shuffled and batched, not problems: a host reads its own only.
    dataset = grain.MapDataset.range(len(source)).shuffle(seed).repeat().batch(batch_size, batch_fn=make)
    # No threads: a problem is cheap to make, and threads would compete with the step for the interpreter.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def evaluation_batches(
    source: Sequence[Problem], tokenizer: Tokenizer, batch_size: int, prompt_pad: int
) -> Iterator[Batch]:
    """Every problem once, in order; the last batch is filled with its last problem, marked in `valid`."""
    _check_positive(batch_size=batch_size, prompt_pad=prompt_pad)
    return _evaluation_batches(source, tokenizer, batch_size, prompt_pad)


def demonstration_length(task: EmbeddedTask) -> int:
    """Most tokens of a warm-start example: prompt, thinking, `</think>`, the elicitation's word, answer."""
    return task.max_prompt_tokens + task.max_trace_tokens + 2 + task.max_answer_tokens


def demonstration_batch(
    task: EmbeddedTask, tokenizer: Tokenizer, seed: int, step: int, batch_size: int, row_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Warm-start examples: fresh problems of the training split, each with one demonstration.

    Args:
        task: makes the problems and the demonstrations; one token per word.
        tokenizer: of this task.
        seed: of the run.
        step: of the warm start; (seed, step) decides everything.
        batch_size: n.
        row_length: T; a longer example is an error.

    Returns:
        tokens: i32[n, T], prompt and demonstration, right-padded.
        length: i32[n].
        target_mask: bool[n, T], True for tokens that are trained: never the prompt, masked tokens or padding.
    """
    _check_positive(batch_size=batch_size, row_length=row_length)
    rng = np.random.default_rng([_DEMONSTRATION_STREAM, seed, step])
    ids = tokenizer.ids
    rows, targets = [], []
    for _ in range(batch_size):
        problem = task.sample(rng, "train")
        demonstration = task.demonstration(problem, rng)
        prompt = problem.prompt.split()
        rows.append([ids[word] for word in (*prompt, *demonstration.text.split())])
        targets.append([False] * len(prompt) + [not masked for masked in demonstration.masked])
    tokens, length = pad_right(rows, row_length, tokenizer.pad_id, "row_length", np.int32)
    target_mask, _ = pad_right(targets, row_length, False, "row_length", np.bool_)
    return tokens, length, target_mask


def _evaluation_batches(
    source: Sequence[Problem], tokenizer: Tokenizer, batch_size: int, prompt_pad: int
) -> Iterator[Batch]:
    # Apart from the public function, so that a wrong argument raises at the call and not at the first batch.
    for start in range(0, len(source), batch_size):
        problems = _read(source, range(start, min(start + batch_size, len(source))))
        missing = batch_size - len(problems)
        batch = _collate(problems + problems[-1:] * missing, tokenizer=tokenizer, pad=prompt_pad)
        yield dataclasses.replace(batch, valid=np.arange(batch_size) < len(problems))


def _host_batch(
    indices: Sequence[int], source: Sequence[Problem], first: int, size: int, tokenizer: Tokenizer, pad: int
) -> Batch:
    """The batch of `size` of the indices, from `first` on."""
    return _collate(_read(source, indices[first : first + size]), tokenizer, pad)


def _read(source: Sequence[Problem], indices: Sequence[int]) -> list[Problem]:
    """Problems by index, in one call where the source has one for several."""
    indices = [int(i) for i in indices]
    return source.__getitems__(indices) if hasattr(source, "__getitems__") else [source[i] for i in indices]


def _collate(problems: Sequence[Problem], tokenizer: Tokenizer, pad: int) -> Batch:
    """Problems as one batch, prompts padded on the right to `pad` tokens."""
    rows = tokenizer.encode_prompts([problem.prompt for problem in problems])
    tokens, length = pad_right(rows, pad, tokenizer.pad_id, "prompt_pad", np.int32)
    prompts = Prompts(tokens=tokens, length=length, id=np.array([problem.id for problem in problems], np.uint32))
    return Batch(problems=tuple(problems), prompts=prompts, valid=np.ones(len(problems), bool))


def pad_right(rows: list[list], width: int, fill, name: str, dtype) -> tuple[np.ndarray, np.ndarray]:
    """(padded [n, width], length i32[n]); `name` is the caller's name of `width`."""
    length = np.array([len(row) for row in rows], np.int32)
    if length.max() > width:
        raise ValueError(f"a row of {length.max()} tokens does not fit: {name}={width} must be at least its length")
    padded = np.array([row + [fill] * (width - len(row)) for row in rows], dtype)
    return padded, length


def _check_some(source: Sequence[Problem]) -> None:
    if not len(source):
        raise ValueError("the source has no problems")


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
