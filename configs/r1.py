"""What the R1-Distill-Qwen experiments share: the setup of AnytimeReasoner (arXiv 2505.13438 and its released code).

The sets come from DeepScaleR's repository and are prepared once:

    python -m tto_jax.prepare_data --files=deepscaler.json --out=sets/deepscaler
    python -m tto_jax.prepare_data --files=test/amc.json --out=sets/amc22
    python -m tto_jax.prepare_data --files=test/aime.json --out=sets/aime24
    python -m tto_jax.prepare_data --files=test/math.json --out=sets/math500
    python -m tto_jax.prepare_data --files=test/minerva.json --out=sets/minerva
    python -m tto_jax.prepare_data --files=test/olympiad_bench.json --out=sets/olympiad

Problems that occur twice are kept once, and those with more than 1,024 prompt tokens are left out: both are counted.

The paper draws 320 traces a problem of AMC22 and AIME24, and 80 of the others, so runs are evaluated twice. Averages
are means over the five sets. The last command is for the model before training:

    python -m tto_jax.evaluate --workdir=runs/ar_uniform --step=600 --out=runs/ar_uniform/320 --traces=320 \\
      --data=sets/amc22,sets/aime24
    python -m tto_jax.evaluate --workdir=runs/ar_uniform --step=600 --out=runs/ar_uniform/80 --traces=80 \\
      --data=sets/math500,sets/minerva,sets/olympiad
    python -m tto_jax.evaluate --config=configs/brpo_r1_qwen_1p5b_8k.py --out=runs/before/80 --traces=80 \\
      --model=models/DeepSeek-R1-Distill-Qwen-1.5B --data=sets/math500,sets/minerva,sets/olympiad
"""

from ml_collections import ConfigDict

from configs import common

PROBLEMS = 40_315  # of DeepScaleR

# The public checkpoints' config.json; the model that `init` names must agree.
_QWEN = {
    "num_layers": 28,
    "head_dim": 128,
    "max_position": 131_072,
    "rope_theta": 10_000.0,
    "norm_eps": 1e-6,
    "attention_bias": True,
    "qk_norm": False,
    "tie_embeddings": False,
}
MODELS = {
    "1p5b": _QWEN | {"vocab_size": 151_936, "hidden_size": 1536, "num_heads": 12, "num_kv_heads": 2, "mlp_size": 8960},
    "7b": _QWEN | {"vocab_size": 152_064, "hidden_size": 3584, "num_heads": 28, "num_kv_heads": 4, "mlp_size": 18_944},
}

# variant: algorithm in `common`
BRPO = {"uniform": "brpo", "linear": "brpo_linear", "base": "brpo_base"}
GRPO = {
    "grpo": "grpo",
    "linear": "grpo_linear",
    "decouple": "grpo_answers",
    "vr": "grpo_vr",
    "length": "grpo_length",
}


def experiment(
    variant: str, variants: dict[str, str], model: str, budgets: tuple[int, ...], problems: int = 64, epochs: int = 1
) -> ConfigDict:
    """The experiment on `model`, a name of MODELS, at `budgets` tokens; `variant` is one of `variants`."""
    if variant not in variants:
        raise ValueError(f"variant {variant!r}: choose one of {tuple(variants)}")
    config = common.pretrained(variant, variants[variant], budgets)
    config.model.update(MODELS[model])
    config.rollout.problems = problems
    config.steps = epochs * PROBLEMS // problems  # batches may span epochs
    # The released code divides by its response buffer, padding included, 10,176 tokens at 8k for every variant:
    # room for the trace and 16 x (128 + 8) tokens of answers (at 16k, too: our choice). The normalizer `released` would
    # count the answers of each variant.
    config.learner.tokens_per_row = budgets[-1] + 16 * (128 + 8)
    config.learner.micro_tokens = 1024 + config.learner.tokens_per_row  # one of the longest rows, or shorter ones
    if variant == "length":
        config.credit.length_penalty = 0.2
    config.evaluation.budgets = tuple(budgets[-1] * i // 32 for i in range(1, 33))
    # While training few problems with many traces: 40 problems of five sets. `python -m tto_jax.evaluate` takes all.
    config.evaluation.update({"traces": 80, "problems": 8, "every": 100})
    config.checkpoint.every = 50  # the last two are kept: with 629 steps, 600, at which the paper reports, and the end
    return config.lock()
