import pytest

from tto_jax import tasks
from tto_jax.tokenizer import Tokenizer

TASKS = [tasks.get("peak"), tasks.get("chain"), tasks.get("chain", answer_digits=2)]


@pytest.fixture(scope="module", params=TASKS, ids=["peak", "chain", "chain2"])
def pair(request):
    return request.param, Tokenizer.from_task(request.param)


def test_ids_follow_the_vocabulary(pair):
    task, tokenizer = pair
    words = task.vocabulary
    assert tokenizer.vocab_size == len(words)
    assert tokenizer.encode(" ".join(words)) == list(range(len(words)))
    assert tokenizer.ids == {word: i for i, word in enumerate(words)}
    assert tokenizer.pad_id == words.index(task.pad)
    assert tokenizer.think_end_id == words.index("</think>")
    assert tokenizer.eos_id == (words.index("</s>") if task.eos else -1)
    assert tokenizer.elicit_ended == (words.index("ANS"),)
    assert tokenizer.elicit_cut == (words.index("</think>"), words.index("ANS"))


def test_decode_keeps_every_token(pair):
    task, tokenizer = pair
    text = " ".join(task.vocabulary)
    assert tokenizer.decode(range(len(task.vocabulary))) == text
    assert tokenizer.decode([]) == "" and tokenizer.encode("") == []
    for i, word in enumerate(task.vocabulary):
        assert tokenizer.decode([i]) == word
    prompts = [task.problem(i, "train").prompt for i in range(20)]
    assert tokenizer.batch_decode([tokenizer.encode(prompt) for prompt in prompts]) == prompts


def test_unknown_words_are_named(pair):
    _, tokenizer = pair
    with pytest.raises(ValueError, match=r"\['11', 'foo'\].*</think>"):
        tokenizer.encode("<s> foo 1 11")
