import collections
import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest

from tto_jax import tasks
from tto_jax.tasks.problem import choose

PEAK, CHAIN, CHAIN2 = tasks.get("peak"), tasks.get("chain"), tasks.get("chain", answer_digits=2)
ALL = pytest.mark.parametrize("task", [PEAK, CHAIN, CHAIN2], ids=["peak", "chain", "chain2"])


def apply(op, u):
    """Written apart from the library's tables."""
    return (u + int(op[1:])) % 10 if op[0] == "+" else (u * int(op[1:])) % 10


def peak_values(prompt):
    words = prompt.split()
    assert words[0] == "<s>" and words[-1] == "<think>"
    triples = [words[i : i + 3] for i in range(1, len(words) - 1, 3)]
    return [cue for cue, _, _ in triples], [apply(op, int(u)) for _, u, op in triples]


def chain_values(prompt):
    _, start, *ops, _ = prompt.split()
    values = [int(start)]
    for op in ops:
        values.append(apply(op, values[-1]))
    return values, ops


def solve(task, prompt):
    if task.name == "peak":
        return str(max(peak_values(prompt)[1]))
    return " ".join(map(str, chain_values(prompt)[0][-task.answer_digits :]))


def near(count, total, p, sigmas=4.5):
    assert abs(count - total * p) <= sigmas * math.sqrt(total * p * (1 - p)) + 1e-9, (count / total, p)


def problems(task, n, split="train", seed=0):
    rng = np.random.default_rng(seed)
    return [task.sample(rng, split) for _ in range(n)]


def demonstrations(task, n, seed=0):
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n):
        problem = task.sample(rng, "train")
        pairs.append((problem, task.demonstration(problem, rng)))
    return pairs


@ALL
def test_answers_are_right_and_words_are_known(task):
    vocabulary = set(task.vocabulary)
    for split in tasks.SPLITS:
        for i in range(1000):
            problem = task.problem(i, split)
            assert problem.answers == (solve(task, problem.prompt),)
            assert task.is_correct(problem.answers[0], problem) and task.is_formatted(problem.answers[0])
            assert tasks.split_of(problem.prompt) == split
            assert problem.id == tasks.prompt_id(problem.prompt) and 0 <= problem.id < 2**32
            words = problem.prompt.split()
            assert vocabulary.issuperset(words) and len(words) <= task.max_prompt_tokens


@ALL
def test_problem_is_a_function_of_index_and_split(task):
    assert task.problem(7, "eval") == task.problem(7, "eval")
    drawn = [task.problem(i, "train") for i in range(100)]
    assert len({problem.prompt for problem in drawn}) > 95
    assert drawn == [dataclasses.replace(task).problem(i, "train") for i in range(100)]


def test_splits_are_disjoint_and_one_in_eight_is_held_out():
    # Few operations: the same prompts come up again and again, so an overlap would be seen.
    small = tasks.get("chain", min_ops=2, max_ops=3)
    train = {p.prompt for p in problems(small, 5000, "train")}
    held_out = {p.prompt for p in problems(small, 5000, "eval", seed=1)}
    assert len(train) < 3000 and not train & held_out
    rng = np.random.default_rng(2)
    near(sum(tasks.split_of(PEAK.draw(rng)[0]) == "eval" for _ in range(5000)), 5000, 1 / 8)


def test_ids_are_the_same_in_every_process():
    assert tasks.prompt_id("<s> 3 +1 *7 <think>") == 1171742931
    code = "from tto_jax import tasks; print(tasks.get('peak').problem(5, 'eval').id)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == PEAK.problem(5, "eval").id


def test_sizes():
    assert len(PEAK.vocabulary) == 31 and len(CHAIN.vocabulary) == 36 and len(CHAIN2.vocabulary) == 37
    assert PEAK.max_prompt_tokens == 26 and PEAK.max_trace_tokens == 24
    assert {len(p.prompt.split()) for p in problems(PEAK, 200)} == {26}
    assert CHAIN.max_prompt_tokens == 15 and CHAIN.max_trace_tokens == 72
    assert (PEAK.max_answer_tokens, CHAIN.max_answer_tokens, CHAIN2.max_answer_tokens) == (1, 1, 3)
    assert (PEAK.eos, CHAIN.eos, CHAIN2.eos) == (None, None, "</s>")
    for task in (PEAK, CHAIN, CHAIN2):
        assert task.vocabulary[0] == task.pad and len(set(task.vocabulary)) == len(task.vocabulary)
        assert (task.elicit_ended, task.elicit_cut) == ("ANS", "</think> ANS")
    small = tasks.get("peak", num_values=4)
    assert small.max_prompt_tokens == 14 and len(small.vocabulary) == 27
    assert solve(small, small.problem(0, "train").prompt) == small.problem(0, "train").answers[0]


