"""Chats as examples of supervised fine-tuning: JSON lines to tokens, and tokens packed into rows."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence

import grain
import numpy as np

from tto_jax.core import token_tree
from tto_jax.core.types import TokenTree
from tto_jax.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
_SHOWN = 20  # broken records that an error lists


@dataclasses.dataclass(frozen=True)
class Chat:
    """What is said before, rendered by the chat template, and what is learned after it."""

    messages: tuple[dict[str, str], ...]  # of {"role", "content"}
    prefix: str  # follows the generation prompt; not trained
    target: str  # trained, and an EOS after it


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokens of chats that fit into a row."""

    tokens: tuple[np.ndarray, ...]  # i32[T] each
    trained: tuple[np.ndarray, ...]  # bool[T] each: the target and its EOS
    dropped: int  # longer than a row
    fingerprint: str  # 16 hexadecimal digits of all tokens in order

    @property
    def num_tokens(self) -> int:
        """Of all examples together."""
        return sum(len(row) for row in self.tokens)


def read(files: Sequence[str | os.PathLike]) -> list[Chat]:
    """The examples of JSON-lines files, UTF-8, a chat a line.

    {"messages": [{"role", "content"}, ...]}: every assistant turn is an example, after all that was said before it.
    {"messages", "prefix", "suffix"}: one example; the messages end with the user's, the prefix begins the answer
    and is not trained, the suffix is. Other fields are ignored.

    Raises FileNotFoundError, and ValueError with file and line of the first 20 broken records.
    """
    files, found, broken = [os.fspath(file) for file in files], [], []
    if not files:
        raise ValueError("no files of chats were given: name at least one JSON-lines file")
    for file in files:
        if not os.path.isfile(file):
            raise FileNotFoundError(f"no such file: {file}")
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    found += _chats(json.loads(line.decode()))
                except (ValueError, TypeError) as error:  # of UTF-8, of JSON, of a field
                    broken.append(f"{file}:{number}: {error}")
    if broken:
        more = f"\n  and {len(broken) - _SHOWN:,} more" if len(broken) > _SHOWN else ""
        raise ValueError(f"{len(broken):,} broken records:\n  " + "\n  ".join(broken[:_SHOWN]) + more)
    if not found:
        raise ValueError(f"no assistant turn in {', '.join(files)}: there is nothing to learn")
    return found


def _chats(record) -> list[Chat]:
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list) or not record["messages"]:
        raise ValueError('a chat is an object with a non-empty list "messages"')
    for message in record["messages"]:
        good = isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        if not good:
            raise ValueError(f'a message has a "role" of {ROLES} and a text "content", not {str(message)[:80]}')
    messages = tuple({"role": m["role"], "content": m["content"]} for m in record["messages"])
    if ("prefix" in record) != ("suffix" in record):
        raise ValueError("prefix and suffix go together")
    if "suffix" in record:
        if not isinstance(record["prefix"], str) or not isinstance(record["suffix"], str):
            raise ValueError("prefix and suffix are texts")
        if messages[-1]["role"] == "assistant":
            raise ValueError("with a prefix, the messages end before the assistant's turn")
        return [Chat(messages, record["prefix"], record["suffix"])]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if 0 in turns:
        raise ValueError("the first message is the assistant's: it answers nothing")
    return [Chat(messages[:i], "", messages[i]["content"]) for i in turns]


def encode(chats: Sequence[Chat], tokenizer: Tokenizer, row_length: int) -> Examples:
    """Tokens of each example; those longer than a row are dropped and counted.

    Prompt, prefix and target are tokenized apart, as they are when a model goes on from a prompt, so that the target's
    tokens are those that it would have to sample. Raises ValueError if nothing fits.
    """
    tokens, trained, dropped = [], [], 0
    for chat in chats:
        before = tokenizer.encode(tokenizer.render_chat(chat.messages) + chat.prefix)
        target = [*tokenizer.encode(chat.target), tokenizer.eos_id]
        if len(before) + len(target) > row_length:
            dropped += 1
            continue
        tokens.append(np.array(before + target, np.int32))
        trained.append(np.arange(len(before) + len(target)) >= len(before))
    if not tokens:
        raise ValueError(f"row_length={row_length}: none of the {dropped} examples fits, choose a longer row")
    digest = hashlib.sha256()
    for row, mask in zip(tokens, trained):
        digest.update(np.int64(row.size).tobytes() + row.tobytes() + mask.tobytes())
    return Examples(tuple(tokens), tuple(trained), dropped, digest.hexdigest()[:16])


def training_rows(examples: Examples, rows: int, row_length: int, seed: int) -> grain.DatasetIterator[TokenTree]:
    """Endless batches of packed rows; every epoch is shuffled anew, no example is cut. The state is a few numbers."""
    order = grain.MapDataset.source(_Source(examples)).shuffle(seed).repeat()
    return iter(_packed(order, rows, row_length))


def evaluation_rows(examples: Examples, rows: int, row_length: int) -> list[TokenTree]:
    """Every example once, packed; the last batch is filled with empty rows."""
    order = grain.MapDataset.source(_Source(examples))
    batches = list(_packed(order, rows, row_length))
    missing = rows - len(batches[-1].tokens)
    return [*batches[:-1], _grown(batches[-1], missing)]


@dataclasses.dataclass(frozen=True)
class _Source:
    """What grain reads from."""

    examples: Examples

    def __len__(self) -> int:
        return len(self.examples.tokens)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": self.examples.tokens[index], "trained": self.examples.trained[index]}


def _packed(order, rows, row_length):
    """First fit, into as many open rows as a batch has."""
    one_at_a_time = order.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    lengths = {"tokens": row_length, "trained": row_length}
    packed = grain.experimental.FirstFitPackIterDataset(
        one_at_a_time, length_struct=lengths, num_packing_bins=rows, shuffle_bins=False
    )
    return packed.batch(rows).map(_tree)


def _tree(batch) -> TokenTree:
    """An example is a tree of one trunk; grain numbers those of a row from 1, and calls padding 0."""
    tree = batch["tokens_segment_ids"] - 1
    return token_tree.packed(batch["tokens"], tree, batch["tokens_positions"], batch["trained"] & (tree >= 0))


def _grown(batch: TokenTree, missing: int) -> TokenTree:
    empty = token_tree.packed(*(np.zeros((missing, batch.tokens.shape[1]), x) for x in (int, int, int, bool)))
    empty = dataclasses.replace(empty, tree=empty.tree - 1)
    join = lambda a, b: np.concatenate([a, np.asarray(b, a.dtype)])  # noqa: E731
    return TokenTree(*(join(getattr(batch, f.name), getattr(empty, f.name)) for f in dataclasses.fields(batch)))
