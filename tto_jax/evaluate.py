"""Evaluate: accuracy at token budgets, pass@k, maj@k, regret and more of a model, with 95% intervals over problems.

    python -m tto_jax.evaluate --workdir=RUN [--step=600] [--warm_start --out=DIR]
    python -m tto_jax.evaluate --config=configs/math.py --model=DIR --data=sets/aime24,sets/math500 --out=DIR
    python -m tto_jax.evaluate --compare RUN_A RUN_B [--out=DIR]

RUN is a training run's workdir; DIR of --model a Hugging Face directory or a converted checkpoint. --budgets, --traces,
--answers, --temperature, --seed and --problems replace what the configuration's section `evaluation` says.

Writes OUT/evaluation/ (OUT is the workdir unless given): results.json, scores.npz, options.json, pictures of accuracy
against budgets (curve.png) and against tokens (tokens.png: one answer, and the majority of k answers at a fork) and of
cumulative regret (regret.png), and every completion as completions/SET/00000.jsonl.gz. An evaluation that was killed,
or stopped by SIGTERM, goes on when called again, also on another mesh or number of processes. Several processes are
started as those of training, with one OUT that all can read and write.

--forks=delimiters (or paragraphs, blocks) forces answers after each episode of the thinking, as the section `episodes`
says, in place of the budgets: numbers of results.json that are one a budget are then one an episode.
--as_training samples what a step of the configuration does: its budgets or episodes, traces, answers and temperature.
--start forces answers before any thinking, too: budget 0, which counts as the others do in means over budgets.
--extend=N goes beyond the last budget: N times, a word such as `Wait` replaces the `</think>` of a trace, which thinks
on for up to evaluation.extension_tokens tokens (`extrapolation` in results.json, extended.npz, tokens.png).
--linearise=WINDOW goes beyond it with a model that backtracks: --rounds times, what was taken back is removed, the last
WINDOW tokens of what is left follow the prompt, and thinking that was cut goes on for up to as many tokens
(`linearised` in results.json, extended.npz, tokens.png).
"""

