"""The loop of supervised fine-tuning: a run that resumes from its last checkpoint, and stops at a notice."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tto_jax import checkpoint, distributed, learner, preemption, sharding
from tto_jax.core.types import TokenTree
from tto_jax.kernels import tree_attention
from tto_jax.learner import LossConfig, OptimizerConfig, TrainState
from tto_jax.metrics import MetricsWriter, Progress
from tto_jax.models.config import ModelConfig
from tto_jax.models.decoder import Params


@dataclasses.dataclass(frozen=True)
class Plan:
    """The settings of a run, resolved."""

    steps: int
    rows: int  # of a step, all processes together
    row_length: int  # tokens
    model: ModelConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    evaluate_every: int  # steps
    save_every: int  # steps
    keep: int  # checkpoints
    keep_every: int  # steps whose checkpoints are kept, too; 0: none

    def on(self, mesh: jax.sharding.Mesh | None) -> "Plan":
        """These settings on a mesh. Raises ValueError if it cannot split the rows or the heads."""
        platform = (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform
        loss = dataclasses.replace(self.loss, attention=tree_attention.choose(platform))
        if mesh is None:
            return dataclasses.replace(self, loss=loss)
        if self.rows % (shards := sharding.row_shards(mesh)):
            raise ValueError(
                f"learner.rows={self.rows} must be a multiple of {shards}: mesh {dict(mesh.shape)} splits rows into "
                "so many parts; choose a multiple, or put more devices on tensor"
            )
        copies = sharding.kv_copies(self.model.num_heads, self.model.num_kv_heads, mesh)
        return dataclasses.replace(self, model=dataclasses.replace(self.model, kv_copies=copies), loss=loss)


def fit(
    plan: Plan,
    mesh: jax.sharding.Mesh | None,
    batches: Iterable[TokenTree],
    data: str,
    initial: Callable[[], Params],
    workdir: epath.Path,
    *,
    held_out: Sequence[TokenTree] = (),
    name: str = "sft",
) -> TrainState | None:
    """`plan.steps` steps of maximum likelihood, from the last checkpoint in `workdir` or from the beginning.

    Args:
      plan: on the mesh.
      batches: rows of all processes together, the same on each; an iterator with a state.
      data: what the batches are made from; a resumed run must have the same.
      initial: gives the parameters to start from, on the mesh; they are taken over.
      workdir: gets checkpoints and metrics.
      held_out: batches whose loss is measured before the first step, every `plan.evaluate_every` and at the end.

    Returns:
      The state after the last step; None if a notice stopped the run: what was done is saved.

    Raises:
      ValueError: other data than the checkpoint's.
    """
    with contextlib.ExitStack() as opened:  # whatever ends the run, a save in flight is finished, files are closed
        saved = checkpoint.Checkpointer(workdir / "checkpoints", keep=plan.keep, keep_every=plan.keep_every)
        opened.enter_context(saved)
        with sharding.use(mesh):
            like = learner.abstract_state(plan.model, plan.optimizer)
            resumed = saved.restore_latest(sharding.abstract(mesh, like, plan.model.num_kv_heads))
        if resumed:
            done, state, record = resumed
            if record["data"] != data:
                raise ValueError(f"the data of {workdir} have changed since step {done}: its cursor is lost")
            batches.set_state(record["cursor"])
        else:
            state = learner.init_state(initial(), plan.optimizer, mesh, plan.model.num_kv_heads)
            done, record = 0, {"data": data, "cursor": batches.get_state(), "written": [0, 0]}
        opened.enter_context(sharding.use(mesh))
        writer = opened.enter_context(MetricsWriter(workdir, record["written"]))
        progress = opened.enter_context(Progress(plan.steps, initial=done, name=name))
        start = done  # what the run goes on from is on the disk, or made again
        stop = opened.enter_context(preemption.Notice(lambda: done == start or done in saved.written()))
        try:
            if not done and held_out:
                writer.write(0, {"eval/loss": held_out_loss(plan, state.params, held_out)})
            for step in range(done + 1, plan.steps + 1):
                stop.begin()
                rows = put_own_rows(next(batches))
                state, metrics = learner.supervised_step(plan.model, plan.loss, plan.optimizer, state, rows)
                row = {key: float(value) for key, value in jax.device_get(metrics).items()}
                row |= {"tokens/trained": int(rows.loss_mask.sum()), "tokens/padding": int((rows.tree < 0).sum())}
                done, record = step, record | {"cursor": batches.get_state()}
                if held_out and (step % plan.evaluate_every == 0 or step == plan.steps):
                    row["eval/loss"] = held_out_loss(plan, state.params, held_out)
                writer.write(step, row)
                progress.update(step, {"loss": row["loss/total"]})
                if step % plan.save_every == 0 or step == plan.steps or stop.was_slow():
                    saved.save(step, state, record | {"written": writer.flush()})
                stop.check("step")
        except preemption.Stopped as stopped:
            saved.save(done, state, record | {"written": writer.flush()})
            saved.wait()
            distributed.say(f"{stopped}: step {done} is saved, the same command goes on from there")
            return None
        saved.wait()  # while a notice still ends nothing
    return state


def put_own_rows(rows: TokenTree) -> TokenTree:
    """This process's part of a batch that every process has, on the devices."""
    each = len(rows.tokens) // jax.process_count()
    own = slice(jax.process_index() * each, (jax.process_index() + 1) * each)
    return sharding.put_rows(jax.tree.map(lambda x: x[own], rows))


def held_out_loss(plan: Plan, params: Params, batches: Sequence[TokenTree]) -> float:
    """Minus the mean log-prob of the trained tokens, nats."""
    total = tokens = 0.0
    for batch in batches:
        logprob, _ = learner.score_logprobs(plan.model, plan.loss, params, put_own_rows(batch))
        total, tokens = total - float(jnp.sum(logprob)), tokens + int(np.sum(batch.loss_mask))
    return total / max(tokens, 1)
