"""One face for every tokenizer: text to ids and back, and the ids that the training step needs to know."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tto_jax.tasks.problem import Task

if TYPE_CHECKING:
    import transformers


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer of the `transformers` library with the ids of a task's special strings."""

    hf: "transformers.PreTrainedTokenizerFast"
    pad_id: int
    think_end_id: int
    eos_id: int  # -1: none, equal to no token
    elicit_ended: tuple[int, ...]  # inserted before an answer if the trace has ended thinking
    elicit_cut: tuple[int, ...]  # inserted before an answer if the trace is cut

    @classmethod
    def from_task(cls, task: Task) -> "Tokenizer":
        """One token per word of the task's vocabulary; ids in its order."""
        # Imported here: it takes most of a second, which the other pages need not wait for.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # of no PyTorch: tokenizers need none
        import tokenizers
        import transformers

        ids = {word: i for i, word in enumerate(task.vocabulary)}
        if len(ids) != len(task.vocabulary):
            raise ValueError(f"the vocabulary of task {task.name!r} has a word twice: {task.vocabulary}")
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids))
        words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        hf = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token=task.pad, eos_token=task.eos, clean_up_tokenization_spaces=False
        )

        def encode(text: str) -> tuple[int, ...]:
            return tuple(hf.encode(text, add_special_tokens=False))

        return cls(
            hf=hf,
            pad_id=hf.pad_token_id,
            think_end_id=hf.convert_tokens_to_ids(task.think_end),
            eos_id=-1 if task.eos is None else hf.eos_token_id,
            elicit_ended=encode(task.elicit_ended),
            elicit_cut=encode(task.elicit_cut),
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self.hf)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id. For word-level vocabularies a lookup here is much faster than `encode`."""
        return self.hf.get_vocab()

    def encode(self, text: str) -> list[int]:
        """The ids of a text; nothing is added to it."""
        try:
            return self.hf.encode(text, add_special_tokens=False)
        except Exception as error:  # `tokenizers` raises nothing more specific
            unknown = sorted({word for word in text.split() if word not in self.ids})
            raise ValueError(f"words {unknown} are not in the vocabulary; the choices: {sorted(self.ids)}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens kept."""
        return self.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def batch_decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of every row."""
        return [self.decode(row) for row in ids]
