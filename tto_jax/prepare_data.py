"""Prepare problems: python -m tto_jax.prepare_data --files=A.json,B.jsonl --out=data/math_train [--skip_broken]

Reads JSON lists and JSON-lines files, checks every record, and writes a folder that training and evaluation open. What
is wrong is reported with file and line. Nothing is downloaded.
"""

import argparse
import sys
from collections.abc import Sequence

from tto_jax import problem_files, problem_sets

_SHOWN = 20


def main(argv: Sequence[str] | None = None) -> None:
    """The page."""
    flags = _parser().parse_args(argv)
    try:
        contents = problem_files.read_files(
            flags.files,
            question=flags.question,
            answer=flags.answer,
            answer_after=flags.answer_after,
            skip_broken=flags.skip_broken,
        )
        prepared = problem_sets.write_set(contents, flags.out, name=flags.name, overwrite=flags.overwrite)
    except (OSError, ValueError) as error:
        sys.exit(f"prepare_data: {error}")
    print(summary(contents, prepared))


def summary(contents: problem_files.Contents, prepared: problem_sets.ProblemSet) -> str:
    """What was kept, what was not, and where the set is."""
    problems = [record.problem for record in contents.records]
    alternatives = [len(problem.answers) for problem in problems]
    longest = max(contents.records, key=lambda record: len(record.problem.prompt))
    several = sum(count > 1 for count in alternatives)
    lines = {
        "problems": f"{len(problems):,} of {', '.join(contents.files)}",
        "answers": f"{sum(alternatives):,}; {several:,} problems have several, at most {max(alternatives)}",
        "longest": f"{len(longest.problem.prompt):,} characters, {longest.file}:{longest.line}",
        "twice": f"{contents.duplicates:,} records with a question and answers that an earlier one has, left out",
        "skipped": f"{len(contents.skipped):,} broken records",
        "name": prepared.name,
        "content": prepared.fingerprint,
        "written": prepared.path,
    }
    text = [f"{name:9} {value}" for name, value in lines.items()]
    text += [f"skipped   {reason}" for reason in contents.skipped[:_SHOWN]]
    if len(contents.skipped) > _SHOWN:
        text.append(f"and {len(contents.skipped) - _SHOWN:,} more skipped, all listed in {prepared.path}/metadata.json")
    return "\n".join(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tto_jax.prepare_data", description=__doc__.split("\n\n")[1])

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser.add_argument("--files", required=True, type=names, metavar="A,B", help="JSON lists and JSON-lines files")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the set is written")
    parser.add_argument("--name", default="", help="what reports call the set; default: the folder's name")
    choices = "default: the one a file has of"
    parser.add_argument("--question", help=f"field of the question; {choices} {problem_files.QUESTION_FIELDS}")
    parser.add_argument("--answer", help=f"field of the answer; {choices} {problem_files.ANSWER_FIELDS}")
    parser.add_argument("--answer_after", metavar="TEXT", help="the answer follows TEXT, such as '####'")
    parser.add_argument("--skip_broken", action="store_true", help="leave broken records out and list them")
    parser.add_argument("--overwrite", action="store_true", help="replace the set in --out")
    return parser


if __name__ == "__main__":
    main()
