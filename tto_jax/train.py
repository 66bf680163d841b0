"""Train: python -m tto_jax.train --config=configs/peak.py:brpo --workdir=DIR [--config.a.b=value] [--dry_run]

One page, in the order in which it runs. A run resumes from its last checkpoint by default; on SIGTERM it saves the last
whole step and ends.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from tto_jax import (
    checkpoint,
    crediting,
    data,
    diagnostics,
    distributed,
    evaluation,
    grading,
    host,
    inputs,
    learner,
    preemption,
    prefixes,
    profiling,
    reference_values,
    resampling,
    rollout,
    settings,
    sharding,
    throughput,
    warm_start,
)
from tto_jax.core import regression
from tto_jax.metrics import MetricsWriter, Progress
from tto_jax.settings import Settings

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, such as configs/peak.py:brpo.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives: checkpoints, metrics, samples.", allow_override=True
)
_WARM_START_ONLY = flags.DEFINE_bool("warm_start_only", False, "Stop after the warm start.")
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps",
    "",
    "Steps to trace for XProf, in WORKDIR/profile: such as 3:5 or 3,20:22. The first one compiles.",
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check and print the resolved configuration, then stop.")


def main(argv):
    """The page."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every option is a flag, such as --config.steps=10")
    distributed.initialize()
    host.set_up()
    config = _CONFIG.value
    if _WARM_START_ONLY.value and inputs.is_pretrained(config):
        raise app.UsageError(
            "--warm_start_only: this experiment starts from a pretrained model, there is no warm start"
        )
    plan = settings.build(config, need_model=not _DRY_RUN.value)
    profile_steps = profiling.parse_steps(_PROFILE_STEPS.value, plan.steps)
    distributed.say(describe(plan))
    if _DRY_RUN.value:
        distributed.say(str(config))
        return None
    if not _WORKDIR.value:
        raise app.UsageError("--workdir is missing: name a folder, or use --dry_run")
    return train(config, plan, epath.Path(_WORKDIR.value), _WARM_START_ONLY.value, profile_steps)


