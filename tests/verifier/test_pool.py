"""Real worker processes, and every way in which a comparison can go wrong."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from tto_jax.bench import grading as bench_grading
from tto_jax.verifier import pool as pool_module
from tto_jax.verifier.pool import Pool, Verdict

MISBEHAVING = (str(Path(__file__).with_name("misbehaving_worker.py")),)
RIGHT, WRONG = Verdict(True, "symbolic"), Verdict(False, "symbolic")
TIMEOUT, CRASH = Verdict(False, "timeout"), Verdict(False, "crash")


@pytest.fixture
def undecided(monkeypatch):
    """Every pair needs a worker."""
    monkeypatch.setattr(pool_module.equality, "decide", lambda answer, reference: None)


@pytest.fixture(scope="module")
def shared():
    with Pool(2, cpu_seconds=0.5, wall_seconds=60.0, memory_mb=64, _program=MISBEHAVING) as pool:
        yield pool


def processes(pool: Pool) -> list[subprocess.Popen]:
    return [worker._process for worker in pool._workers]


def judge(pool: Pool, *answers: str, reference: str = "1") -> list[Verdict]:
    return pool.judge([(answer, (reference,)) for answer in answers])


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        ("spin in python", TIMEOUT),
        ("spin in c", TIMEOUT),
        ("segfault", CRASH),
        ("leave", CRASH),
        ("killed from outside", CRASH),
        ("raise exit", CRASH),
        ("raise error", CRASH),
        ("big block", CRASH),
        ("big list", CRASH),
        ("recurse", CRASH),
        ("recurse in c", CRASH),
        ("noise", RIGHT),
        ("disarm", RIGHT),
        ("see surroundings", RIGHT),
    ],
)
def test_one_misbehaves_and_the_others_are_judged(act, expected, shared, undecided, monkeypatch):
    monkeypatch.setenv("TTO_SECRET", "x")
    before = [str(i) for i in range(7)]
    started = time.monotonic()
    # References differ between the cases: nothing is remembered from another one.
    assert judge(shared, *before, act, "x", act, "8", reference=act + "1") == [
        *[WRONG] * 7,
        expected,
        WRONG,
        expected,
        WRONG,
    ]
    assert judge(shared, act + "2", "spin in python", reference=act + "2") == [RIGHT, TIMEOUT]
    assert judge(shared, "9", reference="9" + act) == [WRONG]
    assert time.monotonic() - started < 120
    assert len(processes(shared)) <= 2


@pytest.mark.parametrize("act", ["spin in python", "spin in c"])
def test_what_computes_ends_by_its_cpu_time(act, undecided):
    with Pool(1, cpu_seconds=0.2, wall_seconds=500.0, _program=MISBEHAVING) as pool:
        started = time.monotonic()
        assert judge(pool, "1", "disarm", act, "2") == [RIGHT, RIGHT, TIMEOUT, WRONG]
        assert time.monotonic() - started < 100
        assert (act, "1") in pool._remembered


@pytest.mark.parametrize("act", ["wait", "stop"])
def test_what_waits_without_computing_ends_by_the_wall_clock(act, undecided):
    with Pool(1, cpu_seconds=0.2, wall_seconds=0.5, _program=MISBEHAVING) as pool:
        assert judge(pool, "1", act, "2") == [RIGHT, TIMEOUT, WRONG]
        assert not any(answer == act for answer, _ in pool._remembered), "the machine may have been at fault"


def test_a_worker_that_kept_memory_is_replaced(undecided):
    """Four times 600 MB would not fit: the last comparisons would fail for what the first ones left behind."""
    with Pool(1, memory_mb=1024, _program=MISBEHAVING) as pool:
        assert [judge(pool, "keep some", reference=str(i)) for i in range(4)] == [[RIGHT]] * 4


def test_files_are_out_of_reach(tmp_path, undecided):
    with Pool(1, _program=MISBEHAVING) as pool:
        assert judge(pool, "write file", reference=str(tmp_path / "file")) == [CRASH]
    assert (tmp_path / "file").stat().st_size == 0


def test_many_hostile_answers_in_a_row(undecided, monkeypatch):
    """Each kills its worker; that is what the pool is for, and no reason to give up."""

    def slowly(self):  # some die after the pool has looked and before it hands out work again
        written = awaited(self)
        time.sleep(0.05)
        return written

    awaited = Pool._awaited
    monkeypatch.setattr(Pool, "_awaited", slowly)
    with Pool(2, _program=MISBEHAVING) as pool:
        items = [("leave", (str(i),)) for i in range(12)]
        assert pool.judge([*items, ("3", ("3",))]) == [CRASH] * 12 + [RIGHT]


def test_real_comparisons_and_order():
    items = [
        (r"\frac{1}{2}", ("0.5",)),
        (r"\sqrt{12}", (r"2\sqrt{3}",)),
        (r"\sqrt{12}", (r"3\sqrt{2}",)),
        ("7", ("7",)),
        (r"x^2+2x+1", ("(x+1)^2",)),
        ("9", ("7", "8", "9")),
        (r"\frac{\sqrt{2}}{2}", (r"\frac{1}{3}", r"\frac{1}{\sqrt{2}}")),
        ("7", ("8",)),
    ]
    with Pool(2) as pool:
        verdicts = pool.judge(items)
        assert [verdict.correct for verdict in verdicts] == [True, True, False, True, True, True, True, False]
        assert verdicts[3] == Verdict(True, "text")
        assert verdicts[6].how == "symbolic"
        assert pool.judge(items[::-1]) == verdicts[::-1]
        assert pool.judge([]) == []


def test_answers_that_text_decides_start_no_worker():
    with Pool(_program=("-c", "raise SystemExit('started')")) as pool:
        assert judge(pool, "42", " 42 ", "41", reference="42") == [Verdict(True, "text")] * 2 + [Verdict(False, "text")]
        assert processes(pool) == []


def test_equal_pairs_are_compared_once_and_remembered(undecided):
    with Pool(2, _program=MISBEHAVING) as pool:
        sent = []
        pool_module_send = pool_module._Worker.send

        def send(self, pair, seconds):
            sent.append(pair)
            pool_module_send(self, pair, seconds)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pool_module._Worker, "send", send)
            assert judge(pool, *["1", "2", "leave"] * 5) == [RIGHT, WRONG, CRASH] * 5
            assert judge(pool, *["2", "1", "leave"] * 5) == [WRONG, RIGHT, CRASH] * 5
            assert sorted(sent) == [("1", "1"), ("2", "1"), ("leave", "1")]
            long = "1" * 10**6
            assert judge(pool, long, reference=long) == [RIGHT]
            assert (long, long) not in pool._remembered


def test_the_memory_of_verdicts_is_bounded(undecided, monkeypatch):
    monkeypatch.setattr(pool_module, "_REMEMBERED_PAIRS", 3)
    with Pool(1, _program=MISBEHAVING) as pool:
        judge(pool, "1", "2", "3")
        judge(pool, "1")  # used again: outlives "2"
        judge(pool, "4")
        assert [answer for answer, _ in pool._remembered] == ["3", "1", "4"]


def test_any_right_reference_will_do(undecided):
    with Pool(2, cpu_seconds=0.3, _program=MISBEHAVING) as pool:
        assert pool.judge([("5", ("4", "5")), ("5", ("3", "2")), ("leave", ("1", "2"))]) == [RIGHT, WRONG, CRASH]


@pytest.mark.parametrize("text", ["\0", "\ud800", "é\u2028\n\r", "\\", '"}', "a" * 10**6])
def test_any_text_arrives_as_it_is(text, shared, undecided):
    assert shared.judge([(text, (text,)), (text, (text + "x",))]) == [RIGHT, WRONG]


def test_a_worker_that_died_while_idle_costs_nothing(undecided):
    with Pool(1, _program=MISBEHAVING) as pool:
        judge(pool, "1")
        [process] = processes(pool)
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert judge(pool, "2", "3", reference="3") == [WRONG, RIGHT]


def test_a_busy_machine_does_not_decide(undecided):
    """0.3 s of computing takes far longer than the deadline of 0.5 s here, but not in CPU time."""
    spinning = [sys.executable, "-c", "while True: pass"]
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(Pool(1, cpu_seconds=0.5, wall_seconds=60.0, _program=MISBEHAVING))
        judge(pool, "1")
        [process] = processes(pool)
        core = {min(os.sched_getaffinity(0))}
        os.sched_setaffinity(process.pid, core)
        for _ in range(4):
            other = stack.enter_context(subprocess.Popen(spinning))
            stack.callback(other.kill)
            os.sched_setaffinity(other.pid, core)
        started = time.monotonic()
        assert judge(pool, "spin briefly") == [RIGHT]
        assert time.monotonic() - started > 0.5, "the machine was not busy: nothing was tested"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import no_such_module_here", "No module named 'no_such_module_here'"),
        ("import os; os._exit(3)", "code 3"),
        ("import sys; sys.exit('antlr is of another version')", "antlr is of another version"),
    ],
)
def test_a_worker_that_cannot_start_is_an_error(program, said, undecided):
    with Pool(2, _program=("-c", program)) as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=said):
                judge(pool, "1")
        assert processes(pool) == []


def test_a_worker_that_never_starts_is_an_error(undecided, monkeypatch):
    monkeypatch.setattr(pool_module, "_START_SECONDS", 0.5)
    program = ("-c", "import time; time.sleep(100)")
    with Pool(1, _program=program) as pool, pytest.raises(RuntimeError, match=r"took 0\.5 s"):
        judge(pool, "1")


@pytest.fixture
def interruptible():
    """Processes that tests are shared among ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_leaves_no_process(undecided, interruptible):
    with Pool(2, cpu_seconds=30.0, wall_seconds=60.0, _program=MISBEHAVING) as pool:
        judge(pool, "1", "2")
        pids = [process.pid for process in processes(pool)]
        timer = threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,))
        started = time.monotonic()
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            judge(pool, "wait", "spin in python")
        assert time.monotonic() - started < 5
        timer.join()
        for pid in pids:
            with pytest.raises(ChildProcessError):  # reaped
                os.waitpid(pid, os.WNOHANG)
        assert judge(pool, "3", "4", reference="4") == [WRONG, RIGHT]


