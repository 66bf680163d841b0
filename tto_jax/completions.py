"""Kept completions: what an evaluation has sampled and how it was graded, as compressed JSON lines in parts.

A part is what one shard of the rows samples in a rollout, and one process writes it: beside its place, then renamed, so
that what lies there is whole, and an evaluation that was killed goes on from its parts, with as many processes as there
are then. One line a trace:

    id, index              of the problem: its hash, its place in the set
    trace                  number of the trace, from 0
    prompt_tokens, tokens  of the prompt; of the trace, its stop token included
    ended, eos             stopped thinking by itself; ended with EOS instead (neither: cut at the last budget)
    text                   the trace
    forks, inserted        at each budget: tokens of the trace before the answers; tokens inserted there
    answers                at each budget, one object an answer: text, answer (as extracted, in normal form; empty:
                           none), correct (the score, 0 or 1), formatted, tokens (sampled, EOS included), how (what
                           judged it: text, symbolic, timeout, crash)
    prompt, ids            only where they are asked for: the problem's text, and the tokens of the trace; an answer has
                           ids, too: the inserted tokens, then the sampled ones
    extensions             only where thinking went on after the last budget: one object an extension, or a round, with
                           word (what replaced `</think>`; empty: nothing), seen (tokens of the thinking before, or of
                           its linearised window, that followed the prompt), text (what followed), sampled (its
                           tokens), tokens (of all thinking up to its end), ended, eos, inserted and the list answers
"""

import dataclasses
import gzip
import hashlib
import json
import uuid
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from tto_jax import checkpoint
from tto_jax.core.types import Answers, Traces
from tto_jax.grading import Graded
from tto_jax.models.decoder import Params
from tto_jax.settings import Settings
from tto_jax.tasks import Problem
from tto_jax.tokenizer import Tokenizer

Columns = dict[str, np.ndarray]  # one row a trace

_MIXER = np.uint32(2 * 0x4F1BBCDD)  # even, so that a place's factor is odd: a changed bit always shows modulo 2**32


def part_path(folder: epath.Path, number: int) -> epath.Path:
    """Where part `number` of a set lies."""
    return folder / f"{number:05d}.jsonl.gz"


def lines(
    tokenizer: Tokenizer,
    names: Sequence[dict],
    prompt_length: np.ndarray,
    traces: Traces,
    forks: np.ndarray,
    answers: Answers,
    graded: Graded,
    ids: bool = False,
) -> list[dict]:
    """The lines of N traces.

    Args:
      tokenizer: decodes the traces.
      names: N dicts of id, index and trace.
      prompt_length: i32[N].
      traces, forks, answers: N rows of the rollout, on the host.
      graded: of these rows, [B, G, S, A] with B G = N.
      ids: tokens are kept beside texts.
    """
    shape = np.shape(answers.length)  # [N, S, A]
    text_of, verdict_of = graded.text_of.reshape(shape), graded.verdict_of.reshape(shape)
    correct, formatted = graded.scores.correct.reshape(shape), graded.scores.formatted.reshape(shape)
    sampled = answers.length - answers.forced[..., None]

    def tokens(row, length) -> dict:
        return {"ids": row[:length].tolist()} if ids else {}

    def answer(at) -> dict:
        verdict = graded.verdicts[verdict_of[at]]
        return tokens(answers.tokens[at], answers.length[at]) | {
            "text": graded.texts[text_of[at]],
            "answer": verdict.answer,
            "correct": int(correct[at]),
            "formatted": bool(formatted[at]),
            "tokens": int(sampled[at]),
            "how": verdict.how,
        }

    return [
        name
        | tokens(traces.tokens[n], traces.length[n])
        | {
            "prompt_tokens": int(prompt_length[n]),
            "tokens": int(traces.length[n]),
            "ended": bool(traces.ended[n]),
            "eos": bool(traces.eos[n]),
            "text": tokenizer.decode(traces.tokens[n, : traces.length[n]].tolist()),
            "forks": forks[n].tolist(),
            "inserted": answers.forced[n].tolist(),
            "answers": [[answer((n, s, a)) for a in range(shape[2])] for s in range(shape[1])],
        }
        for n, name in enumerate(names)
    ]


def columns(found: Sequence[dict]) -> Columns:
    """The lines as arrays, texts left out: the one way from completions to numbers, fresh or read back."""
    each = lambda name: [[[a[name] for a in column] for column in line["answers"]] for line in found]  # noqa: E731
    of = lambda name, dtype: np.array([line[name] for line in found], dtype)  # noqa: E731
    return {
        "id": of("id", np.uint32),
        "prompt_length": of("prompt_tokens", np.int32),
        "length": of("tokens", np.int32),
        "ended": of("ended", bool),
        "forks": of("forks", np.int32),
        "inserted": of("inserted", np.int32),
        "correct": np.array(each("correct"), np.float32),
        "formatted": np.array(each("formatted"), bool),
        "answer_length": np.array(each("tokens"), np.int32),
        "answer": np.array(each("answer"), object),
        "how": np.array(each("how"), object),
    }


