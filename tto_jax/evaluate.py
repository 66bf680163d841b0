"""Evaluate: python -m tto_jax.evaluate --workdir=RUN [--warm_start --out=DIR] [--problems=1024] [--budgets=6,12,24]

Accuracy at budgets of a run's last checkpoint (or of its warm start) with 95% intervals over problems. Writes
OUT/evaluation/: results.json, scores.npz, curve.png. OUT is the workdir unless given.
"""

import io
import json

import jax
import numpy as np
from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from tto_jax import checkpoint, evaluation, host, learner, report, settings, warm_start
from tto_jax.metrics import Progress
from tto_jax.models import decoder

_WORKDIR = flags.DEFINE_string("workdir", None, "A training run.", allow_override=True)
_WARM_START = flags.DEFINE_bool("warm_start", False, "Evaluate the run's warm start; needs --out.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to evaluate; default: the last one.")
_OUT = flags.DEFINE_string("out", None, "Where to write; default: the workdir.")
_PROBLEMS = flags.DEFINE_integer(
    "problems", None, "Evaluation problems; default: evaluation.final_problems.", lower_bound=1
)
_BUDGETS = flags.DEFINE_list("budgets", None, "Token budgets; default: evaluation.budgets.")
_ANSWERS = flags.DEFINE_integer("answers", None, "Answers at each budget; default: evaluation.answers.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", None, "Of the sampled traces and answers; default: evaluation.seed.")


def main(argv):
    """The page."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every option is a flag, such as --problems=256")
    host.set_up()
    workdir = epath.Path(_WORKDIR.value)
    if _WARM_START.value and not _OUT.value:
        raise app.UsageError("--warm_start needs --out: the workdir's own evaluation is of its checkpoint")
    if not (workdir / "config.json").exists():
        raise app.UsageError(f"--workdir={workdir} holds no config.json: give the workdir of `python -m tto_jax.train`")
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    identity = checkpoint.config_hash(config.to_dict())  # of the run, before this evaluation's own options
    wanted = config.evaluation
    wanted.update(
        {
            "problems": _PROBLEMS.value or wanted.final_problems,
            "answers": _ANSWERS.value or wanted.answers,
            "seed": wanted.seed if _SEED.value is None else _SEED.value,
            "budgets": budgets_flag() or wanted.budgets,
        }
    )
    plan = settings.build(config)
    params, totals, step = load(config, plan, workdir)
    budgets = tuple(wanted.budgets)
    with Progress(wanted.problems, name="evaluate") as progress:
        result = evaluation.evaluate(
            plan,
            params,
            problems=wanted.problems,
            budgets=budgets,
            answers=wanted.answers,
            seed=wanted.seed,
            on_batch=lambda done: progress.update(done, {}),
        )
    variant = "warm_start" if _WARM_START.value else config.variant
    record = evaluation.summarize(result, budgets, wanted.seed) | {
        "variant": variant,
        "step": step,
        "seed": config.seed,
        "warm_start_seed": config.warm_start.seed,
        "tokens": totals["tokens"],
        "seconds": totals["seconds"],
        "evaluation_tokens": result.tokens,
        "config_hash": identity,
        "commit": host.commit(),
        "versions": host.versions(),
    }
    write(epath.Path(_OUT.value or workdir), config.to_dict() | {"variant": variant}, record, result)


def budgets_flag() -> list[int] | None:
    """--budgets as numbers."""
    try:
        return [int(budget) for budget in _BUDGETS.value or ()] or None
    except ValueError as error:
        raise app.UsageError(f"--budgets={','.join(_BUDGETS.value)}: give integers, such as 6,12,24") from error


def load(config, plan: settings.Settings, workdir: epath.Path):
    """Parameters, totals of the training so far, and the step: of a checkpoint, or of the warm start."""
    if _WARM_START.value:
        return warm_start.get(config, plan, workdir), {"tokens": 0, "seconds": 0.0}, 0
    like = jax.eval_shape(lambda: learner.init_state(decoder.init_params(plan.model, 0), plan.optimizer))
    if not (workdir / "checkpoints").exists():
        raise FileNotFoundError(f"{workdir / 'checkpoints'} holds no checkpoint: train the run first")
    with checkpoint.Checkpointer(workdir / "checkpoints", keep=config.checkpoint.keep) as saved:
        step = saved.latest_step() if _STEP.value is None else _STEP.value
        if step is None:
            raise FileNotFoundError(f"{workdir / 'checkpoints'} holds no checkpoint: train the run first")
        state, extra = saved.restore(step, like)
    return state.params, extra["totals"], step


def write(out: epath.Path, config: dict, record: dict, result: evaluation.Evaluation) -> None:
    """The files of one evaluation, and a line for the reader."""
    folder = out / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    if not (out / "config.json").exists():
        (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    scores = io.BytesIO()
    np.savez_compressed(scores, correct=result.correct, forks=result.forks, id=result.id, length=result.length)
    (folder / "scores.npz").write_bytes(scores.getvalue())
    (folder / "results.json").write_text(json.dumps(record, indent=2))
    picture = io.BytesIO()
    report.curves([report.load_run(out)]).savefig(picture, format="png")
    (folder / "curve.png").write_bytes(picture.getvalue())
    accuracy = " ".join(f"{b}:{a:.3f}" for b, a in zip(record["budgets"], record["accuracy"]))
    low, high = record["anytime_ci95"]
    area = f"anytime {record['anytime']:.3f} [{low:.3f}, {high:.3f}]"
    print(f"{record['variant']}: {accuracy} {area} final {record['final']:.3f}")


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    app.run(main)