def test_close_kills_and_a_closed_pool_refuses(undecided):
    pool = Pool(2, _program=MISBEHAVING)
    judge(pool, "1", "2", "3", "4")
    ended = processes(pool)
    assert all(os.getsid(process.pid) == process.pid for process in ended), "Ctrl-C would make crashes of answers"
    pool.close()
    pool.close()
    assert [process.returncode for process in ended] == [-signal.SIGKILL] * 2
    with pytest.raises(ValueError, match="closed"):
        judge(pool, "1")


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"workers": 0}, "workers=0"),
        ({"cpu_seconds": 0.0}, "cpu_seconds=0.0"),
        ({"memory_mb": -1}, "memory_mb=-1"),
        ({"cpu_seconds": float("nan")}, "cpu_seconds=nan"),
        ({"cpu_seconds": 3.0, "wall_seconds": 2.0}, "at least cpu_seconds=3.0"),
        ({"wall_seconds": float("inf")}, "wall_seconds=inf"),
    ],
)
def test_impossible_limits_are_refused(limits, said):
    with pytest.raises(ValueError, match=said):
        Pool(**limits)


@pytest.mark.parametrize("item", [("7", "12"), ("7", []), ("7", ()), ("7", None), (None, ("1",)), ("7", (1,))])
def test_malformed_items_are_refused(item, shared):
    with pytest.raises(ValueError, match="item 1"):
        shared.judge([("1", ("1",)), item])


