"""What users can get wrong on the pages and in the settings, and what they are told, before any work.

The table below is also `tests/misuse_table.md`; `python tests/test_misuse.py` writes it anew.
"""

import contextlib
import dataclasses
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from absl import flags
from etils import epath
from ml_collections import config_flags

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("misuse_table.md")
UNKNOWN = "unknown: choose one of"


class Refused(Exception):
    """A page's process, or a page with argparse, ended with this message."""


@dataclasses.dataclass(frozen=True)
class Misuse:
    """One row: what is wrong, how it is typed, and what the message must hold: the value, the rule, the choices."""

    title: str
    typed: str
    said: tuple[str, ...]
    run: Callable[[Path], None]  # of an empty folder
    prepare: Callable[[Path], None] = lambda folder: None


def parsed(experiment: str, *options: str):
    """The configuration as the page reads it, `experiment` being `peak.py:brpo,fast` and the like."""
    argv = ["train", f"--config={ROOT}/configs/{experiment}", *options]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, lock_config=True, flag_values=values, sys_argv=argv)
    values(argv)
    return holder.value


def build(config) -> None:
    from tto_jax import settings

    settings.build(config)


def option(title, options, *said, experiment="peak.py:brpo,fast"):
    """Options of the training page."""
    typed = [f"--config.{x}" for x in options.split()]
    shown = " ".join(([] if experiment == "peak.py:brpo,fast" else [f"--config=configs/{experiment}"]) + typed)
    return Misuse(title, shown, said, lambda folder: build(parsed(experiment, *typed)))


def written(title, typed, edit, *said):
    """An experiment's file of one's own: peak.py with `edit`."""

    def run(folder):
        config = parsed("peak.py:brpo,fast")
        with config.unlocked(), config.ignore_type():
            edit(config)
        build(config)

    return Misuse(title, typed, said, run)


def process(title, arguments, *said, prepare=lambda folder: None):
    """A page as a process; FOLDER stands for a folder of its own."""

    def run(folder):
        words = [word.replace("FOLDER", str(folder)) for word in arguments.split()]
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise Refused(done.stdout + done.stderr)

    return Misuse(title, f"python -m {arguments}", said, run, prepare)


def in_process(title, module, arguments, *said, prepare=lambda folder: None):
    """A page that reads its options by argparse."""

    def run(folder):
        import importlib

        text = io.StringIO()
        page = importlib.import_module(module)
        try:
            with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
                page.main([word.replace("FOLDER", str(folder)) for word in arguments.split()])
        except SystemExit as error:
            raise Refused(f"{text.getvalue()}{error.code}") from error

    return Misuse(title, f"python -m {module} {arguments}", said, run, prepare)


def star_option(title, options, *said):
    """Options of the page of STaR."""

    def run(folder):
        from tto_jax import star

        star.build(parsed("star.py:peak,fast", *typed))

    typed = [f"--config.{x}" for x in options.split()]
    return Misuse(title, " ".join(["python -m tto_jax.star --config=configs/star.py:peak,fast", *typed]), said, run)


def claim(folder: Path) -> None:
    """A run that has begun and holds no checkpoint."""
    from tto_jax import checkpoint

    checkpoint.claim_workdir(folder / "run", parsed("peak.py:brpo,fast").to_dict())


def resume_with(*options):
    """The training page on the run of `claim`, up to where work would begin."""

    def run(folder):
        from tto_jax import settings, train

        def work(*_):
            raise AssertionError("work began")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.warm_start, "get", work)
            flags.FLAGS.mark_as_parsed()
            config = parsed(*options)
            train.train(config, settings.build(config), epath.Path(folder / "run"))

    return run