import dataclasses
import functools
import io
import json
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from tto_jax import (
    checkpoint,
    comparison,
    completions,
    distributed,
    episodes,
    evaluation,
    extrapolation,
    host,
    inputs,
    linearised,
    metrics,
    preemption,
    pretrained,
    report,
    settings,
    sharding,
    summary,
    warm_start,
)
from tto_jax.models import decoder
from tto_jax.tasks import Problem

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, for a model without a run.", lock_config=True, allow_override=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "A training run.", allow_override=True)
_MODEL = flags.DEFINE_string("model", None, "With --config: the model, as config.init.")
_WARM_START = flags.DEFINE_bool("warm_start", False, "Evaluate the run's warm start; needs --out.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of the run; default: the last one.")
_DATA = flags.DEFINE_list("data", None, "Prepared sets; default: data.eval of the configuration.")
_OUT = flags.DEFINE_string("out", None, "Where to write; default: the workdir.")
_BUDGETS = flags.DEFINE_list("budgets", None, "Token budgets; default: evaluation.budgets.")
_TRACES = flags.DEFINE_integer("traces", None, "Traces of each problem, n; default: evaluation.traces.", lower_bound=1)
_ANSWERS = flags.DEFINE_integer("answers", None, "Answers at each budget; default: evaluation.answers.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", None, "Of traces and answers; default: evaluation.temperature.")
_SEED = flags.DEFINE_integer("seed", None, "Of the sampled traces and answers; default: evaluation.seed.")
_PROBLEMS = flags.DEFINE_integer(
    "problems", None, "Problems of each set; default: evaluation.final_problems.", lower_bound=1
)
_FORKS = flags.DEFINE_enum("forks", None, episodes.RULES, "Where answers are forced; default: evaluation.forks.")
_AS_TRAINING = flags.DEFINE_bool(
    "as_training", False, "Default to the forks, traces, answers and temperature of training; flags go before them."
)
_START = flags.DEFINE_bool("start", None, "Answers before any thinking, too, as budget 0; default: evaluation.start.")
_EXTEND = flags.DEFINE_integer(
    "extend", None, "How often thinking goes on after its end; default: evaluation.extensions.", lower_bound=0
)
_LINEARISE = flags.DEFINE_integer(
    "linearise",
    None,
    "Window of linearised thinking from which cut traces go on, in tokens; default: evaluation.linearise.",
    lower_bound=0,
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", None, "With --linearise: how often they go on; default: evaluation.rounds.", lower_bound=1
)
_MESH = flags.DEFINE_list(
    "mesh", None, "Devices along data,fsdp,tensor; default: as the configuration says.", allow_override=True
)
_ROWS = flags.DEFINE_integer(
    "rows",
    None,
    "Most traces that one device samples at once; default: what takes half of its memory, at most 256.",
    lower_bound=1,
)
_REGRET = flags.DEFINE_list("regret_tokens", None, "Where normalised regret is taken; default: the last budget.")
_COMPARE = flags.DEFINE_bool("compare", False, "Compare two evaluated runs, given as arguments.")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated, before it is loaded."""

    config: ConfigDict  # with this evaluation's options
    identity: str  # hash of the configuration as it was given
    variant: str
    workdir: epath.Path | None  # None: a model without a run


def main(argv):
    """The page."""
    if _COMPARE.value:
        compare(argv[1:])
        return None
    check_usage(argv)
    distributed.initialize()
    host.set_up()
    subject = requested()
    config = subject.config
    plan = settings.build(config)
    mesh = mesh_of(plan)
    plan = plan.on(mesh)
    options = evaluation.Options.from_config(config.evaluation).for_page(config)
    extrapolation.check(plan, options)
    linearised.check(plan, options)
    limits = numbers("--regret_tokens", _REGRET.value) or list(options.budgets[-1:])
    folder = epath.Path(_OUT.value or _WORKDIR.value) / "evaluation"
    distributed.say(distributed.banner(mesh))
    given = f"{folder} --rows={_ROWS.value} --step={_STEP.value} --warm_start={_WARM_START.value}"
    configuration = config.to_json(sort_keys=True)
    distributed.check_same({"configuration": configuration, "code": host.commit(), "set of flags": given})
    sets = inputs.evaluation_problems(config, plan.task, plan.tokenizer, config.evaluation.problems)
    for name, found in sets.items():
        distributed.say(f"{name}: {len(found.problems):,} problems, {found.dropped:,} left out: prompts too long")
    problems = {name: found.problems for name, found in sets.items()}
    # Every part is safe once it is written: a notice may end the page at any moment.
    with preemption.Notice(may_end=lambda: True) as stop, sharding.use(mesh):
        try:
            params, step = load(subject, plan, mesh)
            stop.check("load")
            largest = max(map(len, problems.values()))
            rows = _ROWS.value or completions.kept_rows(folder) or evaluation.default_rows(plan, options, largest)
            options = dataclasses.replace(options, rows=rows)
            identity = completions.identity(plan, params, problems, options, config.task.to_dict())
            distributed.check_same({"evaluation": json.dumps(identity, sort_keys=True)})
            completions.claim(folder, identity)
            results = sample(plan, params, problems, options, folder, stop)
        except preemption.Stopped as stopped:
            distributed.say(f"{stopped}: what was sampled is kept in {folder}, the same command goes on from there")
            return preemption.EXIT_CODE
    if jax.process_index() == 0:
        record = summary.summarize(results, options.columns, options.seed, tuple(limits))
        for name, found in sets.items():
            record["sets"][name]["dropped"] = found.dropped
        record |= about(subject, options, limits, step, results)
        if options.goes_on:
            extended = {name: result.extended for name, result in results.items()}
            kind = "linearised" if options.linearise else "extrapolation"
            record[kind] = summary.extrapolation(extended, options.seed)
            evaluation.save(folder / "extended.npz", extended)
        write(folder, config.to_dict() | {"variant": subject.variant}, record, results)
    return None


def check_usage(argv) -> None:
    """Raises UsageError for flags that do not go together."""
    run, model = _WORKDIR.value is not None, _CONFIG.value is not None
    for wrong, message in (
        (len(argv) > 1, f"unexpected arguments {argv[1:]}: every option is a flag, such as --problems=256"),
        (run == model, "give either --workdir=RUN (a training run) or --config=FILE (a model without a run)"),
        (run and _MODEL.value, "--model goes with --config: a run has its own model"),
        (model and not _OUT.value, "--config needs --out=DIR: there is no run to write into"),
        (model and _WARM_START.value, "--warm_start goes with --workdir: it is a run's"),
        (model and _STEP.value is not None, "--step goes with --workdir: only a run has checkpoints of several steps"),
        (
            _WARM_START.value and not _OUT.value,
            "--warm_start needs --out: the workdir's own evaluation is of its checkpoint",
        ),
        (_WARM_START.value and _STEP.value is not None, "--step and --warm_start name two different models: give one"),
    ):
        if wrong:
            raise app.UsageError(message)


def numbers(name: str, given: list[str] | None) -> list[int] | None:
    """A flag's list as positive numbers."""
    try:
        found = [int(number) for number in given or ()]
    except ValueError as error:
        raise app.UsageError(f"{name}={','.join(given)}: give integers, such as 6,12,24") from error
    if any(number < 1 for number in found):
        raise app.UsageError(f"{name}={','.join(given)}: give positive integers, such as 6,12,24")
    return found or None


