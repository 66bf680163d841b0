"""Examples of backtracking: python -m tto_jax.backtracking --run=RUN --scheme=tree --out=FILE.jsonl [--columns=suffix]

Reads what an iteration of `python -m tto_jax.star` has sampled, traces with the scores of answers forced at their
prefixes, and writes solutions that take steps back (`tasks.backtracking` says how), a line an example, in the columns
that `python -m tto_jax.sft` reads: a model that cannot backtrack by itself is warm-started with them.
"""

import argparse
import itertools
import json
import random
import sys
import uuid
from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from tto_jax import completions, inputs, pretrained, selected, solutions
from tto_jax.solutions import Solution
from tto_jax.tokenizer import Tokenizer

COLUMNS = ("suffix", "messages")


def main(argv: Sequence[str] | None = None) -> None:
    """The page."""
    flags = _parser().parse_args(argv)
    try:
        if flags.most < 0:
            raise ValueError(f"--most={flags.most}: examples of a problem at most, 0 for all of them")
        tokenizer = tokenizer_of(epath.Path(flags.run))
        problems = read(selected.folder_of(epath.Path(flags.run), flags.iteration))
        found, dropped = build(problems, tokenizer, flags.scheme, flags.seed, flags.most)
        records = [record(tokenizer, prompt, solution, flags.columns) for prompt, solution in found]
        write(epath.Path(flags.out), records)
    except (OSError, ValueError) as error:
        sys.exit(f"backtracking: {error}")
    used = len({prompt for prompt, _ in found})
    print(
        f"{len(records):,} examples of {used:,} of {len(problems):,} problems in {flags.out}; {dropped:,} traces left "
        "out: a step says nothing, or would be read as something else"
    )


def tokenizer_of(run: epath.Path) -> Tokenizer:
    """The tokenizer of a run, with its prompting. Raises ValueError if it is no run on texts."""
    if not (run / "config.json").exists():
        raise ValueError(f"--run={run} holds no config.json: give the workdir of `python -m tto_jax.star`")
    config = ConfigDict(json.loads((run / "config.json").read_text()))
    if not inputs.is_pretrained(config):
        raise ValueError(f"--run={run}: the words of task {config.task.name!r} have none for steps; choose a math run")
    return Tokenizer.from_pretrained(pretrained.find(run).tokenizer_dir, inputs.prompting_of(config.task))


def read(folder: epath.Path) -> list[list[dict]]:
    """The completions of an iteration, problem by problem. Raises ValueError if there are none with ids."""
    lines = [line for part in selected.parts(folder) for line in completions.read(part)]
    if not lines or "ids" not in lines[0]:
        raise ValueError(f"{folder} holds no sampled traces with their tokens: run `python -m tto_jax.star` first")
    return [list(of) for _, of in itertools.groupby(lines, key=lambda line: line["index"])]


def build(
    problems: Sequence[Sequence[dict]], tokenizer: Tokenizer, scheme: str, seed: int, most: int
) -> tuple[list[tuple[str, Solution]], int]:
    """((problem's text, solution) of all problems, traces that were left out); at most `most` of each, 0: all.

    What is chosen for a problem depends on the seed and on the problem's traces alone.
    """
    found, dropped = [], 0
    for lines in problems:
        paths = [path for line in lines if (path := solutions.path_of(line, tokenizer))]
        dropped += len(lines) - len(paths)
        rng = random.Random(f"{seed} {lines[0]['id']}")
        made = solutions.build(paths, scheme, rng)
        made = rng.sample(made, min(most, len(made))) if most else made
        found += [(lines[0]["prompt"], solution) for solution in made]
    if not found:
        raise ValueError(f"none of {len(problems):,} problems gives an example by {scheme!r}: sample more traces")
    return found, dropped


def record(tokenizer: Tokenizer, problem: str, solution: Solution, columns: str) -> dict:
    """A line of the file: the prompt as in sampling, then the solution, all of it learned or the last attempt alone."""
    before, last = solution.texts()
    about = {"traces": list(solution.traces), "keep": solution.attempts[-1].keep}
    messages = tokenizer.messages(problem)
    if columns == "suffix":
        return {"messages": messages, "prefix": before, "suffix": last, **about}
    return {"messages": [*messages, {"role": "assistant", "content": before + last}], **about}


def write(path: epath.Path, records: Sequence[dict]) -> None:
    """The file, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{path.name}.tmp-{uuid.uuid4().hex[:8]}"
    temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in records))
    temporary.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tto_jax.backtracking", description=__doc__.split("\n\n")[1])
    parser.add_argument("--run", required=True, metavar="RUN", help="workdir of `python -m tto_jax.star`, on texts")
    parser.add_argument("--iteration", type=int, default=1, help="whose samples are used; default: the first")
    parser.add_argument("--scheme", required=True, choices=solutions.SCHEMES, help="how examples are made")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines")
    parser.add_argument(
        "--columns", choices=COLUMNS, default="suffix", help="suffix: the last attempt alone is learned"
    )
    parser.add_argument("--most", type=int, default=0, help="examples of a problem at most; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of what is chosen at random")
    return parser


if __name__ == "__main__":
    main()
