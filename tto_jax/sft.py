"""Supervised fine-tuning: python -m tto_jax.sft --config=configs/sft.py --workdir=DIR --config.init=MODEL \\
  --config.data.train="('chats.jsonl',)" [--config.a.b=value] [--dry_run]

Learns the assistant's turns of chats, or suffixes of them (`chats.read` says what a file holds). A run resumes from its
last checkpoint by default; what it made is a run like others: evaluate and convert take it, and `init` starts from it.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from tto_jax import chats, checkpoint, distributed, host, inputs, learner, preemption, sharding
from tto_jax.core.types import TokenTree
from tto_jax.kernels import tree_attention
from tto_jax.learner import LossConfig, OptimizerConfig
from tto_jax.metrics import MetricsWriter, Progress
from tto_jax.models.config import ModelConfig
from tto_jax.tokenizer import Tokenizer

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, such as configs/sft.py.", lock_config=True, allow_override=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives: checkpoints, metrics.", allow_override=True)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check and print sizes, then stop.", allow_override=True)

OVERRIDABLE = ("mesh", "learner.micro_tokens", "model.remat", "data.eval", "evaluation", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The settings of a run, resolved."""

    seed: int
    steps: int
    rows: int  # of a step, all processes together
    row_length: int  # tokens
    tokenizer: Tokenizer
    model: ModelConfig
    loss: LossConfig
    optimizer: OptimizerConfig

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


