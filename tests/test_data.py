import collections
import itertools
import json
import pickle

import numpy as np
import pytest

from tto_jax import data, problem_files, problem_sets, tasks
from tto_jax.tasks import prompting
from tto_jax.tokenizer import Tokenizer

PEAK = tasks.get("peak")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_task(PEAK)


@pytest.fixture(scope="module")
def chain():
    """Prompts of several lengths, and their tokenizer."""
    task = tasks.get("chain")
    return data.ProblemSource(task, "train", 2500), Tokenizer.from_task(task)


def batches(tokenizer, size, batch_size, seed=0, shard=(0, 1)):
    return data.problem_batches(data.ProblemSource(PEAK, "train", size), tokenizer, batch_size, 30, seed, shard)


def ids(iterator, count):
    return [batch.prompts.id.tolist() for batch in itertools.islice(iterator, count)]


def test_source():
    source = data.ProblemSource(PEAK, "eval", 5)
    assert len(source) == 5 and list(source) == [PEAK.problem(i, "eval") for i in range(5)]
    for index in (-1, 5):
        with pytest.raises(IndexError, match=r"0\.\.4"):
            source[index]
    with pytest.raises(ValueError, match="size=0"):
        data.ProblemSource(PEAK, "eval", 0)
    with pytest.raises(ValueError, match="train, eval"):
        data.ProblemSource(PEAK, "test", 1)


