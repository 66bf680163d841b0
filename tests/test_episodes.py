"""Cuts of a text as positions between tokens: nothing drifts, whatever the tokenizer merges or splits."""

import random

import numpy as np
import pytest
import tokenizers
import transformers

from tto_jax import episodes
from tto_jax.tasks import peak
from tto_jax.tasks.episodes import Delimiters, paragraphs
from tto_jax.tokenizer import Tokenizer

PIECES = [
    *("Wait, x = 3.", "Alternatively", "So.", "déjà vu", "Wait 🙂🙃", "🙂 smile", "漢字の話", "", "But hold on", "\n"),
    *("Is there another way to think about this? ", "ends with a mark.\u2028", "a b c", "Ωμέγα", "1234567"),
]


def text_of(seed, most=60):
    rng = random.Random(seed)
    return "\n\n".join(rng.choice(PIECES) for _ in range(rng.randrange(1, most)))


@pytest.fixture(scope="module")
def bytes_bpe():
    """A byte-level BPE that splits characters and merges across paragraphs."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    model.train_from_iterator(["\n\nWait", ".\n\n", "Alternatively\n\n"] * 20 + [text_of(s) for s in range(5)], trainer)
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=model)
    assert "ĊĊWait" in hf.get_vocab(), "a token across a boundary is what the test is about"
    return Tokenizer(hf=hf, pad_id=0, think_end_id=0, eos_id=0, elicit_ended=(), elicit_cut=())


@pytest.fixture(scope="module")
def real(real_data):
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(real_data / "tokenizers" / "deepseek-r1")
    return Tokenizer(hf=hf, pad_id=0, think_end_id=0, eos_id=0, elicit_ended=(), elicit_cut=())


def check(tokenizer, rule, texts, size, seed=0):
    rng = random.Random(seed)
    ids = [tokenizer.encode(text) for text in texts]
    ids = [row[: rng.randrange(1, len(row) + 1)] if rng.random() < 0.3 else row for row in ids]  # some truncated
    tokens = np.full((len(ids), max(map(len, ids)) + 3), 7, np.int32)
    for row, found in zip(tokens, ids):
        row[: len(found)] = found
    length = np.array([len(row) for row in ids])
    forks = episodes.forks_at_delimiters(tokenizer, rule, tokens, length, size)
    assert forks.dtype == np.int32 and forks.shape == (len(ids), size)
    inside = 0
    for row, found in zip(forks, ids):
        text = tokenizer.decode(found)
        cuts = rule(text)[: size - 1]
        inside += len(cuts)
        for fork, cut in zip(row, cuts):
            assert len(tokenizer.decode(found[:fork])) <= cut, "nothing of the next episode is before the fork"
            beyond = fork == len(found) or len(tokenizer.decode(found[: fork + 1])) > cut
            assert beyond, "the next token begins it, or reaches into it"
        assert (row[len(cuts) :] == len(found)).all() and (np.diff(row) >= 0).all()
    assert inside > 10


@pytest.mark.parametrize(
    "rule", [Delimiters(max_cuts=9, group=1), Delimiters(gap=0, max_cuts=9, group=2), paragraphs(8)]
)
def test_no_drift(bytes_bpe, rule):
    check(bytes_bpe, rule, [text_of(seed) for seed in range(30)], rule.size)


def test_no_drift_with_a_real_tokenizer(real):
    check(real, Delimiters(max_cuts=9, group=1), [text_of(seed) for seed in range(20)], 6)


def test_a_token_across_the_boundary_belongs_to_the_next_episode(bytes_bpe):
    text = "a\n\nb\n\nc\n\nWait"
    ids = bytes_bpe.encode(text)
    assert bytes_bpe.decode(ids[-1:]) == "\n\nWait"
    forks = episodes.forks_at_delimiters(bytes_bpe, Delimiters(), np.array([ids]), np.array([len(ids)]), 2)
    assert forks.tolist() == [[len(ids), len(ids)]]  # merged by fives: no cut
    one = episodes.forks_at_delimiters(bytes_bpe, Delimiters(group=1), np.array([ids]), np.array([len(ids)]), 2)
    assert one.tolist() == [[len(ids) - 1, len(ids)]]


def test_a_rule_of_the_users_own_on_words():
    tokenizer = Tokenizer.from_task(peak.Peak())
    ids = tokenizer.encode("a 3 3 b 4 4 c 1 4")
    rule = lambda text: [i for i, character in enumerate(text) if character in "bc"]  # noqa: E731
    forks = episodes.forks_at_delimiters(tokenizer, rule, np.array([ids, ids]), np.array([9, 4]), 4)
    assert forks.tolist() == [[3, 6, 9, 9], [3, 4, 4, 4]]
    assert episodes.forks_at_delimiters(tokenizer, rule, np.array([ids]), np.array([9]), 2).tolist() == [[3, 9]]
    with pytest.raises(ValueError, match="ascend"):
        episodes.forks_at_delimiters(tokenizer, lambda text: [5, 2], np.array([ids]), np.array([9]), 2)
    with pytest.raises(ValueError, match="size=0"):
        episodes.forks_at_delimiters(tokenizer, rule, np.array([ids]), np.array([9]), 0)


# What a configuration asks for.

SECTION = {
    **{"rule": "delimiters", "most": 0, "block": 4, "markers": (), "separator": "\n\n", "gap": 2},
    **{"max_cuts": 49, "group": 5},
}


def section(**changes):
    return episodes.of_section(SECTION | changes, None, 24)


def test_rules_of_a_section():
    assert section(rule="budgets") is None
    assert (section().size, section().text_rule) == (10, Delimiters())
    assert (section(most=6).size, section(most=60).size) == (6, 10)
    words = section(markers=("a", "b"), separator=" ", gap=0, max_cuts=5, group=2)
    assert words.size == 3 and words.text_rule == Delimiters(("a", "b"), " ", 0, 5, 2)
    assert section(rule="paragraphs", most=4).text_rule == paragraphs(4)
    assert (section(rule="blocks").size, section(rule="blocks", most=2).size, section(rule="blocks", block=5).size) == (
        6,
        2,
        5,
    )


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_tokens(seed):
    """The end of each block, or of the trace; what is left belongs to the last."""
    rng = np.random.default_rng(seed)
    block, size, length = int(rng.integers(1, 6)), int(rng.integers(1, 5)), rng.integers(0, 25, 12)
    cut = episodes.Episodes(size, None, None, block)
    forks = cut(np.zeros((12, 24), np.int32), length)
    expected = [[min(n, block * (s + 1)) if s < size - 1 else n for s in range(size)] for n in length]
    assert forks.dtype == np.int32
    np.testing.assert_array_equal(forks, expected)


def test_episodes_of_words():
    """A task of words: every check of peak begins with its label, which opens an episode of its own."""
    task = peak.Peak()
    tokenizer = Tokenizer.from_task(task)
    rule = section(markers=tuple("abcdefgh"), separator=" ", gap=0, max_cuts=7, group=1)
    cut = episodes.Episodes(4, tokenizer, rule.text_rule)
    ids = tokenizer.encode("c 1 1 a 5 5 h 2 5 b 7 7 d 0 7 </think>")
    assert cut(np.asarray([[*ids, 0, 0], ids[:3] + [0] * 15]), np.asarray([len(ids), 3])).tolist() == [
        [3, 6, 9, 16],
        [3, 3, 3, 3],
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rule": "sentences"}, r"episodes.rule='sentences'.*choose one of"),
        ({"most": 1}, r"episodes.most=1.*at least 2"),
        ({"most": -1}, r"episodes.most=-1"),
        ({"rule": "paragraphs"}, r"episodes.most=0.*'paragraphs'"),
        ({"rule": "blocks", "block": 0}, r"episodes.block=0.*1 to 23"),
        ({"rule": "blocks", "block": 24}, r"episodes.block=24.*at most"),
        ({"max_cuts": 0}, r"episodes: .*max_cuts=0"),
        ({"separator": ""}, r"episodes: .*separator=''"),
        ({"max_cuts": 4}, r"max_cuts=4, group=5: one episode"),
    ],
    ids=str,
)
def test_sections_that_make_no_sense(change, says):
    with pytest.raises(ValueError, match=says):
        section(**change)
