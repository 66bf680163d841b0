"""The responses that an iteration of STaR learns: made of kept completions, a file under a checksum, read as examples.

A line of responses.jsonl.gz is one kept trace:

    id, index, trace       as the completion has them
    column                 number of the cut at which the kept part ends, from 0
    progress               of the kept part: J[column] - J[-1]
    lengths                tokens of the prompt, of the kept part of the trace, of what is inserted, of the answer
    tokens                 all of them
"""

import hashlib
import json
import uuid
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from tto_jax import completions, diagnostics, examples
from tto_jax.core import anytime, selection
from tto_jax.core.types import Scores
from tto_jax.evaluation import Evaluation
from tto_jax.settings import Settings
from tto_jax.tokenizer import Tokenizer

RESPONSES, RECORD = "responses.jsonl.gz", "selection.json"
_select = jax.jit(selection.select, static_argnums=4)


def folder_of(workdir: epath.Path, iteration: int) -> epath.Path:
    """Where an iteration's files lie."""
    return workdir / "iterations" / f"{iteration:04d}"


def completions_in(folder: epath.Path) -> epath.Path:
    """Where an iteration's completions lie."""
    return folder / "sampling" / "completions" / "train"


def parts(folder: epath.Path) -> list[epath.Path]:
    """Their files, in the order of the problems."""
    return sorted(completions_in(folder).glob("*.jsonl.gz"))


def exists(folder: epath.Path) -> bool:
    """Whether the responses of an iteration are there, whole."""
    return (folder / RECORD).exists()


def write(folder: epath.Path, settings: Settings, sampled: Evaluation, rule: selection.Rule) -> None:
    """Selects, and writes the responses and then what says that they are whole. With several processes all must call.

    Args:
      folder: of the iteration; its completions have their ids.
      settings: of the sampling.
      sampled: scores of these completions; the first column is the start.
      rule: which traces are kept.

    Raises:
      ValueError: no trace can be kept.
    """
    correct, forks = sampled.correct[:, :, 1:], sampled.forks[:, :, 1:]
    start = sampled.correct[:, :, 0].reshape(len(correct), -1)
    chosen = jax.device_get(_select(correct, forks, start, sampled.ended, rule))
    if not chosen.kept.any():
        raise ValueError(
            f"{folder}: none of the {chosen.kept.size:,} traces can be kept by {rule}: no answer is right; "
            "sample more problems or traces (star.problems, rollout.group_size), or start from a better model"
        )
    row = metrics(settings, sampled, chosen)
    if jax.process_index() == 0:
        kept = [
            response
            for part in map(completions.read, parts(folder))
            for response in _responses(part, settings.tokenizer, chosen)
        ]
        completions.write(folder / RESPONSES, kept)
        record = {"responses": len(kept), "sha256": _sha256(folder / RESPONSES), "row": row}
        temporary = folder / f"{RECORD}.tmp-{uuid.uuid4().hex[:8]}"
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        temporary.replace(folder / RECORD)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("selected")


def metrics(settings: Settings, sampled: Evaluation, chosen: selection.Selection) -> dict:
    """What an iteration says of its samples: scores at the start and at each cut, progress, what was kept."""
    correct, forks = sampled.correct[:, :, 1:], sampled.forks[:, :, 1:]
    scores, after = Scores(sampled.correct, sampled.formatted), sampled.inserted[..., None] + sampled.answer_length
    values = np.asarray(anytime.pooled_accuracy(correct, forks))
    start = sampled.correct[:, :, 0].mean()
    length = np.take_along_axis(forks, chosen.column[..., None], axis=-1)[..., 0]
    row = {
        **diagnostics.rollout_metrics(scores, sampled.length, sampled.ended, sampled.forks, settings.names, start=True),
        **diagnostics.progress_metrics(sampled.correct, sampled.forks, sampled.prompt_length, after, settings),
        "progress/mean": values[..., -1].mean() - start,
        "progress/best": values.max(axis=-1).mean() - start,
        "kept/traces": int(chosen.kept.sum()),
        "kept/share": chosen.kept.mean(),
        "kept/problems": chosen.kept.any(axis=1).mean(),
        "kept/length": length[chosen.kept].mean(),
        "kept/progress": chosen.progress[chosen.kept].mean(),
        "sampled/tokens": sampled.tokens,
    }
    return {name: None if value is None else np.asarray(value).item() for name, value in row.items()}


def _responses(lines: Sequence[dict], tokenizer: Tokenizer, chosen: selection.Selection) -> list[dict]:
    """The kept ones of a part."""
    found = []
    lines = [line for line in lines if chosen.kept[line["index"], line["trace"]]]
    for line, prompt in zip(lines, tokenizer.encode_prompts([line["prompt"] for line in lines])):
        at = line["index"], line["trace"]
        column = int(chosen.column[at])
        own, number = divmod(int(chosen.answer[at]), len(line["answers"][0]))
        fork, inserted = line["forks"][1 + column], line["inserted"][1 + own]
        answer = line["answers"][1 + own][number]["ids"]
        found.append(
            {
                **{name: line[name] for name in ("id", "index", "trace")},
                "column": column,
                "progress": float(chosen.progress[at]),
                "lengths": [len(prompt), fork, inserted, len(answer) - inserted],
                "tokens": [*prompt, *line["ids"][:fork], *answer],
            }
        )
    return found


def read(folder: epath.Path, row_length: int, train_inserted: bool) -> tuple[examples.Examples, dict]:
    """(examples, the metrics of the selection) as `write` left them; trained are trace and answer, never the prompt.

    Args:
      folder: of the iteration. row_length: tokens; longer responses are dropped.
      train_inserted: what was inserted between trace and answer is trained, too.

    Raises:
      ValueError: the responses are not what was written.
    """
    record = json.loads((folder / RECORD).read_text())
    if _sha256(folder / RESPONSES) != record["sha256"]:
        raise ValueError(
            f"{folder / RESPONSES} is not what was written: remove {folder / RECORD}, and it is made again of the "
            "completions"
        )
    pairs = []
    for response in completions.read(folder / RESPONSES):
        prompt, trace, inserted, _ = response["lengths"]
        place = np.arange(len(response["tokens"]))
        begin = prompt + trace
        is_inserted = (place >= begin) & (place < begin + inserted)
        trained = (place >= prompt) & (train_inserted | ~is_inserted)
        pairs.append((np.array(response["tokens"], np.int32), trained))
    return examples.collect(pairs, row_length), record["row"]


def _sha256(path: epath.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
