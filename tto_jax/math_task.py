"""Math problems as a task: the answer is what the graded text puts in its last box, compared by killable workers."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from tto_jax.tasks.problem import Problem, Verdict
from tto_jax.tasks.prompting import Prompting
from tto_jax.verifier import equality, extract
from tto_jax.verifier.pool import Pool


@dataclasses.dataclass(frozen=True)
class MathTask:
    """Problems of prepared sets, with the strings around them and the pool that judges their answers."""

    name: ClassVar[str] = "math"
    prompting: Prompting
    max_prompt_tokens: int  # P; problems with longer prompts are left out
    max_answer_tokens: int  # sampled tokens an answer
    verifier: Pool = dataclasses.field(repr=False, compare=False)

    def __post_init__(self):
        for name in ("max_prompt_tokens", "max_answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"task.{name}={getattr(self, name)}: it must be at least 1")

    def extract(self, text: str) -> str | None:
        """The answer in a text that was sampled after the insertion; None if there is none.

        The insertion ends with the start of the graded paragraph, so it is put back before the text is cut.
        """
        graded = extract.graded_text(self.prompting.paragraph + text, self.prompting.paragraph)
        return None if graded is None else extract.last_boxed(graded)

    def reference(self, problem: Problem) -> str:
        """The first of the problem's answers, in a box."""
        return f"\\boxed{{{problem.answers[0]}}}"

    def judge(self, items: Sequence[tuple[str, Problem]]) -> list[Verdict]:
        """Right if equal to any of the problem's answers; formatted if there is a box. Hangs and crashes are wrong."""
        answers = [self.extract(text) for text, _ in items]
        asked = [i for i, answer in enumerate(answers) if answer is not None]
        judged = self.verifier.judge([(answers[i], items[i][1].answers) for i in asked])
        verdicts = [Verdict(correct=False, formatted=False, answer="")] * len(items)
        for i, verdict in zip(asked, judged):
            verdicts[i] = Verdict(
                correct=verdict.correct, formatted=True, answer=equality.normalise(answers[i]), how=verdict.how
            )
        return verdicts
