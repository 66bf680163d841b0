"""STaR and MRT-STaR: python -m tto_jax.star --config=configs/star.py:peak --workdir=DIR [--config.a.b=value]

An iteration samples traces of training problems, forces answers before any thinking and at every budget, keeps the
traces that `core.selection` chooses, and fine-tunes on them. `checkpoints/I` is the model after iteration I, which
evaluate and convert take as those of a run; `iterations/I` holds what was sampled, selected and how it was fitted. A
run that was stopped or killed goes on where it was, in whatever it did, and comes to the same bits.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from tto_jax import (
    checkpoint,
    completions,
    data,
    distributed,
    evaluation,
    examples,
    host,
    inputs,
    metrics,
    preemption,
    selected,
    settings,
    sharding,
    supervised,
    warm_start,
)
from tto_jax.core import selection
from tto_jax.learner import LossConfig, OptimizerConfig, decoder
from tto_jax.models.decoder import Params
from tto_jax.settings import Settings
from tto_jax.tasks import Problem

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, such as configs/star.py:peak.", lock_config=True, allow_override=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives: iterations, checkpoints.", allow_override=True)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check and print sizes, then stop.", allow_override=True)

BEGINNINGS = ("initial", "current")
OVERRIDABLE = (
    *("steps", "mesh", "star.micro_tokens", "rollout.segment", "evaluation", "checkpoint", "log"),
    *("learner", "warm_start.cache", "data.eval", "task.verifier"),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The settings of a run, resolved."""

    sampling: Settings
    options: evaluation.Options  # but for the seed, which is the iteration's
    rule: selection.Rule
    problems: int  # sampled in an iteration; 0: all
    from_initial: bool  # fine-tuning begins with the initial model, not with the current one
    train_inserted: bool
    epochs: int
    warmup: float  # share of the steps
    optimizer: dict  # of `OptimizerConfig`, but for what follows from the number of steps
    fitting: supervised.Plan  # but for the steps and the optimizer, which follow from what is kept

    @property
    def iterations(self) -> int:
        """How often the model is fine-tuned."""
        return self.sampling.steps

    def on(self, mesh: jax.sharding.Mesh | None) -> "Plan":
        """These settings on a mesh. Raises ValueError if it cannot split the rows or the heads."""
        return dataclasses.replace(self, sampling=self.sampling.on(mesh), fitting=self.fitting.on(mesh))

    def fitting_of(self, steps: int) -> supervised.Plan:
        """The fine-tuning of an iteration, of so many steps."""
        warmup, cosine = round(self.warmup * steps), self.optimizer["schedule"] == "cosine"
        optimizer = OptimizerConfig(**self.optimizer, warmup_steps=warmup, decay_steps=steps if cosine else 0)
        return dataclasses.replace(self.fitting, steps=steps, optimizer=optimizer)