def write(path: epath.Path, found: Sequence[dict]) -> None:
    """One part, at once or not at all."""
    text = "".join(json.dumps(line) + "\n" for line in found)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{path.name}.tmp-{uuid.uuid4().hex[:8]}"
    temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
    temporary.replace(path)


def read(path: epath.Path) -> list[dict]:
    """The lines of one part. Raises ValueError if it is damaged."""
    try:
        return [json.loads(line) for line in gzip.decompress(path.read_bytes()).split(b"\n") if line]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and its part is sampled again.") from error


def parts_in(folder: epath.Path) -> set[str]:
    """Names of the parts of a set, as process 0 sees them. With several processes all must call."""
    seen = sorted(path.name for path in folder.glob("*.jsonl.gz")) if folder.exists() else []
    return set(_gather(seen)[0])


def gather(mine: dict[int, list[dict]]) -> dict[int, list[dict]]:
    """The lines of all processes, by part, on every process; texts, which `columns` does not need, are left out.

    With several processes all must call.
    """
    if jax.process_count() == 1:
        return mine

    def short(value):
        if isinstance(value, dict):
            return {key: "" if key == "text" else short(x) for key, x in value.items() if key not in ("ids", "prompt")}
        return [short(x) for x in value] if isinstance(value, list) else value

    everyone = _gather([[number, [short(line) for line in found]] for number, found in mine.items()])
    return {number: found for theirs in everyone for number, found in theirs}


def _gather(value: list) -> list[list]:
    """JSON-able lists of all processes, in their order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(gzip.compress(json.dumps(value).encode()), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)  # every other size would compile a program
    padded[: len(data)] = data
    everyone = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(gzip.decompress(theirs[:size].tobytes())) for theirs, size in zip(everyone, sizes)]


def claimed(folder: epath.Path) -> dict | None:
    """The identity of the parts in `folder/completions`, as `claim` wrote it; None if there are no parts."""
    path = folder / "options.json"
    return json.loads(path.read_text()) if path.exists() and any(folder.glob("completions/*/*.jsonl.gz")) else None


def kept_rows(folder: epath.Path) -> int:
    """The rows of the parts that lie in `folder`, so that an evaluation goes on with them; 0 if there are none."""
    have = claimed(folder)
    return have["options"]["rows"] if have else 0


def claim(folder: epath.Path, identity: dict) -> None:
    """Writes `folder/options.json`, or checks that the parts in `folder/completions` are of this evaluation.

    With several processes all check, and the first one writes. Raises ValueError, with every difference, if the parts
    are of another evaluation.
    """
    have = claimed(folder)
    if have is not None:
        if differ := checkpoint.differences(have, identity):
            raise ValueError(
                f"{folder} holds completions of another evaluation:\n  "
                + "\n  ".join(f"{name}: {there} there, {here} here" for name, there, here in differ)
                + f"\nGive --out=DIR, restore these options, or remove {folder}."
            )
    elif jax.process_index() == 0:
        path = folder / "options.json"
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{path.name}.tmp-{uuid.uuid4().hex[:8]}"
        temporary.write_text(json.dumps(identity, indent=2, sort_keys=True) + "\n")
        temporary.replace(path)


def identity(settings: Settings, params: Params, sets: dict[str, Sequence[Problem]], options, task: dict) -> dict:
    """Everything that decides the completions, the code left out; the mesh does not.

    settings, params: of the model. sets: problems by name. options: of the evaluation, a dataclass. task: the
    configuration's section.
    """
    tokenizer = settings.tokenizer
    return {
        "options": dataclasses.asdict(options),
        "sets": {name: {"problems": len(found), "sha256": digest(found)} for name, found in sets.items()},
        "task": task,
        "tokens": {
            "think_end": tokenizer.think_end_id,
            "eos": tokenizer.eos_id,
            "elicit_ended": tokenizer.elicit_ended,
            "elicit_cut": tokenizer.elicit_cut,
        },
        "model": dataclasses.asdict(
            dataclasses.replace(settings.model, kv_copies=1, branch_decode="")
        ),  # those follow the mesh
        "parameters": fingerprint(params),
    }


def digest(problems: Sequence[Problem]) -> str:
    """16 hexadecimal digits of the SHA-256 of ids, prompts and answers in order."""
    text = hashlib.sha256()
    for i in range(len(problems)):
        text.update(json.dumps(dataclasses.astuple(problems[i])).encode() + b"\n")
    return text.hexdigest()[:16]


def fingerprint(params: Params) -> str:
    """16 hexadecimal digits that change with any bit of the parameters; the same on every kind of device."""

    def checksum(leaf):
        bits = jax.lax.bitcast_convert_type(leaf, {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
        place = jax.lax.iota(jnp.uint32, leaf.size).reshape(leaf.shape)
        return jnp.sum(bits.astype(jnp.uint32) * (place * _MIXER + np.uint32(1)), dtype=jnp.uint32)

    named = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get(jax.jit(lambda leaves: [checksum(x) for x in leaves])([x for _, x in named]))
    facts = [(jax.tree_util.keystr(path), x.shape, str(x.dtype), int(n)) for (path, x), n in zip(named, sums)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
