"""Examples of backtracking made of sampled traces: against loops, and read back as fine-tuning reads them."""

import collections
import json
import random
from fractions import Fraction

import numpy as np
import pytest
import tokenizers
import transformers

from tto_jax import backtracking as page
from tto_jax import chats, completions, selected, solutions
from tto_jax.tasks import backtracking, prompting
from tto_jax.tasks.backtracking import Attempt
from tto_jax.tokenizer import Tokenizer

WORDS = ("<end>", "</think>", "Answer", "USER", *"abcd0123")
ID = {word: i for i, word in enumerate(WORDS)}


@pytest.fixture(scope="module")
def tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ID | {"<unk>": len(ID)}, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")
    hf.chat_template = "{% for m in messages %}USER {{ m['content'] }} {% endfor %}"
    chat = prompting.style(
        "anytime", instruction=" d", elicit_ended=" Answer", elicit_cut=" </think> Answer", paragraph=""
    )
    return Tokenizer(hf, 0, ID["</think>"], 0, (ID["Answer"],), (ID["</think>"], ID["Answer"]), chat)


def sampled(rng, index, traces=6):
    """Completions of a problem: steps of two words of two kinds, so that traces share prefixes."""
    lines = []
    for trace in range(traces):
        words = [rng.choice("ab") + " " + rng.choice("cd")[0] for _ in range(rng.randrange(1, 4))]
        ended = rng.random() < 0.7
        ids = [ID[word] for word in " ".join(words).split()] + [ID["</think>"]] * ended
        forks = [min(b, len(ids)) for b in (0, 2, 4, 7)]
        answers = []
        for fork in forks:
            inserted = ["Answer"] if ended and fork == len(ids) else ["</think>", "Answer"]
            column = []
            for _ in range(2):
                digit = rng.choice("0123")
                tokens = [ID[word] for word in (*inserted, digit, "<end>")]
                column.append({"correct": int(digit == "0"), "ids": tokens, "text": digit})
            answers.append(column)
        about = {"id": 100 + index, "index": index, "trace": trace, "ended": ended, "eos": False, "prompt": "a b"}
        lines.append(about | {"ids": ids, "forks": forks, "answers": answers})
    return lines


def plain(line):
    """(steps, scores after the whole trace, scores after each number of steps) of a line, read by hand."""
    words = [WORDS[i] for i in line["ids"] if WORDS[i] != "</think>"]
    scores = collections.defaultdict(list)
    for fork, column in zip(line["forks"], line["answers"]):
        scores[fork] += [answer["correct"] for answer in column]
    steps = [" ".join(words[i : i + 2]) for i in range(0, len(words), 2)]
    return steps, scores[len(line["ids"])], {depth: scores[2 * depth] for depth in range(4)}


def test_the_best_prefix_of_the_tree(tokenizer):
    """Where a wrong trace goes back to, and how it goes on, from lists of steps alone."""
    rng, kinds = random.Random(0), collections.Counter()
    for index in range(60):
        lines = sampled(rng, index)
        read = {line["trace"]: plain(line) for line in lines}
        paths = [solutions.path_of(line, tokenizer) for line in lines]
        assert {path.trace: (list(path.steps), len(path.right)) for path in paths} == {
            trace: (steps, sum(end)) for trace, (steps, end, _) in read.items()
        }
        made = {found.traces[0]: found for found in solutions.build(paths, "tree", random.Random(1))}
        for trace, (steps, end, _) in read.items():
            rates = []
            for depth in range(len(steps)):
                there = [x for other, _, at in read.values() if other[:depth] == steps[:depth] for x in at[depth]]
                rates.append(Fraction(sum(there), len(there)))
            if any(end) or max(rates) == 0:
                assert trace not in made
                continue
            keep = max(d for d, rate in enumerate(rates) if rate == max(rates))
            first, second = made[trace].attempts
            assert (first, second.keep) == (Attempt(0, tuple(steps)), keep)
            right = [other for other, end, _ in read.values() if any(end)]
            rest = [tuple(one[keep:]) for one in right if one[:keep] == steps[:keep] and len(one) > keep]
            assert second.steps in rest if rest else second.steps == ()
            kinds[bool(rest), keep > 0] += 1
    assert len(kinds) >= 3 and sum(kinds.values()) > 60


