"""A GRPO step of Tunix as a peer of the update. Arrays: tokens i32[N,P+C], advantage f32[N], old_logprob f32[N,C].

Its own trainer with its own loss, jitted by itself, on rows without padding. Its Qwen2 family only.
"""

import json
import time
from pathlib import Path

import numpy as np

from tto_jax.bench.peer import serve

FIELDS = {  # of its configuration: in a checkpoint's config.json
    "num_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "use_tied_embedding": "tie_word_embeddings",
}
REMAT = {"none": "NONE", "full": "DECODER"}  # ours: theirs


def load(flags, arrays):
    """A step with clip by norm and AdamW at a rate that changes nothing, as in `tto_jax.bench.update`."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen2 import params
    from tunix.rl import algo_core, common
    from tunix.rl.grpo.grpo_learner import GRPOConfig, TrainExample
    from tunix.sft import peft_trainer

    described = json.loads((Path(flags.model) / "config.json").read_text())
    heads = described["hidden_size"] // described["num_attention_heads"]
    config = qwen2.ModelConfig(
        **{ours: described[theirs] for ours, theirs in FIELDS.items()},
        head_dim=described.get("head_dim") or heads,
        rope_theta=int(described.get("rope_theta") or described["rope_parameters"]["rope_theta"]),
        dtype=jnp.dtype(flags.dtype),
        remat_config=qwen2.RematConfig[REMAT[flags.remat]],
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        model = params.create_model_from_safe_tensors(flags.model, config, mesh, jnp.float32)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-12, weight_decay=0.01))
    training = peft_trainer.TrainingConfig(eval_every_n_steps=2**30, max_steps=2**30)
    options = GRPOConfig(beta=0.0)
    options.temperature = 1.0
    pad = end = config.vocab_size  # no token is either
    trainer = (
        peft_trainer.PeftTrainer(model, optimizer, training)
        .with_loss_fn(lambda model, example: algo_core.grpo_loss_fn(model, example, options, pad, end), True)
        .with_gen_model_input_fn(lambda example: {"example": example})
    )
    step, _ = trainer.jit_train_and_eval_step()
    tokens, new = jnp.asarray(arrays["tokens"]), arrays["old_logprob"].shape[1]
    example = TrainExample(
        prompt_ids=tokens[:, :-new],
        prompt_mask=jnp.ones_like(tokens[:, :-new], bool),
        completion_ids=tokens[:, -new:],
        completion_mask=jnp.ones_like(tokens[:, -new:], bool),
        advantages=jnp.asarray(arrays["advantage"]),
        ref_per_token_logps=None,
        old_per_token_logps=jnp.asarray(arrays["old_logprob"]),
    )

    def work():
        with mesh:
            (loss, _, norm), _ = jax.block_until_ready((step(example), jax.tree.leaves(nnx.state(model))))
        return {"cpu_s": time.process_time(), "loss": float(loss), "grad_norm": float(norm)}

    def logprobs(tokens):
        tokens = jnp.asarray(np.load(tokens))
        with mesh:
            found = common.compute_per_token_logps(*nnx.split(model), tokens[:, :-new], tokens[:, -new:], pad, end)
        return {"logprobs": np.asarray(found).tolist()}

    return {"work": work, "logprobs": logprobs}


if __name__ == "__main__":
    serve(load, {"model": str, "dtype": str, "remat": str}, ("google-tunix", "jax", "flax"))
