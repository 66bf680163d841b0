"""peak: the largest of 8 values; cues say where it probably is, so the order of thinking matters.

    python -m tto_jax.train --config=configs/peak.py:brpo --workdir=runs/peak_brpo

Variants: brpo, brpo_linear, brpo_base, grpo, grpo_length, grpo_answers, group, mrt, regression (BRPO with a fitted
baseline), mrt_online (episodes of two checks, which begin at labels), progress_gae_0, progress_gae_half, progress_gae_1
(discounts of progress weighted by the prior's tail), potential (weighted by 1), mrt_termination, mrt_joint,
mrt_explicit (MRT's RL from prefixes: up to three episodes of two checks, of the policy of up to 20 steps ago); `fast`
alone or after a comma (`grpo,fast`) is the small size. One device is enough (compiled for v5e:1x1); a 2-core machine
takes minutes.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "brpo") -> ConfigDict:
    config = common.base(variant, budgets=(6, 12, 18, 24))
    config.task = ConfigDict({"name": "peak", "num_values": 8})
    config.episodes.update({"markers": tuple("abcdefgh"), "separator": " ", "gap": 0, "max_cuts": 7, "group": 2})
    config.prefix.tokens = 18
    config.steps = 120
    config.learner.tokens_per_row = 12
    config.learner.optimizer.learning_rate = 5e-4
    config.warm_start.steps = 2000
    config.evaluation.budgets = (3, 6, 9, 12, 15, 18, 21, 24)
    config.evaluation.update({"extension_tokens": 12, "extension_words": tuple("abcdefgh")})  # a label begins a check
    if "fast" in variant.split(","):
        config.steps = 40
        config.learner.optimizer.learning_rate = 1e-3
        config.warm_start.steps = 500
    return config.lock()