def mesh_flag() -> tuple[int, ...]:
    """--mesh as numbers; a run's own mesh may be of other machines."""
    try:
        return sharding.check_shape([int(size) for size in _MESH.value])
    except ValueError as error:
        raise app.UsageError(f"--mesh={','.join(_MESH.value)}: give three sizes, such as 1,-1,1 ({error})") from error


def requested() -> Subject:
    """The configuration that the flags name, with this evaluation's options."""
    workdir = epath.Path(_WORKDIR.value) if _WORKDIR.value else None
    if workdir is None:
        config = _CONFIG.value.copy_and_resolve_references()
        config.unlock()
        if not inputs.is_pretrained(config):
            raise app.UsageError("--config: this experiment starts from a warm start; train it and give --workdir=RUN")
        config.init = _MODEL.value or config.init
        variant = epath.Path(config.init).name
    elif (workdir / "config.json").exists():
        config = ConfigDict(json.loads((workdir / "config.json").read_text()))
        variant = "warm_start" if _WARM_START.value else config.variant
    else:
        raise app.UsageError(f"--workdir={workdir} holds no config.json: give the workdir of `python -m tto_jax.train`")
    hashed = checkpoint.config_hash(config.to_dict())  # before this evaluation's own options
    if inputs.is_pretrained(config):
        of_texts(config, workdir)
    elif _DATA.value:
        raise app.UsageError("--data: this run's problems are made by its task; choose their number with --problems")
    override(config)
    if _MESH.value:
        config.mesh = mesh_flag()
    if workdir is None:  # nothing is trained: training's budgets must not have to fit the model
        with config.budgets.ignore_type():
            given = {"tokens": tuple(config.evaluation.budgets), "prior": "uniform", "spacing": "given", "count": 0}
            config.budgets.update(given)
    return Subject(config, hashed, variant, workdir)


def of_texts(config: ConfigDict, workdir: epath.Path | None) -> None:
    """What flags change of an experiment on prepared sets."""
    if _WARM_START.value:
        raise app.UsageError(f"--warm_start: this run started from {config.init}; evaluate that with --config, --model")
    if _DATA.value:
        config.data.eval = tuple(_DATA.value)
    if not config.data.eval:
        raise app.UsageError("no problems: give --data=SET,... made by `python -m tto_jax.prepare_data`")
    if workdir is not None:
        config.init = str(workdir)