def main(argv):
    """The page."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every option is a flag, such as --config.steps=10")
    distributed.initialize()
    host.set_up()
    config = _CONFIG.value
    plan = build(config, need_model=not _DRY_RUN.value)
    distributed.say(describe(plan))
    if _DRY_RUN.value:
        return None
    if not _WORKDIR.value:
        raise app.UsageError("--workdir is missing: name a folder, or use --dry_run")
    return run(config, plan, epath.Path(_WORKDIR.value))


def build(config, *, need_model: bool = True) -> Plan:
    """Resolve and check a configuration. Raises ValueError for what cannot work."""
    if "star" not in config:
        raise ValueError("the configuration has no section `star`: choose configs/star.py, or give it common.star(...)")
    star = config.star
    for name, least in (("problems", 0), ("epochs", 1), ("rows", 1), ("row_length", 0)):
        if star[name] < least:
            raise ValueError(f"star.{name}={star[name]}: it must be at least {least}")
    if star.begin not in BEGINNINGS:
        raise ValueError(f"star.begin={star.begin!r} is unknown: choose one of {BEGINNINGS}")
    if not config.rollout.start:
        raise ValueError("rollout.start=False: progress begins with scores before any thinking; choose True")
    if not 0 <= star.warmup < 1:
        raise ValueError(f"star.warmup={star.warmup}: a share of the steps in [0, 1), such as 0.1")
    if not inputs.is_pretrained(config) and star.problems > config.data.problems:
        raise ValueError(f"star.problems={star.problems} exceeds data.problems={config.data.problems}: choose 0 (all)")
    rule = selection.Rule(**star.select.to_dict())
    sampling = settings.build(config, need_model=need_model)
    longest = sampling.prompt_pad + sampling.rollout.trace_pad + sampling.answer_pad
    length = star.row_length or longest
    if length > sampling.model.max_position:
        raise ValueError(f"star.row_length={length}: the model has model.max_position={sampling.model.max_position}")
    plan = Plan(
        sampling=sampling,
        options=evaluation.Options(
            budgets=settings.budget_tokens(config.budgets),
            traces=config.rollout.group_size,
            answers=config.rollout.answers,
            temperature=config.rollout.temperature,
            seed=0,
            ids=True,
            episodes=None if sampling.episodes is None else config.episodes.to_dict(),
            start=True,
        ),
        rule=rule,
        problems=star.problems,
        from_initial=star.begin == "initial",
        train_inserted=star.train_inserted,
        epochs=star.epochs,
        warmup=star.warmup,
        optimizer=star.optimizer.to_dict(),
        fitting=supervised.Plan(
            steps=1,
            rows=star.rows,
            row_length=length,
            model=sampling.model,
            loss=LossConfig(length, length, constant=1.0, micro_tokens=star.micro_tokens),
            optimizer=OptimizerConfig(learning_rate=1.0),
            evaluate_every=1,
            save_every=config.checkpoint.every,
            keep=1,
            keep_every=0,
        ),
    )
    return dataclasses.replace(plan, fitting=plan.fitting_of(1))


def run(config, plan: Plan, workdir: epath.Path) -> int | None:
    """All iterations. Returns an exit code if a notice stopped it."""
    checkpoint.claim_workdir(workdir, config.to_dict(), overridable=OVERRIDABLE)
    mesh = sharding.mesh_of(plan.sampling.mesh)
    distributed.say(distributed.banner(mesh))
    distributed.check_same({"configuration": config.to_json(sort_keys=True), "code": host.commit()})
    plan = plan.on(mesh)
    found = inputs.training_problems(config, plan.sampling.task, plan.sampling.tokenizer)
    if plan.problems > len(found.problems):
        raise ValueError(f"star.problems={plan.problems}: there are {len(found.problems)} problems; choose 0 (all)")
    distributed.say(f"data     {len(found.problems):,} problems, {found.dropped:,} left out: prompts too long")
    initial = functools.partial(warm_start.initial_params, config, plan.sampling, workdir, mesh)
    with contextlib.ExitStack() as opened:
        kept = config.checkpoint
        saved = checkpoint.Checkpointer(workdir / "checkpoints", keep=kept.keep, keep_every=kept.keep_every)
        opened.enter_context(saved)
        done, params, record = last_model(saved, plan, mesh) or (
            0,
            initial(),
            {"problems": found.fingerprint, "totals": {"tokens": 0, "seconds": 0.0}, "written": [0, 0]},
        )
        if record["problems"] != found.fingerprint:
            raise ValueError(f"data.train={config.data.train} has changed since iteration {done}")
        writer = opened.enter_context(metrics.MetricsWriter(workdir, record["written"]))
        for iteration in range(done + 1, plan.iterations + 1):
            began = time.time()
            remove_fits(workdir, iteration - 1)
            folder, seed = selected.folder_of(workdir, iteration), seed_of(plan.sampling.seed, iteration)
            if preemption.on_any_process(not selected.exists(folder)):
                chosen = choose(found.problems, plan.problems, seed)
                sampled = sample(config, plan, mesh, chosen, params, seed, folder, iteration)
                if sampled is None:
                    return preemption.EXIT_CODE
                selected.write(folder, plan.sampling, sampled, plan.rule)
            begin = initial if plan.from_initial else functools.partial(lambda current: current, params)
            del params  # the fine-tuning needs the room
            after = fine_tune(plan, mesh, begin, seed, folder, iteration)
            if after is None:
                return preemption.EXIT_CODE
            params, row = after
            totals = {
                "tokens": record["totals"]["tokens"] + row["sampled/tokens"],
                "seconds": record["totals"]["seconds"] + time.time() - began,
            }
            record |= {"totals": totals}
            writer.write(iteration, row | totals)
            saved.save(iteration, {"params": params}, record | {"written": writer.flush()})
            saved.wait()
            distributed.say(summary(iteration, row))
        remove_fits(workdir, plan.iterations)
    return None


def last_model(saved: checkpoint.Checkpointer, plan: Plan, mesh) -> tuple[int, Params, dict] | None:
    """(iteration, parameters on the mesh, record) of the last iteration that is done; None before the first."""
    model = plan.sampling.model
    like = {"params": jax.eval_shape(lambda: decoder.init_params(model, 0))}
    with sharding.use(mesh):
        resumed = saved.restore_latest(sharding.abstract(mesh, like, model.num_kv_heads))
    return resumed and (resumed[0], resumed[1]["params"], resumed[2])


def sample(
    config, plan: Plan, mesh, problems: Sequence[Problem], params: Params, seed: int, folder: epath.Path, iteration: int
) -> evaluation.Evaluation | None:
    """Scores of all traces of the problems at the start and at every budget; None if a notice stopped it.

    Parts that lie in the folder are not sampled again.
    """
    where, sampling = folder / "sampling", plan.sampling
    rows = completions.kept_rows(where)
    bar = metrics.Progress(len(problems) * plan.options.traces, name=f"iteration {iteration}: sample")
    # Every part is safe once it is written: a notice may end the page at any moment.
    with preemption.Notice(may_end=lambda: True) as stop, sharding.use(mesh), bar:
        rows = rows or evaluation.default_rows(sampling, plan.options, len(problems))
        options = dataclasses.replace(plan.options, seed=seed, rows=rows)
        about = config.task.to_dict() | {"episodes": config.episodes.to_dict()}
        identity = completions.identity(sampling, params, {"train": problems}, options, about)
        distributed.check_same({"sampling": str(identity)})
        completions.claim(where, identity)
        done = 0

        def on_part(traces, accuracy):
            nonlocal done
            done += traces
            bar.update(done, {"final": accuracy})

        try:
            return evaluation.evaluate(
                sampling,
                params,
                problems,
                options,
                folder=selected.completions_in(folder),
                on_part=on_part,
                poll=functools.partial(stop.check, "sampling"),
            )
        except preemption.Stopped as stopped:
            distributed.say(f"{stopped}: what was sampled is kept in {where}, the same command goes on from there")
            return None


def fine_tune(
    plan: Plan, mesh, begin: Callable[[], Params], seed: int, folder: epath.Path, iteration: int
) -> tuple[Params, dict] | None:
    """(parameters after an iteration, its row of metrics); None if a notice stopped it. begin: gives the first ones."""
    found, row = selected.read(folder, plan.fitting.row_length, plan.train_inserted)
    distributed.check_same({"responses": found.fingerprint})
    batches = functools.partial(
        examples.training_rows, found, plan.fitting.rows, plan.fitting.row_length, seed, plan.epochs
    )
    steps = sum(1 for _ in batches())
    name = f"iteration {iteration}: fit"
    fitting = plan.fitting_of(steps)
    state = supervised.fit(fitting, mesh, batches(), found.fingerprint, begin, folder / "fit", name=name)
    if state is None:
        return None
    loss = metrics.read_rows(folder / "fit")[-1]["loss/total"] if jax.process_index() == 0 else None
    fitted = {"fit/steps": steps, "fit/tokens": found.num_tokens, "fit/dropped": found.dropped, "fit/loss": loss}
    return state.params, row | fitted


def choose(problems: Sequence[Problem], number: int, seed: int) -> Sequence[Problem]:
    """So many of the problems, without repetition, in their order; all of them if the number is 0."""
    if number in (0, len(problems)):
        return problems
    places = np.sort(np.random.default_rng(seed).permutation(len(problems))[:number])
    return data.FilteredSource(problems, tuple(places.tolist()))


def seed_of(seed: int, iteration: int) -> int:
    """The seed of an iteration's problems, samples and shuffles, in 0..2**32 - 1."""
    return int(np.random.SeedSequence([seed, iteration]).generate_state(1)[0])