MISUSES = (
    # The command line.
    process(
        "an option that does not exist",
        "tto_jax.train --config=configs/peak.py --workdir=FOLDER/run --config.rollout.grup_size=4",
        *("grup_size", 'Did you mean "group_size"'),
    ),
    option("an option of another task", "task.num_value=3", "num_value", 'Did you mean "num_values"'),
    option("a number that is none", "rollout.group_size=four", "--config.rollout.group_size=four", "invalid literal"),
    option("a fraction for a count", "steps=1.5", "--config.steps=1.5", "invalid literal for int"),
    option("a variant that does not exist", "", "'ppo'", "choose one of", "'brpo_linear'", experiment="peak.py:ppo"),
    option("two algorithms at once", "", "'brpo,grpo'", "choose one of", "two_digits", experiment="chain.py:brpo,grpo"),
    option("a modifier that does not exist", "", "'brpo,slow'", "('fast', ", experiment="peak.py:brpo,slow"),
    option("an experiment that does not exist", "", "chess.py", "No such file", experiment="chess.py"),
    process("no folder for the run", "tto_jax.train --config=configs/peak.py", "--workdir is missing", "--dry_run"),
    # Sizes of a run.
    option("no steps", "steps=0", "steps=0", "at least 1"),
    option("a negative seed", "seed=-1", "seed=-1", "[0, 2**32)"),
    option("no training problems", "data.problems=0", "data.problems=0", "at least 1"),
    option(
        "no problems in a step",
        "rollout.problems=0",
        *("rollout.problems=0", "at least 1"),
    ),
    option("no traces of a problem", "rollout.group_size=0", "rollout.group_size=0", "positive"),
    option("no answers at a fork", "rollout.answers=0", "rollout.answers=0", "positive"),
    option("segments of no tokens", "rollout.segment=0", "rollout.segment=0", "positive"),
    option("greedy training", "rollout.temperature=0", "rollout.temperature=0", "no log-prob", "choose 1.0"),
    option("a negative temperature", "rollout.temperature=-1", "temperature=-1", "positive", "1.0"),
    # Budgets.
    option("budgets that repeat", "budgets.tokens=(6,12,12)", "(6, 12, 12)", "strictly increase"),
    option("budgets that decrease", "budgets.tokens=(24,12)", "(24, 12)", "strictly increase"),
    option("a budget of no tokens", "budgets.tokens=(0,12)", "(0, 12)", "positive"),
    option("no budgets", "budgets.tokens=()", "()", "non-empty"),
    option("half a token", "budgets.tokens=(6,12.5)", "(6, 12.5)", "integers"),
    option(
        "a budget beyond the context",
        "budgets.tokens=(6,12,200)",
        *("budgets.tokens=(6, 12, 200)", "model.max_position=128", "at most 99"),
    ),
    option(
        "a spacing that does not exist",
        "budgets.spacing=log",
        *("budgets.spacing='log'", UNKNOWN, "'uniform'", "'exponential'"),
    ),
    option("a number of budgets that are given", "budgets.count=4", "budgets.count=4", "'given'", "'uniform'"),
    option("a spacing of no budgets", "budgets.spacing=uniform", "budgets.count=0", "last=24", "at least 1 budget"),
    option(
        "spaced budgets that fall together",
        "budgets.spacing=exponential budgets.count=9",
        *("budgets.count=9", "last=24", "choose fewer"),
    ),
    option(
        "budgets that do not grow",
        "budgets.spacing=exponential budgets.count=2 budgets.ratio=1.0",
        *("ratio=1.0", "above 1"),
    ),
    option(
        "a spacing without a last budget",
        "budgets.spacing=uniform budgets.count=2 budgets.tokens=()",
        *("budgets.tokens=()", "'uniform'", "last budget"),
    ),
    option("a prior that does not exist", "budgets.prior=quadratic", "prior='quadratic'", UNKNOWN, "'linear'"),
    written(
        "a weight too few in the prior",
        "config.budgets.prior = (1, 2, 1)",
        lambda config: config.budgets.update(prior=(1, 2, 1)),
        *("prior=(1, 2, 1)", "(3,)", "(4,)", "one weight a budget"),
    ),
    written(
        "a negative weight in the prior",
        "config.budgets.prior = (1, -1, 1, 1)",
        lambda config: config.budgets.update(prior=(1, -1, 1, 1)),
        *("-1", "non-negative"),
    ),
    # Credit.
    option("an estimator that does not exist", "credit.estimator.kind=ppo", "'ppo'", UNKNOWN, "'brpo'", "'mrt'"),
    option("answers credit that does not exist", "credit.answers=all", "credit.answers='all'", UNKNOWN, "'none'"),
    option(
        "an answer weight that does not exist",
        "credit.answer_weight=mean",
        *("credit.answer_weight='mean'", UNKNOWN, "('code', 'paper')"),
    ),
    option(
        "GRPO without a group",
        "rollout.group_size=1",
        *("rollout.group_size=1", "'grpo'", "zero", "2 or more"),
        experiment="peak.py:grpo,fast",
    ),
    option("MRT without a group", "rollout.group_size=1", "'mrt'", "zero", "2 or more", experiment="peak.py:mrt,fast"),
    option(
        "progress before any thinking is sampled",
        "credit.estimator.kind=progress_gae",
        *("credit.estimator.kind='progress_gae'", "before any thinking", "rollout.start=True", "'mrt'"),
    ),
    option(
        "weights of progress that do not exist",
        "credit.estimator.progress_weights=prior",
        *("progress_weights='prior'", UNKNOWN, "('tail', 'ones')"),
    ),
    option("a deviation that BRPO does not have", "credit.estimator.std=True", "std=True", "'brpo'", "'grpo'"),
    option(
        "a fitted baseline that would be biased",
        "credit.baseline_fit=0.9",
        *("credit.baseline_fit=0.9", "leave_one_out=False", "leave_one_out=True"),
    ),
    option(
        "a fit that forgets nothing and more",
        "credit.baseline_fit=1.1",
        *("credit.baseline_fit=1.1", "[0, 1]", "0.9"),
    ),
    option(
        "values of forks that do not exist",
        "credit.fork_values=judge",
        *("credit.fork_values='judge'", UNKNOWN, "('scores', 'reference')"),
    ),
    option(
        "a rule of episodes that does not exist",
        "episodes.rule=sentences",
        *("episodes.rule='sentences'", UNKNOWN, "'delimiters'"),
    ),
    option(
        "a prior by tokens over episodes",
        "episodes.rule=blocks episodes.block=6 budgets.prior=linear",
        *("budgets.prior='linear'", "over episodes", "'base'"),
    ),
    option("a prefix baseline of no weight", "credit.estimator.decay=0", "decay=0.0", "0 < decay <= 1", "0.5"),
    option("a discount above one", "credit.estimator.gamma=1.5", "gamma=1.5", "[0, 1]"),
    option("a penalty above one", "credit.length_penalty=2", "credit.length_penalty=2.0", "[0, 1]", "0.2"),
    option(
        "a whole penalty", "credit.relative_length_penalty=1", "credit.relative_length_penalty=1.0", "[0, 1)", "0.2"
    ),
    option("a margin of all budgets", "credit.overlong_margin=90", "credit.overlong_margin=90", "last budget", "24"),
    option("fewer rollouts than one", "rollout.resample=-1", "rollout.resample=-1", "beside the first", "2"),
    # Prefixes.
    option("copies of the policy that are never made", "prefix.every=-1", "prefix.every=-1", "0 for no prefixes", "20"),
    option(
        "a prefix of the longest trace",
        "prefix.every=20 prefix.tokens=24",
        *("prefix.tokens=24", "1 to 23", "below the last budget"),
    ),
    option(
        "a rule of prefixes that does not exist",
        "prefix.every=20 prefix.rule=sentences",
        *("prefix.rule='sentences'", UNKNOWN, "'blocks'"),
    ),
    option(
        "a prefix without an episode",
        "prefix.every=20 prefix.rule=blocks episodes.block=19",
        *("prefix.tokens=18", "episodes.block=19", "1 to 18"),
    ),
    option(
        "a prefix before every budget",
        "prefix.every=20 prefix.rule=budgets prefix.tokens=5",
        *("prefix.tokens=5", "(6, 12, 18, 24)", "at least 6", "'delimiters'"),
    ),
    option(
        "a prefix beyond the context",
        "prefix.every=20 model.max_position=60",
        *("budgets.tokens=(6, 12, 18, 24)", "prefix", "model.max_position=60", "at most 13"),
    ),
    option(
        "prefixes of problems that are replaced",
        "rollout.resample=2 prefix.every=20",
        *("rollout.resample=2", "prefix.every=20", "choose 0"),
    ),
    # The update.
    option(
        "minibatches that do not divide",
        "learner.minibatches=5",
        *("learner.minibatches=5", "rollout.problems=32", "(1, 2, 4, 8, 16, 32)"),
    ),
    option(
        "micro-batches of less than nothing",
        "learner.micro_tokens=-1",
        *("micro_tokens=-1", "0 for all rows"),
    ),
    option("an update without row lengths", "learner.buckets=0", "buckets=0", "at least one bucket"),
    option("a negative lower clip", "learner.clip_low=-0.1", "clip_low=-0.1", "0 <= low <= 1"),
    option("a negative upper clip", "learner.clip_high=-1", "clip_high=-1.0", "high >= 0"),
    option("a negative KL", "learner.kl=-0.1", "kl=-0.1", "0"),
    option(
        "a KL estimator that does not exist",
        "learner.kl_estimator=k4",
        "kl_estimator='k4'",
        UNKNOWN,
        "('k1', 'k2', 'k3')",
    ),
    option(
        "a normalizer that does not exist",
        "learner.normalizer=tokens",
        *("learner.normalizer='tokens'", UNKNOWN, "('constant', 'released')"),
    ),
    option(
        "a loss over nothing",
        "learner.tokens_per_row=0",
        *("learner.tokens_per_row=0", "at least 1"),
    ),
    option("a negative learning rate", "learner.optimizer.learning_rate=-1", "learning_rate=-1.0", "positive", "1e-6"),
    option("no gradient at all", "learner.optimizer.grad_clip=0", "grad_clip=0.0", "positive", "1.0"),
    option(
        "a schedule that does not exist",
        "learner.optimizer.schedule=linear",
        *("schedule='linear'", UNKNOWN, "('constant', 'cosine')"),
    ),
    option(
        "a cosine shorter than its warm-up",
        "steps=2 learner.optimizer.schedule=cosine",
        *("decay_steps=4", "longer than warmup_steps=5"),
    ),
    option(
        "a negative warm-up",
        "learner.optimizer.warmup_steps=-1",
        *("warmup_steps=-1", "0"),
    ),
    option("a momentum of one", "learner.optimizer.b1=1", "b1=1.0", "[0, 1)"),
    # The model.
    option("a dtype that does not exist", "model.dtype=float16", "model.dtype='float16'", UNKNOWN, "'bfloat16'"),
    option("a remat that does not exist", "model.remat=all", "model.remat='all'", UNKNOWN, "'dots'"),
    option(
        "KV heads that do not divide",
        "model.num_kv_heads=3",
        *("model.num_kv_heads=3", "does not divide num_heads=4", "(1, 2, 4)"),
    ),
    option("a head of odd size", "model.head_dim=15", "model.head_dim=15", "even"),
    option("no layers", "model.num_layers=0", "model.num_layers=0", "positive"),
    option(
        "a context shorter than the demonstrations",
        "model.max_position=40 budgets.tokens=(3,6) evaluation.budgets=(3,6)",
        *("model.max_position=40", "demonstrations", "at least 53"),
    ),
    # Tasks and the warm start.
    option("a task that does not exist", "task.name=sudoku", "'sudoku'", "unknown", "peak, chain"),
    written(
        "a field that the task does not have",
        "config.task.num_digits = 3",
        lambda config: config.task.update(num_digits=3),
        *("'peak' has no field num_digits", "the choices are num_values"),
    ),
    option("more values than letters", "task.num_values=30", "num_values=30", "2..26"),
    option("no warm start", "warm_start.steps=0", "warm_start.steps=0", "at least 1"),
    option(
        "a warm start shorter than its warm-up",
        "warm_start.steps=10",
        *("decay_steps=10", "longer than warmup_steps=50"),
    ),
    option(
        "a schedule of the warm start that does not exist",
        "warm_start.optimizer.schedule=linear",
        *("schedule='linear'", UNKNOWN),
    ),
    option("a negative seed of the warm start", "warm_start.seed=-1", "warm_start.seed=-1", "[0, 2**32)"),
    # Evaluation, checkpoints, logs.
    option(
        "evaluation beyond the context",
        "evaluation.budgets=(6,100)",
        *("evaluation.budgets=(6, 100)", "model.max_position=128", "at most 99"),
    ),
    option(
        "evaluation budgets that repeat",
        "evaluation.budgets=(6,6)",
        *("evaluation.budgets=(6, 6)", "strictly increase"),
    ),
    option("evaluation without answers", "evaluation.answers=0", "evaluation.answers=0", "1"),
    option(
        "evaluation at every 0th step",
        "evaluation.every=0",
        *("evaluation.every=0", "at least 1"),
    ),
    option(
        "a checkpoint at every 0th step",
        "checkpoint.every=0",
        *("checkpoint.every=0", "at least 1"),
    ),
    option(
        "no checkpoint to keep",
        "checkpoint.keep=0",
        *("checkpoint.keep=0", "at least 1"),
    ),
    option(
        "samples at every 0th step",
        "log.samples_every=0",
        *("log.samples_every=0", "at least 1"),
    ),
    # STaR and backtracking.
    option("a task that STaR does not have", "", "'chess'", "choose one of", "'chain'", experiment="star.py:chess"),
    star_option("a criterion that does not exist", "star.select.criterion=regret", "'regret'", UNKNOWN, "'total'"),
    star_option(
        "fine-tuning that begins nowhere",
        "star.begin=last",
        *("star.begin='last'", UNKNOWN, "('initial', 'current')"),
    ),
    star_option(
        "more problems than there are",
        "star.problems=20000",
        *("star.problems=20000", "data.problems=16384", "choose 0 (all)"),
    ),
    in_process(
        "backtracking without samples",
        "tto_jax.backtracking",
        "--run=FOLDER/run --scheme=tree --out=FOLDER/x",
        *("--run=FOLDER/run", "no config.json", "python -m tto_jax.star"),
    ),
    in_process(
        "a scheme of backtracking that does not exist",
        "tto_jax.backtracking",
        "--run=FOLDER/run --scheme=forest --out=FOLDER/x",
        *("'forest'", "choose from", "stitched"),
    ),
    # Folders.
    Misuse(
        "another configuration in the run's folder",
        "--workdir=FOLDER/run --config.learner.clip_high=0.28",
        (
            "FOLDER/run",
            "learner.clip_high: run has 0.2, you gave 0.28",
            "choose another --workdir",
            "These may change: steps",
        ),
        resume_with("peak.py:brpo,fast", "--config.learner.clip_high=0.28"),
        claim,
    ),
    Misuse(
        "another algorithm in the run's folder",
        "--workdir=FOLDER/run --config=configs/peak.py:grpo,fast",
        ("FOLDER/run", 'run has "brpo,fast", you gave "grpo,fast"', "credit.answers", "choose another --workdir"),
        resume_with("peak.py:grpo,fast"),
        claim,
    ),
    process(
        "evaluation of a folder that is no run",
        "tto_jax.evaluate --workdir=FOLDER/run",
        *("--workdir=FOLDER/run", "no config.json", "tto_jax.train"),
    ),
    process(
        "evaluation of the warm start into the run",
        "tto_jax.evaluate --workdir=FOLDER/run --warm_start",
        "--warm_start needs --out",
        prepare=claim,
    ),
    process(
        "evaluation before any checkpoint",
        "tto_jax.evaluate --workdir=FOLDER/run",
        *("FOLDER/run/checkpoints", "no checkpoint", "train"),
        prepare=claim,
    ),
    in_process(
        "a report of a run that was not evaluated",
        "tto_jax.report",
        "FOLDER/run --out=FOLDER/report",
        *("evaluation/results.json is missing", "python -m tto_jax.evaluate --workdir=FOLDER/run"),
        prepare=claim,
    ),
    in_process(
        "a report of a folder that does not exist",
        "tto_jax.report",
        "FOLDER/run --out=FOLDER/report",
        *("FOLDER/run", "does not exist"),
    ),
    in_process("a report of nothing", "tto_jax.report", "--out=FOLDER/report", "at least one RUN"),
    in_process(
        "a study of baselines before any evaluation",
        "tto_jax.variance",
        "FOLDER/run --out=FOLDER/study",
        *("evaluation/results.json is missing", "python -m tto_jax.evaluate --workdir=FOLDER/run"),
        prepare=claim,
    ),
    in_process("a study of baselines of nothing", "tto_jax.variance", "--out=FOLDER/study", "at least one RUN"),
    in_process("a name without a run", "tto_jax.report", "--name=brpo", "'brpo'", "NAME=RUN"),
    in_process("a benchmark that does not exist", "tto_jax.bench", "speed", "'speed'", "choose from", "credit"),
    in_process(
        "a size that the benchmark does not have",
        "tto_jax.bench",
        "credit --shape=huge --json=FOLDER/x",
        *("--shape='huge'", UNKNOWN, "'paper'"),
    ),
)


