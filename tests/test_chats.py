"""Chats to tokens: what is learned, what is refused, and rows that hold every example whole and once an epoch."""

import collections
import json

import jax
import numpy as np
import pytest
import tokenizers
import transformers

from tto_jax import chats, examples, learner
from tto_jax.core import token_tree
from tto_jax.learner import LossConfig
from tto_jax.models import decoder
from tto_jax.models.config import ModelConfig
from tto_jax.tokenizer import Tokenizer

WORDS = ("<end>", "USER", "ASSISTANT", "SYSTEM", *"abcdefghij")


@pytest.fixture(scope="module")
def tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    hf.chat_template = (
        "{% for m in messages %}{{ m['role'] | upper }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT {% endif %}"
    )
    return Tokenizer(hf=hf, pad_id=0, think_end_id=0, eos_id=0, elicit_ended=(), elicit_cut=())


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def turn(role, content):
    return {"role": role, "content": content}


def test_every_assistant_turn_is_learned(tokenizer, tmp_path):
    talk = [
        turn("system", "j"),
        turn("user", "a b"),
        turn("assistant", "c"),
        turn("user", "d"),
        turn("assistant", "e f"),
    ]
    found = chats.encode(chats.read([write(tmp_path / "a", {"messages": talk, "note": 1})]), tokenizer, 32)
    texts = [tokenizer.decode(row) for row in found.tokens]
    assert texts == [
        "SYSTEM j USER a b ASSISTANT c <end>",
        "SYSTEM j USER a b ASSISTANT c USER d ASSISTANT e f <end>",
    ]
    learned = [tokenizer.decode(row[mask]) for row, mask in zip(found.tokens, found.trained)]
    assert learned == ["c <end>", "e f <end>"]


def test_a_suffix_alone_is_learned(tokenizer, tmp_path):
    record = {"messages": [turn("user", "a")], "prefix": "b c", "suffix": "d e"}
    found = chats.encode(chats.read([write(tmp_path / "a", record)]), tokenizer, 32)
    assert tokenizer.decode(found.tokens[0]) == "USER a ASSISTANT b c d e <end>"
    assert tokenizer.decode(found.tokens[0][found.trained[0]]) == "d e <end>"


def test_what_is_too_long_is_counted(tokenizer, tmp_path):
    short, long = ({"messages": [turn("user", "a"), turn("assistant", "b " * n)]} for n in (1, 9))
    found = chats.encode(chats.read([write(tmp_path / "a", long, short, long)]), tokenizer, 6)
    assert len(found.tokens) == 1 and found.dropped == 2
    with pytest.raises(ValueError, match="none of the 3 examples fits"):
        chats.encode(chats.read([tmp_path / "a"]), tokenizer, 4)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Expecting"),
        ("[]", 'non-empty list "messages"'),
        ('{"messages": []}', 'non-empty list "messages"'),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "answers nothing"),
        ('{"messages": [{"role": "user", "content": "a"}], "suffix": "b"}', "go together"),
        ('{"messages": [{"role": "user", "content": "a"}], "prefix": 1, "suffix": "b"}', "are texts"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "prefix": "", '
            '"suffix": ""}',
            "before the assistant",
        ),
        (b'{"messages": "\xff"}', "utf-8"),
    ],
)
def test_broken_records_are_told_with_file_and_line(tmp_path, line, said):
    good = json.dumps({"messages": [turn("user", "a"), turn("assistant", "b")]}).encode()
    path = tmp_path / "chats.jsonl"
    path.write_bytes(good + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good + b"\n")
    with pytest.raises(ValueError, match=rf"chats\.jsonl:2: .*{said}") as error:
        chats.read([path])
    assert "1 broken" in str(error.value)