def test_peak_problem_distribution():
    n, largest, hint_holds = 5000, collections.Counter(), 0
    ops, position = collections.Counter(), collections.Counter()
    for problem in problems(PEAK, n):
        cues, values = peak_values(problem.prompt)
        assert cues.count("HI") == 2 and values.count(max(values)) == 1
        largest[max(values)] += 1
        holder = values.index(max(values))
        hint_holds += cues[holder] == "HI"
        position[holder] += 1
        ops.update(problem.prompt.split()[3:-1:3])
    assert set(largest) == set(range(4, 10))
    for count in largest.values():
        near(count, n, 1 / 6)
    for i in range(8):
        near(position[i], n, 1 / 8)
    near(hint_holds, n, 0.7)
    assert set(ops) == {"+1", "+2", "+3", "+5", "*3", "*7"}
    for count in ops.values():
        near(count, 8 * n, 1 / 6)


def test_peak_demonstrations():
    n = 8000
    endings, orders, lengths, wrong, checks = collections.Counter(), collections.Counter(), [], 0, 0
    complete = 0
    for problem, demonstration in demonstrations(PEAK, n):
        cues, values = peak_values(problem.prompt)
        words = demonstration.text.split()
        assert len(words) == len(demonstration.masked) <= 27
        count = (len(words) - 3) // 3
        assert len(words) == 3 * count + 3 and words[-3:-1] == ["</think>", "ANS"]
        order = ["abcdefgh".index(label) for label in words[0:-3:3]]
        assert len(set(order)) == count
        written = [int(v) for v in words[1:-3:3]]
        assert [int(m) for m in words[2:-3:3]] == [max(written[: i + 1]) for i in range(count)]
        assert int(words[-1]) == max(written)
        wrong += sum(v != values[i] for v, i in zip(written, order))
        checks += count
        assert demonstration.masked[:-3] == (False,) * (len(words) - 3)
        assert demonstration.masked[-2:] == (True, False)
        cut = demonstration.masked[-3]
        endings["cut" if cut else "complete" if count == 8 else "give_up"] += 1
        if count < 8:
            lengths.append(count)
            continue
        complete += 1
        hints = tuple(i for i, cue in enumerate(cues) if cue == "HI")
        orders["left_to_right"] += order == list(range(8))
        orders["hints_first"] += set(order[:2]) == set(hints)
        orders["hints_last"] += set(order[-2:]) == set(hints)
    near(endings["cut"], n, 0.30)
    near(endings["give_up"], n, 0.06)
    near(wrong, checks, 0.03 * 0.9)
    assert set(lengths) == set(range(1, 8))
    for k in range(1, 8):
        near(lengths.count(k), len(lengths), 1 / 7)
    # Random and left-to-right orders begin (end) with the two hints of 28 pairs now and then.
    near(orders["left_to_right"], complete, 0.3, sigmas=5)
    near(orders["hints_first"], complete, 0.2 + 0.6 / 28)
    near(orders["hints_last"], complete, 0.2 + 0.6 / 28)


def parse_chain(words, ops, start):
    """[(style, ops consumed, value before the last of them, value)] and counts of what was seen."""
    steps, seen, value, done, i = [], collections.Counter(), start, 0, 0
    while i < len(words):
        while words[i] == "hmm":
            seen["hmm"] += 1
            i += 1
        recheck = words[i] == "wait"
        i += recheck
        label = "abcdefghijkl".index(words[i])
        if i + 3 < len(words) and words[i + 3] == "=":
            u, op, v = int(words[i + 1]), words[i + 2], int(words[i + 4])
            done -= recheck
            assert label == done and op == ops[done]
            before = value if not recheck else steps.pop()[2]
            assert u == before
            seen["verbose"] += 1 - recheck
            seen["recheck"] += recheck
            seen["verbose_wrong"] += v != apply(op, before)
            steps.append(("verbose", 1, before, v))
            done, i = done + 1, i + 5
        elif label == done:
            v, before = int(words[i + 1]), value
            last = done + 1 == len(ops)
            seen["terse"] += not last  # the last one may stand for a skip
            seen["terse_wrong"] += not last and v != apply(ops[done], before)
            steps.append(("terse", 1, before, v))
            done, i = done + 1, i + 2
        else:
            assert label == done + 1
            before, v = apply(ops[done], value), int(words[i + 1])
            seen["skip"] += 1
            seen["skip_wrong"] += v != apply(ops[done + 1], before)
            steps.append(("skip", 2, before, v))
            done, i = done + 2, i + 2
        value = steps[-1][3]
    return steps, seen, done