def files(folder: Path) -> dict:
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("row", MISUSES, ids=lambda row: row.title.replace(" ", "_"))
def test_is_refused(row, tmp_path):
    row.prepare(tmp_path)
    before = files(tmp_path)
    kinds = (ValueError, AttributeError, OSError, TypeError, flags.Error, Refused)
    with pytest.raises(kinds) as error:
        row.run(tmp_path)
    message = str(error.value).replace("\\n", "\n").replace(str(tmp_path), "FOLDER")
    missing = [words for words in row.said if words not in message]
    assert not missing, f"{missing} not in {message!r}"
    assert files(tmp_path) == before, "something was written"


def test_the_experiment_itself_is_accepted():
    """Otherwise each row above could pass for the wrong reason."""
    for experiment in ("peak.py:brpo,fast", "peak.py:grpo,fast", "peak.py:mrt,fast", "chain.py"):
        build(parsed(experiment))


def test_settings_are_checked_before_the_page_works(tmp_path, monkeypatch):
    """The page builds the settings before it touches the folder: what `settings.build` refuses leaves no file."""
    from tto_jax import train

    config = parsed("peak.py:brpo,fast", "--config.steps=0")
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("work began"))
    for name, value in (("_CONFIG", config), ("_WORKDIR", str(tmp_path / "run")), ("_DRY_RUN", False)):
        monkeypatch.setattr(train, name, type("Flag", (), {"value": value}))
    with pytest.raises(ValueError, match="steps=0"):
        train.main(["train"])
    assert list(tmp_path.iterdir()) == []


def test_titles_differ():
    titles = [row.title for row in MISUSES]
    assert len(set(titles)) == len(titles) >= 25


def markdown() -> str:
    """The table of what is refused."""

    def code(text):
        text = text.replace("|", "\\|")
        return f"`` {text} ``" if "`" in text else f"`{text}`"

    text = [
        "# What the pages refuse",
        "",
        "Written by `python tests/test_misuse.py` from the table in that file. Every row is a test: the misuse is",
        "refused before any work, no file is written, and the message holds these words. Options without a page belong",
        "to `python -m tto_jax.train --config=configs/peak.py:brpo,fast`; assignments stand in an experiment's file.",
        "",
        "| what is wrong | typed | the message holds |",
        "|---|---|---|",
        *(f"| {row.title} | {code(row.typed)} | {', '.join(code(words) for words in row.said)} |" for row in MISUSES),
    ]
    return "\n".join(text) + "\n"


def test_the_table_is_current():
    assert TABLE.read_text() == markdown(), "run `python tests/test_misuse.py`"


def test_the_table_names_no_place_of_this_machine():
    assert not re.search(rf"{re.escape(str(ROOT))}|/tmp|/home|/root", markdown())


if __name__ == "__main__":
    TABLE.write_text(markdown())