def test_batch_contents(tokenizer):
    batch = next(batches(tokenizer, 12, 4))
    assert len(batch.problems) == 4 and batch.valid.all() and batch.valid.shape == (4,)
    prompts = batch.prompts
    assert prompts.tokens.shape == (4, 30) and prompts.tokens.dtype == np.int32
    assert prompts.length.tolist() == [26] * 4 and prompts.length.dtype == np.int32
    assert prompts.id.dtype == np.uint32 and prompts.id.tolist() == [p.id for p in batch.problems]
    for problem, row in zip(batch.problems, prompts.tokens):
        assert tokenizer.decode(row[:26]) == problem.prompt
        assert (row[26:] == tokenizer.pad_id).all()


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (10, 4), (3, 7)])
def test_every_epoch_has_every_problem_in_a_new_order(tokenizer, size, batch_size):
    epochs = 4
    iterator = batches(tokenizer, size, batch_size)
    stream = list(itertools.chain(*ids(iterator, -(-size * epochs // batch_size))))[: size * epochs]
    expected = sorted(problem.id for problem in data.ProblemSource(PEAK, "train", size))
    orders = [tuple(stream[i * size : (i + 1) * size]) for i in range(epochs)]
    assert all(sorted(order) == expected for order in orders)
    assert len(set(orders)) > 1


def test_order_depends_on_the_seed_only(tokenizer):
    assert ids(batches(tokenizer, 12, 4), 6) == ids(batches(tokenizer, 12, 4), 6)
    assert ids(batches(tokenizer, 12, 4), 3) != ids(batches(tokenizer, 12, 4, seed=1), 3)


@pytest.mark.parametrize("size", [12, 10])
def test_resumes_exactly(tokenizer, size):
    expected = ids(batches(tokenizer, size, 4), 9)
    for taken in range(7):  # 0: before the first batch; 3 of size 12: between two epochs
        iterator = batches(tokenizer, size, 4)
        ids(iterator, taken)
        state = json.loads(json.dumps(iterator.get_state()))
        fresh = batches(tokenizer, size, 4)
        fresh.set_state(state)
        assert ids(fresh, 9 - taken) == expected[taken:]
        ids(iterator, 1)  # a state can also be set back
        iterator.set_state(state)
        assert ids(iterator, 9 - taken) == expected[taken:]


@pytest.mark.parametrize("size", [50, 10])
def test_shards_together_are_the_batch_of_one_host(tokenizer, size):
    """In order, at every step, after a resume, and after a resume with another number of hosts."""
    whole = list(itertools.islice(batches(tokenizer, size, 8), 6))
    states = {}
    for count in (1, 2, 4):
        hosts = [batches(tokenizer, size, 8, shard=(index, count)) for index in range(count)]
        for step, expected in enumerate(whole[:4]):
            assert all(host.get_state() == states.setdefault(step, host.get_state()) for host in hosts)
            parts = [next(host) for host in hosts]
            assert [len(part.problems) for part in parts] == [8 // count] * count
            assert sum((part.problems for part in parts), ()) == expected.problems
            for name in ("tokens", "length", "id"):
                joined = np.concatenate([getattr(part.prompts, name) for part in parts])
                np.testing.assert_array_equal(joined, getattr(expected.prompts, name))
    state = json.loads(json.dumps(states[3]))
    for count in (4, 1, 2):
        hosts = [batches(tokenizer, size, 8, shard=(index, count)) for index in range(count)]
        for host in hosts:
            host.set_state(state)
        for expected in whole[3:]:
            assert sum((next(host).problems for host in hosts), ()) == expected.problems


def test_a_host_reads_its_own_problems_only(tokenizer):
    class Counted(list):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    source = Counted(data.ProblemSource(PEAK, "train", 16))
    iterator = data.problem_batches(source, tokenizer, 8, 30, 0, (1, 4))
    ids(iterator, 3)
    assert source.read == 3 * 2


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0), (0, 3)])
def test_shards_that_cannot_be(tokenizer, shard):
    with pytest.raises(ValueError, match=rf"shard=\({shard[0]}, {shard[1]}\)|batch_size=8 .* hosts, 3"):
        batches(tokenizer, 12, 8, shard=shard)


def test_drop_overlong(chain):
    source, tokenizer = chain
    lengths = [len(problem.prompt.split()) for problem in source]
    pad = sorted(lengths)[len(lengths) // 2]
    assert min(lengths) < pad < max(lengths)
    kept, dropped = data.drop_overlong(source, tokenizer, pad)
    expected = [problem for problem, length in zip(source, lengths) if length <= pad]
    assert list(kept) == expected and len(kept) == len(expected) == len(source) - dropped
    assert kept[7] == expected[7] and pickle.loads(pickle.dumps(kept)) == kept
    for index in (-1, len(kept)):
        with pytest.raises(IndexError, match=rf"0\.\.{len(kept) - 1}"):
            kept[index]
    assert data.drop_overlong(source, tokenizer, max(lengths)) == (source, 0)
    assert len(data.drop_overlong(source, tokenizer, min(lengths))[0]) == lengths.count(min(lengths))
    with pytest.raises(ValueError, match=rf"prompt_pad=2: none of the 2500 prompts fits.* {min(lengths)} tokens"):
        data.drop_overlong(source, tokenizer, 2)
    # What is kept fits: an epoch of it holds all of it.
    stream = ids(data.problem_batches(kept, tokenizer, len(kept), pad, 0), 1)
    assert sorted(stream[0]) == sorted(problem.id for problem in expected)


def test_sources_without_problems(tokenizer):
    with pytest.raises(ValueError, match="no problems"):
        data.drop_overlong([], tokenizer, 8)
    with pytest.raises(ValueError, match="no problems"):
        data.problem_batches([], tokenizer, 2, 8, 0)


@pytest.fixture(scope="module")
def math(real_data, tmp_path_factory):
    """A prepared set of real problems, and a real tokenizer, whose pad is its EOS."""
    contents = problem_files.read_files([real_data / "deepscaler" / "train" / "aime.json"])
    source = problem_sets.write_set(contents, tmp_path_factory.mktemp("sets") / "aime")
    return source, Tokenizer.from_pretrained(real_data / "tokenizers" / "deepseek-r1", prompting.style("anytime"))


def test_real_problems(math):
    source, tokenizer = math
    assert tokenizer.pad_id == tokenizer.eos_id
    rows = {problem.id: tokenizer.encode_prompt(problem.prompt) for problem in source}
    assert len(rows) == len(source)
    kept, dropped = data.drop_overlong(source, tokenizer, 200)
    assert 0 < dropped == sum(len(row) > 200 for row in rows.values())
    assert [problem.id for problem in kept] == [problem.id for problem in source if len(rows[problem.id]) <= 200]
    seen = []
    for batch in data.evaluation_batches(kept, tokenizer, 64, 200):
        prompts = batch.prompts
        for row, length, problem in zip(prompts.tokens, prompts.length, batch.problems):
            assert row[:length].tolist() == rows[problem.id] and (row[length:] == tokenizer.pad_id).all()
        seen += prompts.id[batch.valid].tolist()
    assert seen == [problem.id for problem in kept]


def test_real_problems_resume_exactly(math):
    source, tokenizer = math
    kept, _ = data.drop_overlong(source, tokenizer, 200)
    expected = ids(data.problem_batches(kept, tokenizer, 256, 200, 5), 6)
    iterator = data.problem_batches(pickle.loads(pickle.dumps(kept)), tokenizer, 256, 200, 5)
    ids(iterator, 2)
    fresh = data.problem_batches(kept, tokenizer, 256, 200, 5)
    fresh.set_state(json.loads(json.dumps(iterator.get_state())))
    assert ids(fresh, 4) == expected[2:]


def test_evaluation_batches(tokenizer):
    source = data.ProblemSource(PEAK, "eval", 10)
    out = list(data.evaluation_batches(source, tokenizer, 4, 26))
    assert [batch.valid.tolist() for batch in out] == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert all(batch.prompts.tokens.shape == (4, 26) and len(batch.problems) == 4 for batch in out)
    kept = [problem for batch in out for problem, valid in zip(batch.problems, batch.valid) if valid]
    assert kept == list(source)
    assert out[-1].problems[2] == out[-1].problems[3] == source[9]
    assert [batch.valid.all() for batch in data.evaluation_batches(source, tokenizer, 5, 26)] == [True, True]


def test_errors(tokenizer):
    source = data.ProblemSource(PEAK, "train", 4)
    with pytest.raises(ValueError, match=r"26 tokens.*prompt_pad=25"):
        next(data.problem_batches(source, tokenizer, 2, 25, 0))
    with pytest.raises(ValueError, match="prompt_pad=25"):
        next(data.evaluation_batches(source, tokenizer, 2, 25))
    for make in (data.evaluation_batches, lambda *args: data.problem_batches(*args, seed=0)):
        with pytest.raises(ValueError, match="batch_size=0"):
            make(source, tokenizer, 0, 26)
    with pytest.raises(ValueError, match="seed=-1"):
        data.problem_batches(source, tokenizer, 2, 26, -1)
    with pytest.raises(ValueError, match="row_length=40"):
        data.demonstration_batch(PEAK, tokenizer, 0, 0, 32, 40)


@pytest.mark.parametrize("task", [PEAK, tasks.get("chain", answer_digits=2)], ids=["peak", "chain2"])
def test_demonstration_batch(task):
    tokenizer = Tokenizer.from_task(task)
    width = task.max_prompt_tokens + task.max_trace_tokens + 2 + task.max_answer_tokens
    seen = collections.Counter()
    for step in range(20):
        tokens, length, target = data.demonstration_batch(task, tokenizer, 0, step, 16, width)
        assert tokens.shape == target.shape == (16, width) and length.shape == (16,)
        assert (tokens.dtype, length.dtype, target.dtype) == (np.int32, np.int32, np.bool_)
        for row, n, trained in zip(tokens, length, target):
            words = tokenizer.decode(row[:n]).split()
            assert len(words) == n and (row[n:] == tokenizer.pad_id).all() and not trained[n:].any()
            prompt_length = words.index("<think>") + 1
            assert tasks.split_of(" ".join(words[:prompt_length])) == "train"
            assert not trained[:prompt_length].any() and trained[prompt_length]
            untrained = [word for word, on in zip(words[prompt_length:], trained[prompt_length:n]) if not on]
            seen[tuple(untrained)] += 1
    assert set(seen) <= {("ANS",), ("</think>", "ANS"), ()}
    assert (seen["</think>", "ANS"] > 0) == (task.name == "peak")
    assert (seen[()] > 0) == (task.name == "chain")


def test_demonstrations_depend_on_seed_and_step_only(tokenizer):
    def tokens(seed, step):
        return data.demonstration_batch(PEAK, tokenizer, seed, step, 8, 53)[0]

    np.testing.assert_array_equal(tokens(0, 3), tokens(0, 3))
    assert (tokens(0, 3) != tokens(0, 4)).any() and (tokens(0, 3) != tokens(1, 3)).any()
