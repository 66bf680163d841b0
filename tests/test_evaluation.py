"""The evaluation of a tiny random model: what is sampled, what is kept, and every number against plain loops."""

import collections
import dataclasses
import functools
import gzip
import itertools
import json
import warnings

import jax
import numpy as np
import pytest
from etils import epath

from configs import peak
from tto_jax import comparison, completions, evaluation, inputs, settings, sharding, summary
from tto_jax.core import anytime
from tto_jax.evaluation import Evaluation, Options
from tto_jax.models import decoder
from tto_jax.tasks import Verdict

BUDGETS, N, A, PROBLEMS = (2, 5, 9), 5, 2, 11
OPTIONS = Options(budgets=BUDGETS, traces=N, answers=A, temperature=0.7, seed=3, rows=12)
LIMITS = (10, 21, 40)


class Judge:
    """Verdicts of all kinds, decided by the text alone, so that a random model has mixed scores."""

    name = "judge"

    def judge(self, items):
        kind = [sum(map(ord, text)) % 7 for text, _ in items]
        how = ("text", "symbolic", "timeout")
        return [Verdict(k < 3, k != 5, "" if k in (5, 6) else str(k // 2), how[k % 3]) for k in kind]


@functools.cache
def plan():
    config = peak.get_config("brpo")
    small = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_size": 32}
    config.update_from_flattened_dict({f"model.{name}": value for name, value in small.items()})
    config.task.num_values = 3
    return dataclasses.replace(settings.build(config), task=Judge())


@functools.cache
def params():
    """Thinking ends often enough: the model is random, and three times as sure as it would be."""
    return jax.tree.map(lambda x: 3 * x, decoder.init_params(plan().model, 0))


@functools.cache
def problems():
    config = peak.get_config("brpo")
    config.task.num_values = 3
    task = inputs.tasks.get(**config.task.to_dict())
    return tuple(task.problem(i, "eval") for i in range(PROBLEMS))


def evaluate(folder=None, chosen=None, **changes):
    options = dataclasses.replace(OPTIONS, **changes)
    return evaluation.evaluate(plan(), params(), chosen or problems(), options, folder=folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """An evaluation and where its completions lie."""
    folder = epath.Path(tmp_path_factory.mktemp("completions"))
    return evaluate(folder), folder


def read_lines(folder):
    """What a user would read, with the standard library."""
    found = []
    for path in sorted(folder.iterdir()):
        with gzip.open(path, "rt") as file:
            found += [json.loads(line) for line in file]
    return found


def arrays(result):
    return {name: getattr(result, name) for name in evaluation.ARRAYS}


def assert_same(a, b):
    for name in evaluation.ARRAYS:
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), name
    assert a.grading == b.grading


@functools.cache
def long_plan():
    """Settings and parameters of a model whose traces may be longer than one length bucket."""
    model = dataclasses.replace(plan().model, max_position=256)
    return dataclasses.replace(plan(), model=model), jax.tree.map(lambda x: 3 * x, decoder.init_params(model, 0))


# What is sampled and kept.


def test_shapes_and_kinds(kept):
    result, _ = kept
    S = len(BUDGETS)
    assert result.correct.shape == result.vote.shape == result.answer_length.shape == (PROBLEMS, N, S, A)
    assert result.forks.shape == result.inserted.shape == (PROBLEMS, N, S)
    assert result.length.shape == result.ended.shape == (PROBLEMS, N)
    assert result.prompt_length.shape == result.id.shape == (PROBLEMS,)
    assert 0.2 < result.correct.mean() < 0.6 and 0.2 < result.ended.mean() < 0.9, "the tests below need mixtures"
    assert set(result.grading) == {"text", "symbolic", "timeout"}
    assert sum(result.grading.values()) == result.correct.size
    assert result.new_tokens == result.tokens and result.seconds > 0
    np.testing.assert_array_equal(result.forks, np.minimum(result.length[..., None], BUDGETS))


def test_every_completion_is_kept(kept):
    result, folder = kept
    lines = read_lines(folder)
    assert [(line["index"], line["trace"]) for line in lines] == list(itertools.product(range(PROBLEMS), range(N)))
    task = plan().task
    for line in lines:
        at = line["index"], line["trace"]
        problem = problems()[line["index"]]
        assert line["id"] == problem.id == result.id[line["index"]]
        assert line["prompt_tokens"] == len(problem.prompt.split())
        words = line["text"].split()
        assert len(words) == line["tokens"] == result.length[at]
        assert line["ended"] == (words[-1] == "</think>") == result.ended[at]
        assert line["forks"] == [min(b, line["tokens"]) for b in BUDGETS]
        for s, answers in enumerate(line["answers"]):
            finished = line["ended"] and line["forks"][s] == line["tokens"]
            assert line["inserted"][s] == (1 if finished else 2)
            for a, answer in enumerate(answers):
                (verdict,) = task.judge([(answer["text"], problem)])
                well_formed = "</think>" not in answer["text"]
                assert answer["answer"] == verdict.answer and answer["how"] == verdict.how
                assert answer["correct"] == (verdict.correct and well_formed) == result.correct[(*at, s, a)]
                assert answer["formatted"] == (verdict.formatted and well_formed)
                assert answer["tokens"] == len(answer["text"].split()) == 1


def texts(folder, **options):
    """What was sampled, by problem and trace; given options, of a new evaluation."""
    if options:
        evaluate(epath.Path(folder), **options)
    told = lambda line: (line["text"], line["answers"], line["forks"])  # noqa: E731
    return {(line["id"], line["trace"]): told(line) for line in read_lines(folder)}


def test_samples_do_not_depend_on_rows(kept, tmp_path):
    """Two traces of a problem in a rollout; two problems in those that are kept, eight in that of the mesh below."""
    assert texts(tmp_path, rows=2) == texts(kept[1])


def test_samples_depend_on_problem_trace_and_seed_only(kept, tmp_path):
    """Fewer traces, other neighbours: the same samples. Another seed: others."""
    whole = texts(kept[1])
    few = texts(tmp_path / "few", chosen=problems()[7:3:-1], traces=2, rows=2)
    assert len(few) == 8 and all(whole[key] == value for key, value in few.items())
    other = texts(tmp_path / "other", chosen=problems()[:2], seed=4)
    assert np.mean([whole[key] == value for key, value in other.items()]) < 0.2
    assert len({value[0] for value in whole.values()}) > 0.5 * len(whole), "traces differ"


def test_nothing_compiles_once_sampling_begins(monkeypatch):
    """Two length buckets: both are compiled before the first trace, whichever it then needs."""
    during, sample = [], evaluation.rollout.sample
    listen = lambda event, _seconds, **_: during.append(event)  # noqa: E731

    def watched(*arguments):
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            return sample(*arguments)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    monkeypatch.setattr(evaluation.rollout, "sample", watched)
    settings, params = long_plan()
    options = Options(budgets=(5, 130), traces=2, answers=1, temperature=1.0, seed=0, rows=4)
    result = evaluation.evaluate(settings, params, problems()[:6], options)
    assert not [event for event in during if "compile" in event or "trac" in event]
    assert (result.length <= 64).any()


def test_forks_after_episodes(kept, tmp_path):
    """The same thinking, cut at its start and before each `a` and `b` within it, up to two of them."""
    section = peak.get_config("brpo").episodes.to_dict() | {"rule": "delimiters", "markers": ("a", "b")}
    section |= {"max_cuts": 2, "group": 1}
    result = evaluate(epath.Path(tmp_path), episodes=section, start=True)
    lines, whole = read_lines(tmp_path), texts(kept[1])
    for line in lines:
        words = line["text"].split()
        assert line["text"] == whole[line["id"], line["trace"]][0]
        cuts = [place for place, word in enumerate(words) if place and word in ("a", "b")][:2]
        assert line["forks"] == [0, *cuts, *[len(words)] * (3 - len(cuts))]
        finished = [line["ended"] and fork == len(words) for fork in line["forks"]]
        assert line["inserted"] == [1 if end else 2 for end in finished]
    assert len({tuple(line["forks"][1:3]) for line in lines}) > 5
    np.testing.assert_array_equal(result.forks.reshape(-1, 4), [line["forks"] for line in lines])
    found = summary.metrics(result, (9,))["unfinished"].value()
    want = [np.mean([not (x["ended"] and x["forks"][s] == x["tokens"]) for x in lines]) for s in range(4)]
    np.testing.assert_allclose(found, want)
    assert dataclasses.replace(OPTIONS, episodes=section, start=True).columns == (0, 1, 2, 3)


def test_a_start_is_a_column_of_its_own(kept, tmp_path):
    """Answers before any thinking come first; those at budgets stay what they are without."""
    whole, with_start = texts(kept[1]), texts(tmp_path, start=True)
    assert with_start.keys() == whole.keys()
    for key, (text, answers, forks) in with_start.items():
        assert (text, answers[1:], forks[1:]) == whole[key] and forks[0] == 0
    lines = read_lines(tmp_path)
    assert {line["inserted"][0] for line in lines} == {2}, "thinking is cut before its first token"
    assert len({answer["text"] for line in lines for answer in line["answers"][0]}) > 1
    assert dataclasses.replace(OPTIONS, start=True).columns == (0, *BUDGETS)


@pytest.mark.parametrize(
    ("problem_count", "traces", "rows"), [(11, 5, 12), (3, 10, 4), (1, 7, 7), (5, 1, 2), (2, 9, 2)]
)
def test_parts_cover_every_trace_once_in_order(problem_count, traces, rows):
    found = list(evaluation.parts(problem_count, traces, rows))
    assert [part.number for part in found] == list(range(len(found)))
    pairs = [(i, t) for part in found for i in part.problems for t in part.traces]
    assert pairs == list(itertools.product(range(problem_count), range(traces)))
    for part in found:
        assert len(part.problems) * len(part.traces) <= rows
        assert len(part.problems) == 1 or len(part.traces) == traces


@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize(("problem_count", "traces", "rows"), [(11, 5, 12), (3, 10, 4), (40, 1, 2)])
def test_rounds_cover_every_part_once(problem_count, traces, rows, shards):
    """Also of what an evaluation left that was killed; a rollout numbers its traces from one number."""
    todo = [part for part in evaluation.parts(problem_count, traces, rows) if part.number % 3]
    found = list(evaluation.rounds(todo, shards))
    assert sorted(part.number for together in found for part in together) == [part.number for part in todo]
    for together in found:
        assert len(together) <= shards and len({part.traces for part in together}) == 1
    ideal = sum(-(-sum(part.traces == numbers for part in todo) // shards) for numbers in {x.traces for x in todo})
    assert len(found) == ideal


def test_a_mesh_samples_the_same(kept, tmp_path):
    """Stopped on one device, the parts are finished by four that have rows of their own: all files to the byte."""
    result, folder = kept
    for name in ("00000.jsonl.gz", "00004.jsonl.gz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    mesh = sharding.mesh_of((2, 2, 2))
    on_mesh, placed = plan().on(mesh), sharding.place(mesh, params(), plan().model.num_kv_heads)
    seen = []
    with sharding.use(mesh):
        again = evaluation.evaluate(
            on_mesh, placed, problems(), OPTIONS, folder=epath.Path(tmp_path), on_part=lambda n, _: seen.append(n)
        )
    assert_same(again, result)
    assert seen == [10, 10, 10, 10, 10, 5], "two that were kept, four in one rollout; the last part is a short one"
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 6
    task = {"name": "peak"}
    claims = [
        completions.identity(one, weights, {"peak": problems()}, OPTIONS, task)
        for one, weights in ((plan(), params()), (on_mesh, placed))
    ]
    assert claims[0] == claims[1] and on_mesh.model.kv_copies == 2


def test_default_rows_follow_the_size(monkeypatch):
    wide = dataclasses.replace(plan(), model=dataclasses.replace(plan().model, vocab_size=151_936))
    paper = dataclasses.replace(OPTIONS, budgets=tuple(range(250, 8001, 250)), answers=1)
    memory = type("Device", (), {"memory_stats": lambda self: {"bytes_limit": 2**34}})
    monkeypatch.setattr(evaluation.jax, "local_devices", lambda: [memory()])
    small, large = (evaluation.default_rows(one, paper, 1000) for one in (plan(), wide))
    assert small == evaluation.MOST_ROWS and 1 < large < 256
    assert large * 3 * 4 * 32 * 151_936 <= 2**33, "the logits alone fit into half of the memory"
    assert evaluation.default_rows(wide, dataclasses.replace(paper, answers=10_000), 1000) == 1


@pytest.mark.parametrize(("problem_count", "rows"), [(1, N), (8, N), (9, 2 * N), (16, 2 * N), (8000, 256)])
def test_default_rows_are_an_even_share(problem_count, rows):
    """8 shards have the same number of whole problems, as far as memory goes."""
    with sharding.use(sharding.mesh_of((2, 4, 1))):
        assert evaluation.default_rows(plan(), OPTIONS, problem_count) == rows


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budgets": ()}, "budgets"),
        ({"budgets": (4, 4)}, "strictly increase"),
        ({"traces": 0}, "evaluation.traces=0"),
        ({"answers": 0}, "evaluation.answers=0"),
        ({"rows": -1}, "evaluation.rows=-1"),
        ({"temperature": -1.0}, "evaluation.temperature=-1.0"),
        ({"temperature": float("nan")}, "evaluation.temperature=nan"),
        ({"temperature": 0.0}, "all alike"),
        ({"seed": -1}, "evaluation.seed=-1"),
    ],
)
def test_options_are_checked(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(OPTIONS, **changes)


def test_what_only_the_page_does():
    """Training's small evaluations have budgets only; the page adds what the section says."""
    config = peak.get_config("brpo").unlock()
    config.evaluation.update({"start": True, "forks": "delimiters", "extensions": 2})
    plain = Options.from_config(config.evaluation)
    assert plain == Options(tuple(config.evaluation.budgets), 1, 8, 1.0, 0)
    options = plain.for_page(config)
    assert options.columns == (0, 1, 2, 3, 4), "episodes of two checks"
    assert (options.extensions, options.extension_tokens, options.extension_words[:2]) == (2, 12, ("a", "b"))
    config.evaluation.update({"forks": "blocks", "start": False})
    config.episodes.block = 10
    assert plain.for_page(config).columns == (1, 2, 3)
    for changes, said in (
        ({"forks": "words"}, "evaluation.forks='words' is unknown"),
        ({"forks": "paragraphs"}, "most=0"),
    ):
        config.evaluation.update(changes)
        with pytest.raises(ValueError, match=said):
            plain.for_page(config)


def test_greedy_takes_one_sample():
    assert Options(BUDGETS, 1, 1, 0.0, 0).temperature == 0


# Stop and resume.


def test_finished_parts_are_read_back(kept, tmp_path, monkeypatch):
    """Stopped after two parts: those are not sampled again, and the numbers are the same to the bit."""
    result, folder = kept
    write, written = completions.write, []

    def stop_after_two(path, lines):
        write(path, lines)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(completions, "write", stop_after_two)
        evaluate(epath.Path(tmp_path))
    again = evaluate(epath.Path(tmp_path))
    assert_same(again, result)
    assert again.tokens == result.tokens and 0 < again.new_tokens < again.tokens
    names = [path.name for path in sorted(folder.iterdir())]
    assert len(names) == 6 and names == [path.name for path in sorted(tmp_path.iterdir())]
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)
    assert evaluate(epath.Path(tmp_path)).new_tokens == 0


def test_a_write_that_was_cut_short_leaves_no_part(tmp_path, monkeypatch):
    def cut(path, data):
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    folder = epath.Path(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(folder), "write_bytes", cut)
        completions.write(completions.part_path(folder, 0), [{"id": 1}] * 100)
    assert not completions.part_path(folder, 0).exists()
    assert evaluate(folder, problems()[:2], traces=2, rows=2).new_tokens > 0


def test_damaged_and_foreign_parts_are_refused(kept, tmp_path):
    _, folder = kept
    path = epath.Path(tmp_path / "00000.jsonl.gz")
    whole = (folder / "00000.jsonl.gz").read_bytes()
    for data in (whole[:-20], b"no gzip", whole[:50] + b"\0\0\0\0" + whole[54:], gzip.compress(b'{"id": 1}\n{"id"')):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"00000.jsonl.gz is damaged .*remove it"):
            evaluate(epath.Path(tmp_path))
    path.write_bytes((folder / "00001.jsonl.gz").read_bytes())
    with pytest.raises(ValueError, match="does not hold the 10 traces of its part"):
        evaluate(epath.Path(tmp_path))


# What an evaluation belongs to.


def identity(weights=None, chosen=None, task=None, **changes):
    chosen = {"peak": chosen or problems()}
    options = dataclasses.replace(OPTIONS, **changes)
    return completions.identity(plan(), weights or params(), chosen, options, task or {"name": "peak"})


def test_another_evaluation_is_refused_with_its_differences(tmp_path):
    folder = epath.Path(tmp_path / "evaluation")
    completions.claim(folder, identity())
    completions.claim(folder, identity(seed=9))  # nothing was sampled yet
    completions.claim(folder, identity())
    completions.write(completions.part_path(folder / "completions" / "peak", 0), [{}])
    completions.claim(folder, identity())
    assert json.loads((folder / "options.json").read_text())["options"]["budgets"] == list(BUDGETS)
    with pytest.raises(ValueError) as error:
        completions.claim(folder, identity(seed=9, budgets=(2, 9), task={"name": "peak", "new": 1}))
    said = str(error.value)
    for words in ("options.seed: 3 there, 9 here", "[2,5,9] there, [2,9] here", "task.new: nothing there, 1 here"):
        assert words in said
    assert "parameters" not in said and "--out=DIR" in said


def test_fingerprint_sees_every_bit():
    """Any bit of any array, and two values that change places."""
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(7, 5)).astype(np.float32), "b": rng.normal(size=9).astype(jax.numpy.bfloat16)}
    seen = {completions.fingerprint(jax.tree.map(jax.numpy.asarray, tree))}
    for name, bits in (("a", np.uint32), ("b", np.uint16)):
        for _ in range(20):
            other = tree | {name: tree[name].copy()}
            flat = other[name].reshape(-1).view(bits)
            flat[rng.integers(flat.size)] ^= bits(1 << int(rng.integers(8 * flat.itemsize)))
            seen.add(completions.fingerprint(jax.tree.map(jax.numpy.asarray, other)))
    swapped = tree["a"].copy()
    swapped[0], swapped[1] = tree["a"][1], tree["a"][0]
    seen.add(completions.fingerprint({"a": jax.numpy.asarray(swapped), "b": jax.numpy.asarray(tree["b"])}))
    assert len(seen) >= 40  # 42, but for bits that were drawn twice
    again = completions.fingerprint(jax.tree.map(jax.numpy.asarray, tree))
    assert again in seen and completions.fingerprint(jax.tree.map(jax.numpy.asarray, tree)) == again


def test_problems_change_the_identity():
    changed = (dataclasses.replace(problems()[0], answers=("9", "8")), *problems()[1:])
    digests = {completions.digest(x) for x in (problems(), problems()[:-1], problems()[::-1], changed)}
    assert len(digests) == 4


# Every number, recomputed from the lines by loops.


def loops(lines, budgets, limits):
    """name -> list over problems of (above, below), lists where a metric has one number a budget."""
    problems = collections.defaultdict(list)
    for line in lines:
        problems[line["index"]].append(line)
    found = collections.defaultdict(list)
    for index in sorted(problems):
        traces = sorted(problems[index], key=lambda line: line["trace"])
        for name, pair in one_problem(traces, budgets, limits).items():
            found[name].append(pair)
    return found


def one_problem(traces, budgets, limits):
    n, S, answers = len(traces), range(len(budgets)), range(len(traces[0]["answers"][0]))
    score = lambda t, s: [answer["correct"] for answer in traces[t]["answers"][s]]  # noqa: E731
    accuracy = [np.mean([np.mean(score(t, s)) for t in range(n)]) for s in S]
    found = {"accuracy": accuracy, f"avg@{n}": accuracy, "anytime": np.mean(accuracy), "final": accuracy[-1]}
    k = 1
    while k <= n:
        found[f"pass@{k}"] = [np.mean([passes([score(t, s)[a] for t in range(n)], k) for a in answers]) for s in S]
        found[f"maj@{k}"] = [np.mean([majority([x["answers"][s][a] for x in traces], k) for a in answers]) for s in S]
        k *= 2
    for name, s in itertools.product(("overthinking", "formatted", "unfinished"), S):
        found.setdefault(name, []).append(np.mean([RATES[name](trace, s, budgets) for trace in traces]))
    for limit in limits:
        found[f"regret@{limit}"] = np.mean([regret(trace, limit) for trace in traces])
    points = [[(spent(trace, s), pooled(trace, s, is_right)) for s in S] for trace in traces]
    found["spent"] = [np.mean([trace[s][0] for trace in points]) for s in S]
    for name, best in (("", lambda trace: 1.0), ("_best", lambda trace: max(score for _, score in trace))):
        found[f"cumulative_regret{name}"] = [
            np.mean([sum(best(trace) - trace[j][1] for j in range(s + 1)) for trace in points]) for s in S
        ]
    k = 2
    while k <= len(answers):
        found[f"fork_maj@{k}"] = [np.mean([majority(trace["answers"][s], k) for trace in traces]) for s in S]
        more = [[pooled(trace, s, lambda x, t, answer: answer["tokens"]) for s in S] for trace in traces]
        found[f"fork_maj_tokens@{k}"] = [
            np.mean([point[s][0] + (k - 1) * extra[s] for point, extra in zip(points, more)]) for s in S
        ]
        k *= 2
    found["mean_length"] = np.mean([trace["tokens"] for trace in traces])
    found = {name: (value, np.ones(np.shape(value))) for name, value in found.items()}
    change = [np.mean([trace[s][1] - trace[s - 1][1] for trace in points]) if s else 0.0 for s in S]
    found["progress"] = (change, [min(s, 1) for s in S])
    right = [trace["tokens"] for t, trace in enumerate(traces) if np.mean(score(t, -1)) > 0.5]
    wrong = [trace["tokens"] for t, trace in enumerate(traces) if np.mean(score(t, -1)) <= 0.5]
    return found | {"mean_length_correct": (sum(right), len(right)), "mean_length_wrong": (sum(wrong), len(wrong))}


def passes(scores, k):
    """The share of subsets of k with a right one."""
    return np.mean([any(subset) for subset in itertools.combinations(scores, k)])


def majority(answers, k):
    """Groups of k neighbours vote; a tie is broken at random."""
    wins = []
    for i in range(len(answers) // k):
        votes = collections.Counter()
        for answer in answers[i * k : (i + 1) * k]:
            if answer["correct"]:
                votes["right"] += 1
            elif answer["answer"]:
                votes["wrong: " + answer["answer"]] += 1
        best = [vote for vote in votes if votes[vote] == max(votes.values())]
        wins.append(best.count("right") / len(best) if best else 0.0)
    return np.mean(wins)


def pooled(trace, s, value):
    same = [t for t in range(len(trace["forks"])) if trace["forks"][t] == trace["forks"][s]]
    return np.mean([value(trace, t, answer) for t in same for answer in trace["answers"][t]])


def is_right(trace, s, answer):
    return answer["correct"]


def overthinks(trace, s, budgets):
    now = pooled(trace, s, is_right)
    earlier = [t for t in range(s) if trace["forks"][t] < trace["forks"][s]]
    return any(pooled(trace, t, is_right) > now + 1e-9 for t in earlier)


RATES = {
    "overthinking": overthinks,
    "formatted": lambda trace, s, budgets: np.mean([answer["formatted"] for answer in trace["answers"][s]]),
    "unfinished": lambda trace, s, budgets: not (trace["ended"] and trace["tokens"] <= budgets[s]),
}


def spent(trace, s):
    """Tokens of prompt, prefix, insertion and one answer."""
    after = pooled(trace, s, lambda x, t, answer: x["inserted"][t] + answer["tokens"])
    return trace["prompt_tokens"] + trace["forks"][s] + after


def regret(trace, limit):
    """1 - area / limit under a curve from (0, 0), cut at the limit, flat behind its end."""
    xs, ys = [0.0], [0.0]
    for s in range(len(trace["forks"])):
        xs.append(max(xs[-1], spent(trace, s)))
        ys.append(pooled(trace, s, is_right))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(xs, ys)):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    area += max(limit - xs[-1], 0) * ys[-1]
    return 1 - area / limit


def ratio(pairs, weights):
    """Of sums over problems; `weights` [B], or [R, B] for many resamples."""
    above, below = (np.array([pair[i] for pair in pairs], float) for i in (0, 1))
    with np.errstate(invalid="ignore"):
        return np.tensordot(weights, above, 1) / np.tensordot(weights, below, 1)


def assert_equals_loops(record, lines, name, budgets=BUDGETS, limits=LIMITS, seed=OPTIONS.seed):
    """Values, and intervals as numpy's percentiles of the same resamples."""
    found = loops(lines, budgets, limits)
    number = len(next(iter(found.values())))
    counts = np.asarray(summary.counts_of(name, number, seed))
    assert counts.shape == (2000, number) and (counts.sum(axis=1) == number).all()
    for key, pairs in found.items():
        got, bounds = (np.array(record[name], float) for name in (key, f"{key}_ci95"))  # None becomes NaN
        np.testing.assert_allclose(got, ratio(pairs, np.ones(number)), rtol=1e-5, atol=1e-6, err_msg=key)
        with warnings.catch_warnings(action="ignore"):  # of what exists in no resample
            want = np.nanpercentile(ratio(pairs, counts), [2.5, 97.5], axis=0).T
        np.testing.assert_allclose(bounds, want, rtol=1e-4, atol=1e-5, err_msg=key)
    extra = {"problems", "tokens", "grading", "sets", "dropped"}
    measured = {key.removesuffix("_ci95") for key in record}
    assert set(found) <= measured and {key for key in measured - set(found) if "@" in key} == set()
    return measured - set(found) - extra


def test_every_number_equals_plain_loops(kept):
    result, folder = kept
    record = summary.summarize({"judge": result}, BUDGETS, OPTIONS.seed, LIMITS)
    lines = read_lines(folder)
    assert assert_equals_loops(record["sets"]["judge"], lines, "judge") == set()
    assert {key: record[key] for key in record["sets"]["judge"] if key in record and key != "problems"} == {
        key: value for key, value in record["sets"]["judge"].items() if key not in ("tokens", "grading", "problems")
    }, "with one set the top is that set"
    tokens = sum(x["tokens"] + sum(y["tokens"] for column in x["answers"] for y in column) for x in lines)
    assert record["sets"]["judge"]["tokens"] == tokens
    assert record["maj@1"] == pytest.approx(record["accuracy"]) == record["pass@1"]
    assert record["maj@4"] != pytest.approx(record["maj@2"]) and "pass@8" not in record
    assert json.loads(json.dumps(record, allow_nan=False)) == record


@pytest.mark.parametrize("seed", range(3))
def test_numbers_of_random_scores(seed):
    """Answers of several tokens, traces that share forks, shorter answers after longer prefixes, no model."""
    rng = np.random.default_rng(seed)
    budgets, number, n, answers = (3, 4, 20, 30), 6, 6, 3
    lines = []
    for index, trace in itertools.product(range(number), range(n)):
        length = int(rng.integers(1, 31))
        line = {"id": 50 - index, "index": index, "trace": trace, "prompt_tokens": 5 + index, "tokens": length}
        line |= {"ended": bool(rng.integers(2)) or length < 30, "eos": False, "text": ""}
        line |= {"forks": [min(b, length) for b in budgets], "inserted": [int(x) for x in rng.integers(1, 4, 4)]}
        line["answers"] = [[random_answer(rng) for _ in range(answers)] for _ in budgets]
        lines.append(line)
    result = evaluation._assemble([completions.columns(lines[:12]), completions.columns(lines[12:])], number, 0.0, 0)
    record = summary.summarize({"x": result}, budgets, seed, (9, 30, 100))
    assert_equals_loops(record, lines, "x", budgets, (9, 30, 100), seed)


def random_answer(rng):
    right = bool(rng.random() < 0.3)
    answer = str(rng.integers(3)) if right or rng.random() < 0.8 else ""
    return {
        "text": "",
        "answer": answer,
        "correct": int(right),
        "formatted": bool(rng.integers(2)),
        "tokens": int(rng.integers(1, 12)),
        "how": "text",
    }


def make(correct, length=None, ids=None):
    """An evaluation with these scores [B, n, S, A] and lengths [B, n]."""
    B, n, S, _ = correct.shape
    length = np.full((B, n), 9) if length is None else length
    return Evaluation(
        correct=correct.astype(np.float32),
        formatted=correct > 0,
        vote=np.where(correct > 0, 0, -1).astype(np.int32),
        answer_length=np.ones(correct.shape, np.int32),
        inserted=np.ones((B, n, S), np.int32),
        forks=np.minimum(length[..., None], np.arange(1, S + 1) * 3).astype(np.int32),
        length=length.astype(np.int32),
        ended=np.ones((B, n), bool),
        prompt_length=np.full(B, 4, np.int32),
        id=np.arange(B, dtype=np.uint32) if ids is None else np.asarray(ids, np.uint32),
        grading={"text": correct.size},
    )


def random_scores(seed, B, n=N, S=3, answers=A, p=0.4):  # few shapes: each compiles for seconds
    rng = np.random.default_rng(seed)
    return (rng.random((B, n, S, answers)) < p).astype(np.float32)


def test_the_mean_over_sets_is_unweighted():
    sets = {"few": make(random_scores(0, PROBLEMS, p=0.9)), "many": make(random_scores(1, 30, p=0.1))}
    record = summary.summarize(sets, (3, 6, 9), 0)
    few, many = (record["sets"][name] for name in sets)
    for key in ("accuracy", "anytime", "pass@4", "maj@4", "regret@9", "mean_length"):
        np.testing.assert_allclose(record[key], (np.array(few[key]) + many[key]) / 2, rtol=1e-6)
    assert record["problems"] == 30 + PROBLEMS and few["problems"] == PROBLEMS
    draws = [
        np.asarray(summary.counts_of(name, len(one.id), 0)) @ one.correct.mean(axis=(1, 2, 3)) / len(one.id)
        for name, one in sets.items()
    ]
    want = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
    np.testing.assert_allclose(record["anytime_ci95"], want, rtol=1e-4)
    alone = summary.summarize({"many": sets["many"]}, (3, 6, 9), 0)
    assert alone["anytime_ci95"] == many["anytime_ci95"], "a set's interval does not depend on the others"


def test_a_mean_of_nothing_is_none():
    """No trace is right: no mean length of the right ones. Few are: the interval is of resamples that have one."""
    zero = np.zeros((30, N, 3, A))
    record = summary.summarize({"x": make(zero)}, (3, 6, 9), 0)
    assert record["mean_length_correct"] is None and record["mean_length_correct_ci95"] == [None, None]
    assert record["mean_length_wrong"] == 9 and record["accuracy_ci95"] == [[0, 0]] * 3
    one = zero.copy()
    one[4, 1] = 1
    length = np.full((30, N), 9)
    length[4, 1] = 7
    record = summary.summarize({"x": make(one, length)}, (3, 6, 9), 0)
    assert record["mean_length_correct"] == 7 and record["mean_length_correct_ci95"] == [7, 7]
    record = summary.summarize({"x": make(one, length), "y": make(zero)}, (3, 6, 9), 0)
    assert record["mean_length_correct"] is None, "the mean over sets wants every set"


def test_intervals_of_the_mean_over_sets_cover():
    """Two sets of different sizes and rates: about 95 of 100 intervals hold the true mean, 0.5."""
    rng = np.random.default_rng(0)
    trials, covered = 200, 0
    counts = [summary.counts_of(name, size, 0) for name, size in (("a", 40), ("b", 90))]
    for _ in range(trials):
        found = [
            {"rate": summary.Metric.mean((rng.random(size) < p).astype(float))} for size, p in ((40, 0.3), (90, 0.7))
        ]
        draws = [summary.resample(one, drawn) for one, drawn in zip(found, counts)]
        low, high = summary.intervals(found[0], np.mean(draws, axis=0))["rate"]
        covered += low <= 0.5 <= high
    assert 0.90 <= covered / trials <= 0.985


def test_votes_are_classes_of_equal_answers():
    correct = np.array([[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], np.float32)
    answer = np.array([["7", "8", "", "7.0", "8", "9"], ["7", "7", "x", "", "x", "7"]], object)
    np.testing.assert_array_equal(evaluation.votes(correct, answer), [[0, 1, -1, 0, 1, 2], [1, 1, 2, -1, 2, 1]])


def test_scores_on_disk(kept, tmp_path):
    path = epath.Path(tmp_path / "scores.npz")
    sets = {"a": kept[0], "b": make(random_scores(0, 4, N, 3, A))}
    evaluation.save(path, sets)
    again = evaluation.load(path)
    assert list(again) == ["a", "b"]
    for name, one in again.items():
        for key, value in arrays(one).items():
            np.testing.assert_array_equal(value, getattr(sets[name], key))
    np.savez(tmp_path / "old.npz", correct=np.zeros(1), id=np.zeros(1))
    with pytest.raises(ValueError, match=r"lacks .*forks.*evaluate the run again"):
        evaluation.load(epath.Path(tmp_path / "old.npz"))


# Paired comparisons.


def evaluated(name, sets, **changes):
    about = {"budgets": [3, 6, 9], "traces": N, "answers": A, "temperature": 0.6, "evaluation_seed": 0}
    about["forks"] = "budgets"
    return comparison.Evaluated(name, about | {"regret_tokens": [9]} | changes, sets)


def test_differences_are_paired_by_problem():
    """The same problems in another order, and a few that only one side has."""
    a, b = random_scores(0, 30, p=0.5), random_scores(1, 30, p=0.45)
    ids = np.random.default_rng(2).permutation(30) + 103
    left = evaluated("a", {"x": make(a, ids=np.arange(100, 130))})
    right = evaluated("b", {"x": make(b, ids=ids)})
    record = comparison.compare(left, right)
    entry = record["sets"]["x"]
    assert (entry["problems"], entry["only_a"], entry["only_b"]) == (27, 3, 3)
    of_b = {int(i): row for i, row in zip(ids, b)}
    differences = np.array([a[i].mean() - of_b[100 + i].mean() for i in range(3, 30)])
    found = entry["metrics"]["anytime"]
    np.testing.assert_allclose(found["difference"], differences.mean(), atol=1e-6)
    np.testing.assert_allclose(found["a"] - found["b"], found["difference"])
    counts = np.asarray(summary.counts_of("x", 27, 0))
    np.testing.assert_allclose(found["ci95"], np.percentile(counts @ differences / 27, [2.5, 97.5]), atol=1e-5)
    assert record["metrics"] == entry["metrics"], "one set is the mean over sets"


def test_interval_is_that_of_the_paired_bootstrap():
    a, b = random_scores(3, 30), random_scores(4, 30, p=0.6)
    record = comparison.compare(evaluated("a", {"x": make(a)}), evaluated("b", {"x": make(b)}))
    means = [x.mean(axis=(1, 3), dtype=np.float64) for x in (a, b)]
    difference, low, high = anytime.paired_bootstrap(*means, jax.random.key(17))
    found = record["metrics"]["accuracy"]
    np.testing.assert_allclose(found["difference"], difference, atol=1e-6)
    np.testing.assert_allclose(found["ci95"], np.stack([low, high], 1), atol=0.02)  # other resamples


def test_pairing_narrows_and_equal_runs_do_not_differ():
    rng = np.random.default_rng(5)
    a = np.repeat((rng.random((30, 1, 1, 1)) < 0.5), N, axis=1).repeat(3, axis=2).repeat(2, axis=3).astype(float)
    b = np.where(rng.random(a.shape) < 0.05, 1 - a, a)
    sides = [evaluated(name, {"x": make(x)}) for name, x in (("a", a), ("b", b))]
    low, high = comparison.compare(*sides)["metrics"]["anytime"]["ci95"]
    assert high - low < 0.25 * np.diff(summary.summarize(sides[0].sets, (3, 6, 9), 0)["anytime_ci95"])[0]
    same = comparison.compare(sides[0], dataclasses.replace(sides[0], name="again"))
    for entry in same["metrics"].values():
        assert not np.any(np.nan_to_num(np.array(entry["difference"], float)))
        assert not np.any(np.nan_to_num(np.array(entry["ci95"], float)))


def test_sets_of_both_are_compared_and_the_others_named():
    sides = [
        evaluated(
            "a",
            {
                "x": make(random_scores(0, 30)),
                "y": make(random_scores(1, PROBLEMS)),
                "z": make(random_scores(2, PROBLEMS)),
            },
        ),
        evaluated("b", {"y": make(random_scores(3, PROBLEMS)), "x": make(random_scores(4, 30))}, temperature=1.0),
    ]
    record = comparison.compare(*sides)
    assert list(record["sets"]) == ["x", "y"]
    assert record["notes"] == ["temperature: 0.6 and 1.0", "only a has z: left out"]
    each = [record["sets"][name]["metrics"]["final"]["difference"] for name in ("x", "y")]
    np.testing.assert_allclose(record["metrics"]["final"]["difference"], np.mean(each))
    text = comparison.table(record)
    assert "x (30 problems)" in text and "mean over sets" in text and "note: only a has z" in text
    for words in ("accuracy at 3", "pass@4 at 9", "maj@4 at 9", "mean_length_correct", "regret@9", "overthinking at 9"):
        assert text.count(words) == 3
    assert all(
        len(line) == len(lines[0])
        for block in text.split("\n\n")[1:4]
        for lines in [block.split("\n")]
        for line in lines
    )


def test_what_cannot_be_compared_is_refused():
    x = {"x": make(random_scores(0, 30))}
    a = evaluated("a", x)
    for other, said in (
        (evaluated("b", x, budgets=[3, 6, 12]), r"budgets differ: a has \[3, 6, 9\], b has \[3, 6, 12\].*--budgets"),
        (evaluated("b", x, forks="episodes"), "forks differ: a has budgets, b has episodes.*--forks"),
        (evaluated("b", x, traces=8), "traces differ: a has 5, b has 8.*--traces"),
        (evaluated("b", {"y": x["x"]}), r"no set is shared: a has \['x'\], b has \['y'\]"),
        (evaluated("b", {"x": make(random_scores(0, 30), ids=range(50, 80))}), "share no problem"),
    ):
        with pytest.raises(ValueError, match=said):
            comparison.compare(a, other)