def override(config: ConfigDict) -> None:
    """The section `evaluation` with what the flags give."""
    wanted = config.evaluation
    given = {
        "problems": _PROBLEMS.value or wanted.final_problems,
        "budgets": numbers("--budgets", _BUDGETS.value),
        "traces": _TRACES.value,
        "answers": _ANSWERS.value,
        "temperature": _TEMPERATURE.value,
        "seed": _SEED.value,
        "forks": _FORKS.value,
        "start": _START.value,
        "extensions": _EXTEND.value,
        "linearise": _LINEARISE.value,
        "rounds": _ROUNDS.value,
    }
    given = {name: value for name, value in given.items() if value is not None}
    with wanted.ignore_type():
        wanted.update((of_training(config) if _AS_TRAINING.value else {}) | given)
    if _ROUNDS.value and not wanted.linearise:
        raise app.UsageError("--rounds goes with --linearise: give the window in tokens, such as --linearise=4096")


def of_training(config: ConfigDict) -> dict:
    """What a step of training samples, as options of an evaluation."""
    rollout = config.rollout
    found = {"traces": rollout.group_size, "answers": rollout.answers, "temperature": rollout.temperature}
    return found | {"budgets": settings.budget_tokens(config.budgets), "forks": config.episodes.rule}


def mesh_of(plan: settings.Settings) -> jax.sharding.Mesh | None:
    """The mesh, which has the devices of all processes."""
    mesh = sharding.mesh_of(plan.mesh)
    if mesh is None and jax.process_count() > 1:
        raise ValueError(
            f"mesh={plan.mesh} is one device, and there are {jax.process_count()} processes with "
            f"{jax.device_count()} devices: choose all of them with --mesh=1,-1,1"
        )
    return mesh


def load(subject: Subject, plan: settings.Settings, mesh):
    """(parameters on the mesh, step): of a checkpoint, of the warm start, or of a model without a run."""
    config, workdir, kv_heads = subject.config, subject.workdir, plan.model.num_kv_heads
    like = jax.eval_shape(lambda: decoder.init_params(plan.model, 0))
    if workdir is None:
        layout = None if mesh is None else sharding.shardings(mesh, like, kv_heads)
        return pretrained.find(config.init).load(plan.model, layout), 0
    if _WARM_START.value and jax.process_count() == 1:
        return sharding.place(mesh, warm_start.get(config, plan, workdir), kv_heads), 0
    if _WARM_START.value:
        like = sharding.abstract(mesh, like, kv_heads)
        return checkpoint.load_params(warm_start.cache_path(config, workdir), like)[0], 0
    if not (workdir / "checkpoints").exists():
        raise FileNotFoundError(f"{workdir / 'checkpoints'} holds no checkpoint: train the run first")
    like = sharding.abstract(mesh, like, kv_heads)
    return checkpoint.restore_params(workdir / "checkpoints", like, _STEP.value)


def sample(
    plan, params, sets: dict[str, Sequence[Problem]], options, folder: epath.Path, stop: preemption.Notice
) -> dict[str, evaluation.Evaluation]:
    """Every set, part by part, under a progress bar that counts traces."""
    results, done = {}, 0
    poll = functools.partial(stop.check, "evaluation")
    with metrics.Progress(sum(map(len, sets.values())) * options.traces, name="evaluate") as bar:
        for name, problems in sets.items():

            def on_part(traces, accuracy, name=name):
                nonlocal done
                done += traces
                bar.update(done, {"set": name, "final": accuracy})

            kept = folder / "completions" / name
            results[name] = evaluation.evaluate(
                plan, params, problems, options, folder=kept, on_part=on_part, poll=poll
            )
    return results