def test_no_files(tmp_path):
    with pytest.raises(ValueError, match="no files"):
        chats.read([])
    with pytest.raises(FileNotFoundError, match="absent"):
        chats.read([tmp_path / "absent"])
    with pytest.raises(ValueError, match="nothing to learn"):
        chats.read([write(tmp_path / "a", {"messages": [turn("user", "a")]})])


def random_examples(seed=0, number=23, most=12):
    rng = np.random.default_rng(seed)
    tokens = tuple(rng.integers(1, len(WORDS), n).astype(np.int32) for n in rng.integers(2, most, number))
    return examples.Examples(tokens, tuple(np.arange(row.size) >= 1 + row.size // 3 for row in tokens), 0, "")


def unpacked(batch):
    """(tokens, trained) of each example in a batch."""
    for n, tree in enumerate(batch.tree):
        for number in range(tree.max() + 1):
            where = tree == number
            assert (batch.position[n][where] == np.arange(where.sum())).all()
            assert (np.diff(np.nonzero(where)[0]) == 1).all()
            yield tuple(batch.tokens[n][where].tolist()), tuple(batch.loss_mask[n][where].tolist())


def test_rows_hold_every_example_whole_and_once_an_epoch():
    given = random_examples()
    wanted = collections.Counter((tuple(a.tolist()), tuple(b.tolist())) for a, b in zip(given.tokens, given.trained))
    batches = examples.evaluation_rows(given, 4, 16)
    assert all(batch.tokens.shape == (4, 16) for batch in batches)
    assert collections.Counter(x for batch in batches for x in unpacked(batch)) == wanted
    rows, seen = examples.training_rows(given, 2, 16, seed=1), []
    while len(seen) < 3 * 23:
        seen += unpacked(next(rows))
    counts = collections.Counter(seen)
    assert counts.keys() == wanted.keys() and max(counts.values()) - min(counts.values()) <= 2


def test_a_given_number_of_epochs():
    given = random_examples()
    batches = list(examples.training_rows(given, 4, 16, seed=1, epochs=3))
    assert {batch.tokens.shape for batch in batches} == {(4, 16)}
    counts = collections.Counter(tokens for batch in batches for tokens, _ in unpacked(batch))
    wanted = collections.Counter(tuple(row.tolist()) for row in given.tokens)
    assert counts == {tokens: 3 * number for tokens, number in wanted.items()}


def test_the_cursor_goes_on_where_it_was():
    rows = examples.training_rows(random_examples(), 3, 16, seed=5)
    for _ in range(3):
        next(rows)
    state = json.loads(json.dumps(rows.get_state()))
    expected = [next(rows) for _ in range(4)]
    again = examples.training_rows(random_examples(), 3, 16, seed=5)
    again.set_state(state)
    for a in expected:
        jax.tree.map(np.testing.assert_array_equal, a, next(again))


def test_packed_rows_have_the_logprobs_of_lone_sequences():
    model = ModelConfig(len(WORDS), 16, 2, 2, 1, 8, 24, 32)
    params = jax.tree.map(lambda x: 3.0 * x, decoder.init_params(model, 0))
    given = random_examples(2, 9)
    config = LossConfig(16, 16, constant=1.0)
    alone = {}
    for tokens, trained in zip(given.tokens, given.trained):
        padded = np.pad(tokens, (0, 16 - tokens.size))[None]
        lone = token_tree.sequences(padded, [tokens.size], np.pad(trained, (0, 16 - tokens.size))[None])
        alone[tuple(tokens.tolist())] = np.asarray(learner.score_logprobs(model, config, params, lone)[0])[0]
    for batch in examples.evaluation_rows(given, 4, 16):
        logprob = np.asarray(learner.score_logprobs(model, config, params, batch)[0])
        for n, tree in enumerate(batch.tree):
            for number in range(tree.max() + 1):
                where = tree == number
                expected = alone[tuple(batch.tokens[n][where].tolist())][: where.sum()]
                np.testing.assert_allclose(logprob[n][where], expected, rtol=1e-5, atol=2e-5)