def main(argv):
    """The page."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every option is a flag, such as --config.steps=10")
    distributed.initialize()
    host.set_up()
    config = _CONFIG.value
    plan = build(config)
    train, held_out = (read(config.data[name], plan) for name in ("train", "eval"))
    distributed.say(describe(plan, train, held_out))
    if _DRY_RUN.value:
        return
    if not _WORKDIR.value:
        raise app.UsageError("--workdir is missing: name a folder, or use --dry_run")
    fit(config, plan, train, held_out, epath.Path(_WORKDIR.value))


def build(config) -> Plan:
    """Resolve and check a configuration. Raises ValueError for what cannot work."""
    for name in ("steps", "row_length", "evaluation.every", "checkpoint.every", "checkpoint.keep", "learner.rows"):
        value = config
        for part in name.split("."):
            value = value[part]
        if value < 1:
            raise ValueError(f"{name}={value}: it must be at least 1")
    if not config.init:
        raise ValueError("init is empty: name the model to start from, a Hugging Face directory or a checkpoint")
    if not config.data.train:
        raise ValueError("data.train is empty: name JSON-lines files of chats, such as ('chats.jsonl',)")
    tokenizer, model = inputs.pretrained_model(config.init, config.model.to_dict(), inputs.prompting_of(config))
    if config.row_length > model.max_position:
        raise ValueError(f"row_length={config.row_length}: the model has model.max_position={model.max_position}")
    return Plan(
        seed=config.seed,
        steps=config.steps,
        rows=config.learner.rows,
        row_length=config.row_length,
        tokenizer=tokenizer,
        model=model,
        loss=LossConfig(config.row_length, config.row_length, constant=1.0, micro_tokens=config.learner.micro_tokens),
        optimizer=OptimizerConfig(**config.learner.optimizer.to_dict(), decay_steps=config.steps),
    )


def read(files, plan: Plan) -> chats.Examples | None:
    """The examples of some files; None where there are no files."""
    return chats.encode(chats.read(files), plan.tokenizer, plan.row_length) if files else None


def fit(config, plan: Plan, train: chats.Examples, held_out: chats.Examples | None, workdir: epath.Path) -> None:
    """`plan.steps` steps of maximum likelihood."""
    steps = ("steps",) if plan.optimizer.schedule != "cosine" else ()
    checkpoint.claim_workdir(workdir, config.to_dict(), overridable=(*OVERRIDABLE, *steps))
    mesh = sharding.mesh_of(config.mesh)
    distributed.say(distributed.banner(mesh))
    distributed.check_same(
        {"configuration": config.to_json(sort_keys=True), "code": host.commit(), "data": train.fingerprint}
    )
    plan = plan.on(mesh)
    batches = chats.training_rows(train, plan.rows, plan.row_length, plan.seed)
    fixed = chats.evaluation_rows(held_out, plan.rows, plan.row_length) if held_out else []
    kept = config.checkpoint
    with contextlib.ExitStack() as opened:  # whatever ends the run, a save in flight is finished, files are closed
        saved = checkpoint.Checkpointer(workdir / "checkpoints", keep=kept.keep, keep_every=kept.keep_every)
        opened.enter_context(saved)
        opened.enter_context(sharding.use(mesh))
        like = learner.abstract_state(plan.model, plan.optimizer)
        resumed = saved.restore_latest(sharding.abstract(mesh, like, plan.model.num_kv_heads))
        if resumed:
            done, state, record = resumed
            if record["data"] != train.fingerprint:
                raise ValueError(f"data.train={config.data.train} has changed since step {done}: its cursor is lost")
            batches.set_state(record["cursor"])
        else:
            params = inputs.pretrained_params(config, plan.model, workdir, mesh)
            state = learner.init_state(params, plan.optimizer, mesh, plan.model.num_kv_heads)
            done, record = 0, {"data": train.fingerprint, "cursor": batches.get_state(), "written": [0, 0]}
            del params
        writer = opened.enter_context(MetricsWriter(workdir, record["written"]))
        progress = opened.enter_context(Progress(plan.steps, initial=done, name="sft"))
        start = done  # what the run goes on from is on the disk, or made again
        stop = opened.enter_context(preemption.Notice(lambda: done == start or done in saved.written()))
        try:
            if not done and fixed:
                writer.write(0, {"eval/loss": held_out_loss(plan, state.params, fixed)})
            for step in range(done + 1, plan.steps + 1):
                stop.begin()
                rows = put_own_rows(next(batches))
                state, metrics = learner.supervised_step(plan.model, plan.loss, plan.optimizer, state, rows)
                row = {name: float(value) for name, value in jax.device_get(metrics).items()}
                row |= {"tokens/trained": int(rows.loss_mask.sum()), "tokens/padding": int((rows.tree < 0).sum())}
                done, record = step, record | {"cursor": batches.get_state()}
                if fixed and (step % config.evaluation.every == 0 or step == plan.steps):
                    row["eval/loss"] = held_out_loss(plan, state.params, fixed)
                writer.write(step, row)
                progress.update(step, {"loss": row["loss/total"]})
                if step % kept.every == 0 or step == plan.steps or stop.was_slow():
                    saved.save(step, state, record | {"written": writer.flush()})
                stop.check("step")
        except preemption.Stopped as stopped:
            saved.save(done, state, record | {"written": writer.flush()})
            saved.wait()
            distributed.say(f"{stopped}: step {done} is saved, the same command goes on from there")
        saved.wait()  # while a notice still ends nothing


def put_own_rows(rows: TokenTree) -> TokenTree:
    """This process's part of a batch that every process has, on the devices."""
    each = len(rows.tokens) // jax.process_count()
    own = slice(jax.process_index() * each, (jax.process_index() + 1) * each)
    return sharding.put_rows(jax.tree.map(lambda x: x[own], rows))


def held_out_loss(plan: Plan, params, batches: list[TokenTree]) -> float:
    """Minus the mean log-prob of the trained tokens, nats."""
    total = tokens = 0.0
    for batch in batches:
        logprob, _ = learner.score_logprobs(plan.model, plan.loss, params, put_own_rows(batch))
        total, tokens = total - float(jnp.sum(logprob)), tokens + int(np.sum(batch.loss_mask))
    return total / max(tokens, 1)


def describe(plan: Plan, train: chats.Examples, held_out: chats.Examples | None) -> str:
    """The resolved sizes."""
    each = plan.rows * plan.row_length
    epochs = plan.steps * each / train.num_tokens
    lines = {
        "data": f"{len(train.tokens):,} examples of {train.num_tokens:,} tokens, {train.dropped:,} left out: too long",
        "held out": f"{len(held_out.tokens):,} examples, {held_out.dropped:,} left out" if held_out else "nothing",
        "steps": f"{plan.steps} of {plan.rows} rows of {plan.row_length} tokens: about {epochs:.2f} epochs",
        "model": f"{dataclasses.asdict(plan.model)}",
        "optimizer": f"{plan.optimizer}",
    }
    return "\n".join(f"{name:9} {value}" for name, value in lines.items())


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(distributed.ends_all(main))