def about(subject: Subject, options, limits, step, results) -> dict:
    """What results.json says beside the metrics."""
    config = subject.config
    seconds, new_tokens = (sum(getattr(r, name) for r in results.values()) for name in ("seconds", "new_tokens"))
    return {
        "forks": "budgets" if options.episodes is None else "episodes",
        "budgets": list(options.columns),
        "traces": options.traces,
        "answers": options.answers,
        "temperature": options.temperature,
        "evaluation_seed": options.seed,
        "regret_tokens": limits,
        "variant": subject.variant,
        "step": step,
        "seed": config.seed,
        "warm_start_seed": None if inputs.is_pretrained(config) else config.warm_start.seed,
        **training_totals(subject.workdir, step),
        "evaluation_tokens": sum(result.tokens for result in results.values()),
        "timing": {  # of this call: what was read back took none
            "seconds": seconds,
            "tokens": new_tokens,
            "tokens_per_second": new_tokens / seconds if seconds else None,
        },
        "config_hash": subject.identity,
        "commit": host.commit(),
        "versions": host.versions(),
    }


def training_totals(workdir: epath.Path | None, step: int) -> dict:
    """Tokens and seconds of training up to `step`, as the run's metrics have them."""
    if workdir is None or step == 0:
        return {"tokens": 0, "seconds": 0.0}
    rows = [row for row in metrics.read_rows(workdir) if row["step"] <= step and "tokens" in row]
    if not rows:
        raise ValueError(f"{workdir / 'metrics.jsonl'} has no row of step {step} or before: restore it")
    return {name: rows[-1][name] for name in ("tokens", "seconds")}


def write(folder: epath.Path, config: dict, record: dict, results: dict[str, evaluation.Evaluation]) -> None:
    """The files of one evaluation, and a line for the reader."""
    if not (folder.parent / "config.json").exists():
        (folder.parent / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    evaluation.save(folder / "scores.npz", results)
    (folder / "results.json").write_text(json.dumps(record, indent=2))
    run = report.load_run(folder.parent, training=False)  # which may lie elsewhere
    figures = {"curve": report.curves(report.with_sets(run)), "tokens": report.by_tokens(run)}
    for name, figure in (figures | {"regret": report.cumulative_regret(run)}).items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        (folder / f"{name}.png").write_bytes(picture.getvalue())
    each = record["sets"] if len(record["sets"]) > 1 else {}
    for name, found in {**each, record["variant"]: record}.items():
        print(line(name, record["budgets"], found))
    for kind in report.BEYOND.keys() & record.keys():
        print(line_beyond(record["variant"], record[kind]))


def line(name: str, budgets, found: dict, columns: int = 8) -> str:
    """Accuracy at up to `columns` budgets, anytime with its interval, and final."""
    shown = np.unique(np.linspace(0, len(budgets) - 1, min(columns, len(budgets))).round().astype(int))
    accuracy = " ".join(f"{budgets[i]}:{found['accuracy'][i]:.3f}" for i in shown)
    low, high = found["anytime_ci95"]
    return f"{name}: {accuracy} anytime {found['anytime']:.3f} [{low:.3f}, {high:.3f}] final {found['final']:.3f}"


def line_beyond(name: str, found: dict) -> str:
    """Accuracy against tokens of thinking that goes on, and its gain with the interval."""
    points = " ".join(f"{tokens:.1f}:{accuracy:.3f}" for tokens, accuracy in zip(found["thinking"], found["accuracy"]))
    low, high = found["gain_ci95"][-1]
    return f"{name}, going on: {points} gain {found['gain'][-1]:+.3f} [{low:+.3f}, {high:+.3f}]"


def compare(paths: list[str]) -> None:
    """The page of --compare."""
    if len(paths) != 2:
        raise app.UsageError(f"--compare takes two evaluated runs, got {len(paths)}: --compare RUN_A RUN_B")
    try:
        record = comparison.compare(*map(comparison.load, paths))
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    print(comparison.table(record))
    if _OUT.value:
        out = epath.Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    app.run(distributed.ends_all(main))