@pytest.mark.parametrize("task", [CHAIN, CHAIN2], ids=["one digit", "two digits"])
def test_chain_demonstrations(task):
    n, total, over, early, pure, answered = 6000, collections.Counter(), 0, 0, collections.Counter(), 0
    tail = 2 + task.max_answer_tokens
    for problem, demonstration in demonstrations(task, n):
        values, ops = chain_values(problem.prompt)
        words = demonstration.text.split()
        assert len(words) == len(demonstration.masked)
        if "ANS" not in words:
            assert len(words) == 72 and "</think>" not in words and not any(demonstration.masked)
            over += 1
            continue
        answered += 1
        thinking, ending = words[:-tail], words[-tail:]
        steps, seen, done = parse_chain(thinking, ops, values[0])
        total += seen
        early += done < len(ops)
        expected = [str(steps[-1][2]), str(steps[-1][3])][-task.answer_digits :]
        assert ending == ["</think>", "ANS", *expected, *(["</s>"] if task.eos else [])]
        assert demonstration.masked == tuple(word == "ANS" for word in words)
        if done == len(ops) and len(ops) % 2 == 0:
            styles = {style for style, *_ in steps}
            total["even"] += 1
            pure[styles.pop() if len(styles) == 1 else "mixed"] += 1
    assert 0 < over < 0.1 * n
    near(early, answered, 0.08)
    near(total["recheck"], total["verbose"], 0.12, sigmas=6)  # long traces, with more of them, are cut
    assert abs(total["hmm"] / total["verbose"] - 0.25) < 0.02  # mean of the geometric: .2 / .8
    near(total["verbose_wrong"], total["verbose"] + total["recheck"], 0.03 * 0.9)
    near(total["terse_wrong"], total["terse"], 0.07 * 0.9)
    near(total["skip_wrong"], total["skip"], 0.15 * 0.9)
    # A mixed trace may happen to have one style; verbose ones lose those that are cut.
    assert 0.14 < pure["skip"] / total["even"] < 0.22
    assert 0.18 < pure["terse"] / total["even"] < 0.27
    assert 0.35 < pure["verbose"] / total["even"] < 0.47
    assert 0.14 < pure["mixed"] / total["even"] < 0.25


def test_chain_lengths_are_uniform():
    counts = collections.Counter(len(p.prompt.split()) - 3 for p in problems(CHAIN, 5000))
    assert set(counts) == set(range(4, 13))
    for count in counts.values():
        near(count, 5000, 1 / 9)


@ALL
def test_demonstration_is_a_function_of_the_generator(task):
    problem = task.problem(0, "train")
    first, again = (task.demonstration(problem, np.random.default_rng(3)) for _ in range(2))
    assert first == again


def test_mixture_fields_are_used():
    task = tasks.get("peak", order_probabilities=(0.0, 0.0, 1.0, 0.0), error_rate=0.0, give_up_rate=0.0, cut_rate=0.0)
    for problem, demonstration in demonstrations(task, 50):
        words = demonstration.text.split()
        assert words[0:-3:3] == list("abcdefgh") and task.is_correct(words[-1], problem)
    task = tasks.get("chain", style_probabilities=(0.0, 1.0, 0.0, 0.0), error_rates=(0.0, 0.0, 0.0), give_up_rate=0.0)
    for problem, demonstration in demonstrations(task, 50):
        words = demonstration.text.split()
        assert len(words) == 2 * (len(problem.prompt.split()) - 3) + 3 and task.is_correct(words[-1], problem)


def test_answer_form():
    problem = tasks.Problem(id=0, prompt="", answers=("4 7",))
    assert CHAIN2.is_correct(" 4 7 ", problem) and not CHAIN2.is_correct("7 4", problem)
    for text in ("", "4", "4 7 1", "4 a", "47"):
        assert not CHAIN2.is_formatted(text) and not CHAIN2.is_correct(text, problem)
    for text in ("", "a", "4 7", "</think>", "10"):
        assert not PEAK.is_formatted(text)
    assert PEAK.is_formatted("4")


def test_choose_has_the_right_distribution():
    rng = np.random.default_rng(0)
    counts = collections.Counter(choose(("a", "b", "c"), (0.25, 0.0, 0.75), rng) for _ in range(4000))
    assert counts["b"] == 0
    near(counts["a"], 4000, 0.25)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("hunt", {}, ("'hunt'", "peak, chain")),
        ("peak", {"values": 3}, ("values", "num_values")),
        ("peak", {"num_values": 1}, ("num_values=1", "2..26")),
        ("peak", {"num_hints": 8}, ("num_hints=8", "1..7")),
        ("peak", {"cut_rate": 0.95}, ("give_up_rate + cut_rate",)),
        ("peak", {"order_probabilities": (0.5, 0.5, 0.5, 0.0)}, ("order_probabilities", "sum to 1")),
        ("chain", {"min_ops": 5, "max_ops": 4}, ("min_ops=5", "max_ops=4")),
        ("chain", {"answer_digits": 3}, ("answer_digits=3", "1, 2")),
        ("chain", {"filler_rate": 1.0}, ("filler_rate=1.0", "[0, 1)")),
        ("chain", {"max_trace_tokens": 0}, ("max_trace_tokens=0",)),
        ("chain", {"error_rates": (0.1, 0.1)}, ("error_rates", "terse")),
        ("chain", {"mixed_concentration": (1.0, 0.0, 1.0)}, ("mixed_concentration",)),
    ],
)
def test_errors_give_value_and_choices(name, fields, words):
    with pytest.raises(ValueError) as error:
        tasks.get(name, **fields)
    assert all(word in str(error.value) for word in words)


def test_unknown_split():
    with pytest.raises(ValueError, match="split='test' is unknown; the choices are train, eval"):
        PEAK.problem(0, "test")