@pytest.mark.parametrize("scheme", solutions.SCHEMES)
def test_read_back_it_is_a_right_path(tokenizer, scheme):
    rng, number = random.Random(2), 0
    problems = [sampled(rng, index) for index in range(20)]
    found, dropped = page.build(problems, tokenizer, scheme, 0, 0)
    assert dropped == 0 and (found, 0) == page.build(problems, tokenizer, scheme, 0, 0)
    for _, solution in found:
        before, last = solution.texts()
        left = []
        for attempt in solution.attempts:
            left = left[: attempt.keep] + list(attempt.steps)
        path = backtracking.write([Attempt(0, tuple(left))] if left else [])
        assert backtracking.linearise(before + last) == path + "\n\n" * bool(left) + solution.end
        assert solution.end in ("Answer 0", "</think> Answer 0", "</think>Answer 0")
        assert (before == "") == (scheme == "rejection") and last.startswith("Node 1" if not before else "Backtrack to")
        number += len(solution.attempts) > 1
        assert scheme != "stitched" or last.startswith("Backtrack to beginning\n\nNode 1: ")
    assert len(found) > 20 and (number == len(found)) == (scheme != "rejection")
    few, _ = page.build(problems, tokenizer, scheme, 0, 1)
    assert len({prompt for prompt, _ in few}) == 1 and len(few) <= 20


def test_both_columns_are_read_as_the_same_tokens(tokenizer, tmp_path):
    rng = random.Random(3)
    problems = [sampled(rng, index) for index in range(10)]
    found, _ = page.build(problems, tokenizer, "tree", 0, 0)
    examples = {}
    for columns in page.COLUMNS:
        page.write(tmp_path / columns, [page.record(tokenizer, prompt, one, columns) for prompt, one in found])
        examples[columns] = chats.encode(chats.read([tmp_path / columns]), tokenizer, 200)
    suffix, messages = (examples[columns] for columns in page.COLUMNS)
    assert len(found) == len(suffix.tokens) == len(messages.tokens)
    prompt = tokenizer.encode_prompt("a b")
    for (_, one), tokens, last, other, all_of_it in zip(
        found, suffix.tokens, suffix.trained, messages.tokens, messages.trained
    ):
        np.testing.assert_array_equal(tokens, other)
        assert tokens[: len(prompt)].tolist() == prompt and all_of_it.sum() == len(tokens) - len(prompt)
        assert last.sum() == len(tokenizer.encode(one.texts()[1])) + 1


def test_the_page(tokenizer, tmp_path, monkeypatch, capsys):
    rng = random.Random(4)
    problems = [sampled(rng, index) for index in range(6)]
    folder = selected.completions_in(selected.folder_of(page.epath.Path(tmp_path), 1))
    for part, of in enumerate((problems[:4], problems[4:])):
        completions.write(completions.part_path(folder, part), [line for lines in of for line in lines])
    monkeypatch.setattr(page, "tokenizer_of", lambda run: tokenizer)
    page.main([f"--run={tmp_path}", "--scheme=stitched", f"--out={tmp_path / 'out' / 'x.jsonl'}", "--most=2"])
    records = [json.loads(line) for line in (tmp_path / "out" / "x.jsonl").read_text().splitlines()]
    assert 0 < len(records) <= 12 and {tuple(record) for record in records} == {
        ("messages", "prefix", "suffix", "traces", "keep")
    }
    assert f"{len(records)} examples of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scheme=tree"], "holds no config.json: give the workdir of"),
        (["--scheme=tree", "--most=-1"], "--most=-1: examples of a problem at most, 0 for all"),
        (["--scheme=best"], "choose from"),
        (["--scheme=tree", "--columns=text"], "choose from"),
    ],
)
def test_what_the_page_refuses(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as error:
        page.main([f"--run={tmp_path}", f"--out={tmp_path / 'x'}", *arguments])
    assert said in str(error.value) + capsys.readouterr().err and not list(tmp_path.iterdir())


def test_runs_that_give_nothing(tokenizer, tmp_path):
    wrong = sampled(random.Random(5), 0)
    for line in wrong:
        for column in line["answers"]:
            for answer in column:
                answer["correct"] = 0
    with pytest.raises(ValueError, match="none of 1 problems gives an example by 'tree'"):
        page.build([wrong], tokenizer, "tree", 0, 0)
    with pytest.raises(ValueError, match="scheme='best' is unknown: choose one of"):
        solutions.build([], "best", random.Random(0))
    with pytest.raises(ValueError, match=r"holds no sampled traces.*run `python -m tto_jax.star` first"):
        page.read(page.epath.Path(tmp_path))
    (tmp_path / "config.json").write_text('{"task": {"name": "peak"}}')
    with pytest.raises(ValueError, match="the words of task 'peak' have none for steps"):
        page.tokenizer_of(page.epath.Path(tmp_path))
