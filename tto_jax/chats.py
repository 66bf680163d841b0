"""Chats as examples of supervised fine-tuning: JSON lines to tokens."""

import dataclasses
import json
import os
from collections.abc import Sequence

import numpy as np

from tto_jax import examples
from tto_jax.examples import Examples
from tto_jax.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
_SHOWN = 20  # broken records that an error lists


@dataclasses.dataclass(frozen=True)
class Chat:
    """What is said before, rendered by the chat template, and what is learned after it."""

    messages: tuple[dict[str, str], ...]  # of {"role", "content"}
    prefix: str  # follows the generation prompt; not trained
    target: str  # trained, and an EOS after it


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
    found = []
    for chat in chats:
        before = tokenizer.encode(tokenizer.render_chat(chat.messages) + chat.prefix)
        tokens = np.array([*before, *tokenizer.encode(chat.target), tokenizer.eos_id], np.int32)
        found.append((tokens, np.arange(tokens.size) >= len(before)))
    return examples.collect(found, row_length)