def train(
    config, plan: Settings, workdir: epath.Path, warm_start_only: bool = False, profile_steps: Collection[int] = ()
) -> int | None:
    """Warm start, then `plan.steps` steps of rollout, credit and update.

    Returns an exit code if a notice stopped it.
    """
    began = time.time()
    checkpoint.claim_workdir(workdir, config.to_dict(), overridable=resumable(plan))
    if warm_start_only:
        warm_start.get(config, plan, workdir)
        return None

    # The devices, the problems, and those that are held out.
    mesh = sharding.mesh_of(plan.mesh)
    peak = throughput.peak(1 if mesh is None else mesh.size)
    distributed.say(distributed.banner(mesh))
    distributed.check_same({"configuration": config.to_json(sort_keys=True), "code": host.commit()})
    plan.check_rows(mesh)
    plan = plan.on(mesh)
    plan.check_slots(mesh, (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"))
    distributed.say(f"kernels  {plan.kernels}")
    found = inputs.training_problems(config, plan.task, plan.tokenizer)
    distributed.say(f"data     {len(found.problems):,} problems, {found.dropped:,} left out: prompts too long")
    shard = jax.process_index(), jax.process_count()  # a problem's rows live on one process
    batches = data.problem_batches(found.problems, plan.tokenizer, plan.problems, plan.prompt_pad, plan.seed, shard)
    held_out = inputs.evaluation_problems(config, plan.task, plan.tokenizer, config.evaluation.problems)
    with contextlib.ExitStack() as opened:  # whatever ends the run, a save in flight is finished, files are closed
        kept = config.checkpoint
        saved = checkpoint.Checkpointer(workdir / "checkpoints", keep=kept.keep, keep_every=kept.keep_every)
        opened.enter_context(saved)
        with sharding.use(mesh):
            like = learner.abstract_state(plan.model, plan.optimizer, plan.prefix is not None)
            resumed = saved.restore_latest(sharding.abstract(mesh, like, plan.model.num_kv_heads))
        initial = warm_start.initial_params(config, plan, workdir, mesh) if plan.loss.kl or not resumed else None
        opened.enter_context(sharding.use(mesh))
        # The policy: what the last checkpoint holds, or what the run starts from.
        reference = initial if plan.loss.kl else None
        if resumed:
            done, state, record = resumed
            checkpoint.check_config(saved.directory / str(done), record["config"], config.to_dict(), resumable(plan))
            record |= {"config": config.to_dict()}
            if record["problems"] != found.fingerprint:
                raise ValueError(
                    f"data.train={config.data.train} has changed since step {done}: its cursor means others"
                )
            batches.set_state(record["cursor"])
        else:  # the state is donated to the update, the reference stays
            initial = jax.tree.map(jnp.copy, initial) if reference else initial
            state = learner.init_state(initial, plan.optimizer, mesh, plan.model.num_kv_heads)
            state = learner.lagging(state) if plan.prefix else state
            done = 0
            record = {"problems": found.fingerprint, "config": config.to_dict(), "began": began, "written": [0, 0]}
            record = advanced(record, batches, {"tokens": 0, "seconds": 0.0}, evaluated=False)
            if plan.credit.baseline_fit:
                record["baseline_fit"] = regression.as_lists(regression.nothing(plan.schedule.size))
        del initial, resumed
        writer = opened.enter_context(MetricsWriter(workdir, record["written"]))
        progress = opened.enter_context(Progress(plan.steps, initial=done))
        profile = opened.enter_context(profiling.Profile(workdir, profile_steps))
        start = done  # what the run goes on from is on the disk, or made again
        stop = opened.enter_context(preemption.Notice(lambda: done == start or done in saved.written()))

        # Outside the update `state` is that of step `done`, and `record` what is saved beside it: a stop keeps the two.
        try:
            if not record["evaluated"]:
                record = evaluate_row(config, plan, held_out, state.params, writer, done, record, stop)
            # The start, too: a folder that cannot be written to is found out now.
            saved.save(done, state, record | {"written": writer.flush()})

            for step in range(done + 1, plan.steps + 1):
                profile.before(step)
                clock = profiling.Clock(stop, step)
                batch = next(batches)
                prompts = sharding.put_rows(batch.prompts)
                key = sharding.put(jax.random.fold_in(jax.random.key(plan.seed), step))
                coef = crediting.fitted_baseline(plan, record)
                schedule = sharding.put(plan.schedule_of(step))
                cuts = plan.cuts(schedule)
                clock.mark("data", prompts)

                # Nothing crosses between host and device but what is named: a transfer by accident is an error.
                with jax.transfer_guard("disallow"):
                    poll, drawn = functools.partial(stop.check, "think"), None
                    if plan.prefix:  # what an earlier policy has thought goes before
                        drawn = prefixes.draw(plan, state.stale, batch.prompts, key, step, step == start + 1, poll)
                        batch = dataclasses.replace(batch, prompts=drawn.prompts)
                        prompts = sharding.put_rows(batch.prompts)
                    # Think, cut, answer.
                    # Awaited: another program in flight beside its gathers could meet them in another order elsewhere.
                    weights = jax.block_until_ready(rollout.weights(plan.model, state.params))
                    if step == start + 1:  # no length that comes later compiles anything
                        rollout.compile_all(plan.model, plan.rollout, weights, prompts, key, cuts)
                    sample = functools.partial(rollout.sample, plan.model, plan.rollout, weights, poll=poll)
                    traces, forks, answers, stats = sample(prompts, key, cuts)
                    clock.mark("think", answers), clock.mark("answer")  # `stats` knows how the time was shared

                    # Grade on the host, turn scores into credit, pack trees.
                    seen = sharding.local_rows((traces, forks, answers))
                    graded = grading.grade(plan.task, plan.tokenizer, batch.problems, *seen)
                    resampled = {}
                    if plan.resample:
                        batch, seen, graded, resampled = resample(plan, batches, sample, key, cuts, batch, seen, graded)
                        prompts, (traces, forks, answers) = sharding.put_rows((batch.prompts, seen))
                    del weights, sample  # the update needs the room
                    scores = graded.scores
                    clock.mark("grade")
                    correct = sharding.put_rows(scores.correct)
                    values = None
                    if plan.credit.fork_values == "reference":
                        values = reference_values.values(
                            plan, state.params, batch.problems, prompts, traces, forks, answers
                        )
                    rows, earned, baselines, sums = crediting.credit_and_pack(
                        plan.credit, schedule, prompts, traces, answers, forks, correct, coef, values
                    )
                    clock.mark("credit", rows)

                    # Old log-probs by the trainer, then one optimizer step a minibatch.
                    old, entropy = learner.score_logprobs(plan.model, plan.loss, state.params, rows)
                    rows = dataclasses.replace(rows, old_logprob=old)
                    if reference is not None:
                        ref, _ = learner.score_logprobs(plan.model, plan.loss, reference, rows)
                        rows = dataclasses.replace(rows, ref_logprob=ref)
                    clock.mark("score", rows)
                    updates = []
                    for index in range(plan.minibatches):
                        part = learner.minibatch(rows, plan.minibatches, sharding.put(np.int32(index)))
                        state, update = learner.train_step(plan.model, plan.loss, plan.optimizer, state, part)
                        updates.append(update)
                    if plan.prefix:
                        state = learner.catch_up(state, sharding.put(np.bool_(plan.prefix.age(step + 1) == 0)))
                    clock.mark("update", state, may_stop=False)
                    tokens = diagnostics.token_metrics(rows, old, entropy)
                    updates, token_metrics, sums = jax.device_get((updates, tokens, sums))
                    local = sharding.local_rows((earned, baselines))

                # Say what happened, on all processes together.
                earned, baselines = sharding.gather(local)
                everywhere = sharding.gather((scores, seen[0].length, seen[0].ended, seen[1]))
                lengths = sharding.gather((batch.prompts.length, seen[2].length))
                counts = graded.counts() | throughput.step_flops(plan, batch.prompts.length, *seen)
                if drawn:
                    counts["flops/think"] += drawn.flops(plan.model)
                counts = sharding.gather({name: np.array([number]) for name, number in counts.items()})
                sampled = int(token_metrics.pop("tokens")) + resampled.get("resample/dropped_tokens", 0)
                row = diagnostics.rollout_metrics(*everywhere, plan.names, plan.credit.start)
                row |= diagnostics.progress_metrics(everywhere[0].correct, everywhere[3], *lengths, plan)
                row |= diagnostics.credit_metrics(earned, baselines) | diagnostics.known(token_metrics)
                row |= diagnostics.update_metrics(updates) | {name: int(n.sum()) for name, n in counts.items()}
                told = drawn.metrics() | {"prefix/age": plan.prefix.age(step)} if drawn else {}
                sampled += told.get("prefix/sampled", 0)
                totals = record["totals"]
                totals = {"tokens": totals["tokens"] + sampled, "seconds": totals["seconds"] + clock.total()}
                row |= resampled | told | stats.metrics() | totals | clock.seconds() | stats.phase_seconds()
                row["seconds/think"] += drawn.seconds if drawn else 0.0
                row |= throughput.speed(row, sampled, peak) | throughput.memory()
                row |= throughput.goodput(record["began"], totals["seconds"])
                writer.write(step, row)
                shown = ("score/anytime", "length/mean", "update/grad_norm")
                progress.update(step, {name: row[name] for name in shown})
                if step % config.log.samples_every == 0:
                    prefix = drawn and drawn.prefixes
                    shown = plan, batch.problems, *seen, scores, local[0], config.log.samples, prefix
                    writer.write_samples(step, diagnostics.samples(*shown))
                clock.close()
                due = step % config.evaluation.every == 0
                done, record = step, advanced(record, batches, totals, evaluated=not due)
                record = crediting.with_batch(plan, record, sums)
                stop.check("update")
                if due:
                    record = evaluate_row(config, plan, held_out, state.params, writer, step, record, stop)
                if step % kept.every == 0 or step == plan.steps or stop.was_slow():
                    saved.save(step, state, record | {"written": writer.flush()})
                    stop.check("save")
        except preemption.Stopped as stopped:
            saved.save(done, state, record | {"written": writer.flush()})
            saved.wait()
            distributed.say(f"{stopped}: step {done} is saved, the same command goes on from there")
            return preemption.EXIT_CODE
        saved.wait()  # while a notice still ends nothing
    return None


def resample(plan, batches, sample, key, cuts, batch, seen, graded) -> tuple:
    """Problems with signal in place of those without: the batch, its traces, forks and answers on the host, its scores,
    and what that took.
    """

    def again():
        batch = next(batches)
        local = sharding.local_rows(sample(sharding.put_rows(batch.prompts), key, cuts)[:3])
        return batch, local, grading.grade(plan.task, plan.tokenizer, batch.problems, *local).scores.correct

    found = resampling.replace(batch, seen, graded.scores.correct, again, plan.resample)
    if found.rounds:
        graded = grading.grade(plan.task, plan.tokenizer, found.batch.problems, *found.rows)
    return found.batch, found.rows, graded, found.metrics()


def advanced(record: dict, batches, totals: dict, evaluated: bool) -> dict:
    """What a checkpoint holds beside the state, after a step.

    problems: what the data's `cursor` points into. config: the experiment, whose seed and a step's number make all its
    keys. began: when the run did (Unix time).
    totals: tokens that were sampled and seconds of steps, of those that count. evaluated: whether the evaluation of
    this step is done. written: how many rows and samples were, known when it is saved. baseline_fit: the sums that the
    regression baseline is fitted to, where there is one.
    """
    return record | {"cursor": batches.get_state(), "totals": totals, "evaluated": evaluated}


def resumable(plan: Settings) -> tuple[str, ...]:
    """What may change when a run is resumed; a cosine is as long as the run, so there `steps` may not.

    The machine may, too: with what is computed where and at once the numbers change by rounding only.
    """
    steps = () if plan.optimizer.schedule == "cosine" else ("steps",)
    machine = ("mesh", "learner.buckets", "learner.micro_tokens", "rollout.segment")
    return (*steps, *machine, "evaluation", "checkpoint", "log", "warm_start.cache", "data.eval", "task.verifier")


@functools.partial(jax.profiler.annotate_function, name="evaluation")
def evaluate_row(config, plan, held_out, params, writer, step, record, stop) -> dict:
    """A small evaluation as a row of its own kind: accuracy at budgets against steps and sampled tokens.

    With several sets, `eval/NAME/...` of each and `eval/...`, the mean over them. Returns the record, evaluated.
    """
    options, rows = evaluation.Options.from_config(config.evaluation), {}
    for name, found in held_out.items():
        if len(found.problems):
            poll = functools.partial(stop.check, "evaluation")
            result = evaluation.evaluate(plan, params, found.problems, options, poll=poll)
            accuracy = result.correct.mean(axis=(0, 1, 3))
            rows[name] = {
                "anytime": accuracy.mean(),
                "final": accuracy[-1],
                "accuracy": accuracy,
                "length": result.length.mean(),
            }
    if rows:
        mean = {f"eval/{key}": np.mean([row[key] for row in rows.values()], axis=0) for key in rows[next(iter(rows))]}
        each = {f"eval/{name}/{key}": value for name, row in rows.items() for key, value in row.items()}
        totals = record["totals"]
        row = mean | (each if len(rows) > 1 else {}) | totals
        writer.write(step, row | throughput.memory() | throughput.goodput(record["began"], totals["seconds"]))
    return record | {"evaluated": True}


def describe(plan: Settings) -> str:
    """The resolved sizes, for the start of a run and for --dry_run."""
    params = jax.eval_shape(lambda: learner.decoder.init_params(plan.model, 0))
    count = sum(x.size for x in jax.tree.leaves(params))
    inserted = f"{len(plan.rollout.elicit_ended)} or {len(plan.rollout.elicit_cut)} tokens inserted before an answer"
    absent = "" if plan.tokenizer.hf else "; by the configuration, as init is empty: it was not checked with a model"
    cut = f"up to {plan.rollout.trace_pad} tokens, cut into {plan.schedule.size} episodes: {plan.episodes}"
    if plan.schedule.tokens is not None:
        cut = f"{np.asarray(plan.schedule.tokens).tolist()} tokens"
    longest = f"{plan.prompt_pad}"
    if plan.prefix:
        longest += f" and prefixes up to {plan.prefix.tokens}, by {plan.prefix}"
    lines = {
        "task": plan.task,
        "tokens": f"prompts up to {longest}, {inserted}, answers up to {plan.rollout.answer_cap}{absent}",
        "model": f"{count:,} parameters (float32), computed in {plan.model.dtype}",
        "budgets": f"{cut}, prior {np.asarray(plan.schedule.weights).round(4).tolist()}",
        "credit": f"{plan.credit}",
        "rollout": f"{plan.problems} problems x {plan.rollout.group_size} traces x {plan.columns} forks x "
        f"{plan.rollout.answers} answers, {plan.rollout.slots or plan.rows} traces at a time; {plan.kv_bytes():,} "
        f"bytes of KV cache, split over mesh {plan.mesh}",
        "update": f"{plan.minibatches} minibatches of {plan.rows // plan.minibatches} rows of "
        f"{' or '.join(map(str, plan.loss.lengths))} tokens; {plan.optimizer}",
        "loss": plan.loss,
    }
    return "\n".join(f"{name:8} {value}" for name, value in lines.items())


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(distributed.ends_all(main))
