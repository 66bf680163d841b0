"""The first stage of an embedded experiment: supervised fine-tuning on demonstrations, cached by what decides it."""

import jax
import numpy as np
from etils import epath

from tto_jax import checkpoint, data, inputs, learner, sharding
from tto_jax.core import token_tree
from tto_jax.learner import LossConfig, OptimizerConfig
from tto_jax.metrics import Progress
from tto_jax.models import decoder
from tto_jax.models.decoder import Params
from tto_jax.settings import Settings


def identity(config) -> dict:
    """Everything that the warm start's parameters depend on."""
    warm = config.warm_start.to_dict()
    del warm["cache"]
    return {"task": config.task.to_dict(), "model": config.model.to_dict(), "warm_start": warm}


def cache_path(config, workdir: epath.Path) -> epath.Path:
    """Where the warm start of this configuration lies: beside the workdir, unless `warm_start.cache` says where."""
    folder = epath.Path(config.warm_start.cache) if config.warm_start.cache else workdir.parent
    return folder / f"warm_start-{checkpoint.config_hash(identity(config))}"


def get(config, settings: Settings, workdir: epath.Path) -> Params:
    """The warm start's parameters: from the cache, or trained now and cached."""
    path = cache_path(config, workdir)
    like = jax.eval_shape(lambda: decoder.init_params(settings.model, 0))
    if not (path / "info.json").exists():
        params = train(config.warm_start, settings)
        checkpoint.save_params(path, params, identity(config))
    return checkpoint.load_params(path, like)[0]


def initial_params(config, settings: Settings, workdir: epath.Path, mesh: jax.sharding.Mesh | None) -> Params:
    """What a run starts from, on the mesh: a pretrained model, or the warm start, which one device trains."""
    if inputs.is_pretrained(config):
        return inputs.pretrained_params(config, settings.model, workdir, mesh)
    return sharding.place(mesh, get(config, settings, workdir), settings.model.num_kv_heads)


def train(warm, settings: Settings) -> Params:
    """Maximum likelihood on fresh demonstrations; deterministic in `warm.seed`."""
    if warm.steps < 1 or warm.batch_size < 1:
        raise ValueError(f"warm_start.steps={warm.steps}, batch_size={warm.batch_size}: both must be at least 1")
    task = settings.task
    length = data.demonstration_length(task)
    optimizer = OptimizerConfig(**warm.optimizer.to_dict(), decay_steps=warm.steps)
    loss = LossConfig(num_targets=length - 1, num_states=length - 1, constant=1.0, micro_tokens=warm.micro_tokens)
    state = learner.init_state(decoder.init_params(settings.model, warm.seed), optimizer)
    with Progress(warm.steps, name="warm start", every=max(warm.steps // 4, 1)) as progress:
        for step in range(warm.steps):
            batch = data.demonstration_batch(task, settings.tokenizer, warm.seed, step, warm.batch_size, length)
            rows = _rows(*jax.device_put(batch))
            state, metrics = learner.supervised_step(settings.model, loss, optimizer, state, rows)
            if (step + 1) % 50 == 0 or step + 1 == warm.steps:
                value = float(jax.device_get(metrics["loss/total"]))
                if not np.isfinite(value):
                    raise FloatingPointError(
                        f"warm start: the loss is {value} at step {step + 1}; lower the learning rate"
                    )
                progress.update(step + 1, {"loss": value})
    return state.params


_rows = jax.jit(token_tree.sequences)