def remove_fits(workdir: epath.Path, done: int) -> None:
    """Removes the checkpoints inside the iterations that are done: they have ends of their own in `checkpoints`."""
    for iteration in range(1, done + 1) if jax.process_index() == 0 else ():
        inside = selected.folder_of(workdir, iteration) / "fit" / "checkpoints"
        if inside.exists():
            inside.rmtree()


def summary(iteration: int, row: dict) -> str:
    """An iteration in a line."""
    return (
        f"iteration {iteration}: score {row['score/start']:.3f} before thinking, {row['score/anytime']:.3f} over the "
        f"cuts; {row['kept/traces']:,} traces kept, {row['kept/share']:.1%}, up to {row['kept/length']:.1f} of "
        f"{row['length/mean']:.1f} tokens; {row['fit/steps']} steps of fine-tuning"
    )


def describe(plan: Plan) -> str:
    """The resolved sizes."""
    options, sampling, fitting = plan.options, plan.sampling, plan.fitting
    lines = {
        "task": sampling.task,
        "sampling": f"{plan.problems or 'all'} problems x {options.traces} traces x {options.answers} answers before "
        f"thinking and at {', '.join(sampling.names)}, up to {options.budgets[-1]} tokens; temperature "
        f"{options.temperature}",
        "selection": plan.rule,
        "fitting": f"{plan.epochs} epochs of {fitting.rows} rows of {fitting.row_length} tokens, from the "
        f"{'initial' if plan.from_initial else 'current'} model; {plan.optimizer}, warm-up {plan.warmup} of the steps",
        "model": f"{dataclasses.asdict(sampling.model)}",
        "steps": f"{plan.iterations} iterations",
    }
    return "\n".join(f"{name:9} {value}" for name, value in lines.items())


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(distributed.ends_all(main))
