"""One face for every tokenizer: text to ids and back, and the ids that the training step needs to know."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tto_jax.tasks.problem import EmbeddedTask
from tto_jax.tasks.prompting import Prompting

if TYPE_CHECKING:
    import transformers


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer of the `transformers` library with the ids of an experiment's special strings."""

    hf: "transformers.PreTrainedTokenizerBase"
    pad_id: int  # may equal eos_id: what is padding is told by lengths
    think_end_id: int
    eos_id: int  # -1: none, equal to no token
    elicit_ended: tuple[int, ...]  # inserted before an answer if the trace has ended thinking
    elicit_cut: tuple[int, ...]  # inserted before an answer if the trace is cut
    chat: Prompting | None = None  # how a problem becomes a prompt; None: the problem's text is the prompt

    @classmethod
    def from_task(cls, task: EmbeddedTask) -> "Tokenizer":
        """One token per word of an embedded task's vocabulary; ids in its order."""
        import tokenizers

        transformers = _transformers()
        ids = {word: i for i, word in enumerate(task.vocabulary)}
        if len(ids) != len(task.vocabulary):
            raise ValueError(f"the vocabulary of task {task.name!r} has a word twice: {task.vocabulary}")
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids))
        words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        hf = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token=task.pad, eos_token=task.eos, clean_up_tokenization_spaces=False
        )
        return cls(
            hf=hf,
            pad_id=hf.pad_token_id,
            think_end_id=hf.convert_tokens_to_ids(task.think_end),
            eos_id=-1 if task.eos is None else hf.eos_token_id,
            elicit_ended=_encode(hf, task.elicit_ended),
            elicit_cut=_encode(hf, task.elicit_cut),
        )

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, prompting: Prompting) -> "Tokenizer":
        """The tokenizer of a model's directory; every id is read from it.

        Raises ValueError where there is none, where it has no EOS or no chat template, and where `prompting.think_end`
        is not one token: the sampler stops thinking at a token, and a string of several can be spelled in many ways.
        """
        transformers = _transformers()
        # tokenizer.json says it all. AutoTokenizer would go by the model's type first, and rebuild a Qwen2 model's
        # tokenizer with Qwen2's own splitting of texts, whatever the file says (transformers 5.23).
        exact = os.path.exists(os.path.join(directory, "tokenizer.json"))
        kind = transformers.PreTrainedTokenizerFast if exact else transformers.AutoTokenizer
        try:
            hf = kind.from_pretrained(os.fspath(directory), local_files_only=True)
        except Exception as error:  # of many kinds, by what is missing
            raise ValueError(f"no tokenizer could be read from {directory}: {error}") from error
        if not hf.chat_template:
            raise ValueError(f"the tokenizer in {directory} has no chat template: put chat_template.jinja beside it")
        if hf.eos_token_id is None:
            raise ValueError(f"the tokenizer in {directory} has no EOS token: name it in tokenizer_config.json")
        ids = _encode(hf, prompting.think_end)
        if len(ids) != 1:
            raise ValueError(
                f"think_end={prompting.think_end!r} is {len(ids)} tokens {list(ids)} of the tokenizer in {directory}, "
                "and thinking must end with one: add it to the tokenizer, or choose a string that is one token"
            )
        if ids[0] == hf.unk_token_id:
            raise ValueError(
                f"think_end={prompting.think_end!r} is unknown to the tokenizer in {directory}: add it there"
            )
        return cls(
            hf=hf,
            pad_id=hf.eos_token_id if hf.pad_token_id is None else hf.pad_token_id,
            think_end_id=ids[0],
            eos_id=hf.eos_token_id,
            elicit_ended=_encode(hf, prompting.elicit_ended),
            elicit_cut=_encode(hf, prompting.elicit_cut),
            chat=prompting,
        )

    @classmethod
    def absent(cls, prompting: Prompting, elicit_tokens: int) -> "Tokenizer":
        """Stands for one that is not at hand, where only sizes matter: insertions have `elicit_tokens` tokens."""
        ids = (0,) * elicit_tokens
        return cls(hf=None, pad_id=0, think_end_id=0, eos_id=0, elicit_ended=ids, elicit_cut=ids, chat=prompting)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included. A model may have more rows."""
        return len(self.hf)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id. For word-level vocabularies a lookup here is much faster than `encode`."""
        return self.hf.get_vocab()

    def encode(self, text: str) -> list[int]:
        """The ids of a text; nothing is added to it."""
        try:
            return list(_encode(self.hf, text))
        except Exception as error:  # `tokenizers` raises nothing more specific
            unknown = sorted({word for word in text.split() if word not in self.ids})
            raise ValueError(f"words {unknown} are not in the vocabulary; the choices: {sorted(self.ids)}") from error

    def render_prompt(self, problem: str) -> str:
        """The text of a prompt: the chat template around the problem and the instruction, thinking opened."""
        return problem if self.chat is None else self.render_chat(self.messages(problem))

    def messages(self, problem: str) -> list[dict[str, str]]:
        """What is said before the answer to a problem: the system's turn, if any, and the user's."""
        turns = [{"role": "system", "content": self.chat.system}] if self.chat.system else []
        return [*turns, {"role": "user", "content": problem + self.chat.instruction}]

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The text of messages (`role`, `content`) in the chat template, up to where the assistant goes on."""
        text = self.hf.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return text + (self.chat.think_start if self.chat else "")

    def encode_prompt(self, problem: str) -> list[int]:
        """The ids of a problem's prompt."""
        return self.encode(self.render_prompt(problem))

    def encode_prompts(self, problems: Sequence[str]) -> list[list[int]]:
        """`encode_prompt` of many, in one call of the tokenizer."""
        if self.chat is None:
            return [self.encode(problem) for problem in problems]
        texts = [self.render_prompt(problem) for problem in problems]
        return self.hf(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens kept."""
        return self.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def batch_decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of every row."""
        return [self.decode(row) for row in ids]


def _transformers():
    """Imported late: it takes most of a second, which the other pages need not wait for."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # of no PyTorch: tokenizers need none
    import transformers

    return transformers


def _encode(hf, text: str) -> tuple[int, ...]:
    return tuple(hf.encode(text, add_special_tokens=False))