PARENT = """
import sys, threading, time
from tto_jax.verifier import pool
pool.equality.decide = lambda answer, reference: None
judges = pool.Pool(1, cpu_seconds=1.0, wall_seconds=3.0, _program=(sys.argv[1],))
judges.judge([("1", ("1",))])
threading.Thread(target=judges.judge, args=([(sys.argv[2], ("1",))],), daemon=True).start()
time.sleep(0.2)
print(judges._workers[0]._process.pid, judges._workers[0].pair is not None, flush=True)
sys.stdin.read() if sys.argv[3] == "killed" else None
"""


@pytest.mark.parametrize("end", ["killed", "returns"])
@pytest.mark.parametrize(("act", "busy"), [("spin in c", True), ("wait", True), ("2", False)])
def test_workers_end_with_their_parent(act, busy, end):
    command = [sys.executable, "-c", PARENT, *MISBEHAVING, act, end]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        pid, was_busy = parent.stdout.readline().split()
        assert was_busy == str(busy)
        if end == "killed":
            assert running(int(pid))
            parent.kill()
    deadline = time.monotonic() + 10
    while running(int(pid)):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def running(pid: int) -> bool:
    """Not gone, and not a zombie that nobody reaps."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_real_worker_holds_no_array_library(undecided):
    with Pool(1, _program=MISBEHAVING, cpu_seconds=20.0) as pool:
        assert judge(pool, "see heavy modules", reference=r"\frac{1}{\sqrt{2}};\frac{\sqrt{2}}{2}") == [RIGHT]


def test_from_a_program_with_jax_and_threads():
    """No fork of that program: jax warns of one, and here a warning is an error."""
    program = textwrap.dedent(
        r"""
        import threading, jax, jax.numpy as jnp
        from tto_jax.verifier.pool import Pool
        float(jax.jit(jnp.sum)(jnp.ones(3)))
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        results = []
        def judge():
            results.append(pool.judge([(r"\sqrt{12}", (r"2\sqrt{3}",)), (r"\sqrt{13}", (r"2\sqrt{3}",))]))
        with Pool(2) as pool:
            threads = [threading.Thread(target=judge) for _ in range(3)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
        print([[verdict.correct for verdict in result] for result in results])
        """
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str([[True, False]] * 3), done.stderr


def references_of(folder):
    """The answers of MATH's training problems."""
    records = json.loads((folder / "deepscaler" / "train" / "math.json").read_text())
    return [record["answer"] for record in records if record["answer"]]


REFERENCES = [
    r"\frac{12}{13}",
    "-27",
    r"3\sqrt{2}",
    "(1,8)",
    "120",
    r"\frac{\pi}{6}",
    "0.45",
    r"2^{10}-1",
    "4x^2-2x+1",
    "17",
]


def test_a_step_is_graded_alike_with_hostile_answers_in_it():
    plain = bench_grading.workload(REFERENCES, seed=3, problems=8, answers=64)
    hostile = bench_grading.workload(REFERENCES, seed=3, problems=8, answers=64, hostile=6)
    replaced = [a != b for a, b in zip(plain, hostile)]
    assert sum(replaced) == 6
    with Pool(2, cpu_seconds=1.0) as pool:
        expected, verdicts = pool.judge(plain), pool.judge(hostile)
    for item, verdict, other, hidden in zip(plain, verdicts, expected, replaced):
        assert not verdict.correct if hidden else verdict == other
        assert other.correct or hidden or item[0] not in bench_grading.spellings(*item[1])
        assert other.how in ("text", "symbolic")
    assert 0.2 < sum(verdict.correct for verdict in expected) / len(plain) < 0.65


def test_a_step_of_real_answers_in_time(real_data):
    """8,192 answers of MATH; what is right by construction is judged right, and again from memory."""
    references = references_of(real_data)
    items = bench_grading.workload(references, seed=0)
    used = cpu_seconds()
    with Pool() as pool:
        verdicts = pool.judge(items)
        assert pool.judge(items) == verdicts
    assert len(items) == 8192
    assert cpu_seconds() - used < 20  # not of the wall clock: other tests may run beside this one
    assert all(
        verdict.correct for item, verdict in zip(items, verdicts) if item[0] in bench_grading.spellings(*item[1])
    )


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def test_every_spelling_of_real_answers_is_right(real_data):
    references = references_of(real_data)[::10]
    items = [(spelling, (reference,)) for reference in references for spelling in bench_grading.spellings(reference)]
    with Pool() as pool:
        wrongly = [item for item, verdict in zip(items, pool.judge(items)) if not verdict.correct]
    assert len(items) > 1500 and wrongly == []
