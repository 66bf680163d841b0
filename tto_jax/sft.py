"""Supervised fine-tuning: python -m tto_jax.sft --config=configs/sft.py --workdir=DIR --config.init=MODEL \\
  --config.data.train="('chats.jsonl',)" [--config.a.b=value] [--dry_run]

Learns the assistant's turns of chats, or suffixes of them (`chats.read` says what a file holds). A run resumes from its
last checkpoint by default; what it made is a run like others: evaluate and convert take it, and `init` starts from it.
"""

import dataclasses

from absl import app, flags
from etils import epath
from ml_collections import config_flags

from tto_jax import chats, checkpoint, distributed, examples, host, inputs, preemption, sharding, supervised
from tto_jax.examples import Examples
from tto_jax.learner import LossConfig, OptimizerConfig
from tto_jax.supervised import Plan
from tto_jax.tokenizer import Tokenizer

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, such as configs/sft.py.", lock_config=True, allow_override=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives: checkpoints, metrics.", allow_override=True)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check and print sizes, then stop.", allow_override=True)

OVERRIDABLE = ("mesh", "learner.micro_tokens", "model.remat", "data.eval", "evaluation", "checkpoint")


def main(argv):
    """The page."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every option is a flag, such as --config.steps=10")
    distributed.initialize()
    host.set_up()
    config = _CONFIG.value
    tokenizer, plan = build(config)
    train, held_out = (read(config.data[name], tokenizer, plan.row_length) for name in ("train", "eval"))
    distributed.say(describe(plan, train, held_out))
    if _DRY_RUN.value:
        return None
    if not _WORKDIR.value:
        raise app.UsageError("--workdir is missing: name a folder, or use --dry_run")
    return fit(config, plan, train, held_out, epath.Path(_WORKDIR.value))


def build(config) -> tuple[Tokenizer, Plan]:
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
    return tokenizer, Plan(
        steps=config.steps,
        rows=config.learner.rows,
        row_length=config.row_length,
        model=model,
        loss=LossConfig(config.row_length, config.row_length, constant=1.0, micro_tokens=config.learner.micro_tokens),
        optimizer=OptimizerConfig(**config.learner.optimizer.to_dict(), decay_steps=config.steps),
        evaluate_every=config.evaluation.every,
        save_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
    )


def read(files, tokenizer: Tokenizer, row_length: int) -> Examples | None:
    """The examples of some files; None where there are no files."""
    return chats.encode(chats.read(files), tokenizer, row_length) if files else None


def fit(config, plan: Plan, train: Examples, held_out: Examples | None, workdir: epath.Path) -> int | None:
    """The run. Returns an exit code if a notice stopped it."""
    steps = ("steps",) if plan.optimizer.schedule != "cosine" else ()
    checkpoint.claim_workdir(workdir, config.to_dict(), overridable=(*OVERRIDABLE, *steps))
    mesh = sharding.mesh_of(config.mesh)
    distributed.say(distributed.banner(mesh))
    distributed.check_same(
        {"configuration": config.to_json(sort_keys=True), "code": host.commit(), "data": train.fingerprint}
    )
    plan = plan.on(mesh)
    state = supervised.fit(
        plan,
        mesh,
        examples.training_rows(train, plan.rows, plan.row_length, config.seed),
        train.fingerprint,
        lambda: inputs.pretrained_params(config, plan.model, workdir, mesh),
        workdir,
        held_out=examples.evaluation_rows(held_out, plan.rows, plan.row_length) if held_out else (),
    )
    return preemption.EXIT_CODE if state is None else None


def describe(plan: Plan, train: Examples, held_out: Examples | None) -> str:
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
