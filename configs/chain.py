"""chain: a running value through a chain of operations; terse thinking is as good as verbose thinking, and shorter.

    python -m tto_jax.train --config=configs/chain.py:brpo --workdir=runs/chain_brpo

Variants: as peak's, but mrt_online has six blocks of tokens, as a step may begin before its label, and prefixes
have up to three; `two_digits` after a comma (`brpo,two_digits`) asks for the last two values, ended by EOS.
One device is enough (compiled for v5e:1x1); a 2-core machine takes minutes.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "brpo") -> ConfigDict:
    config = common.base(variant, budgets=(18, 36, 54, 72))
    config.task = ConfigDict({"name": "chain", "min_ops": 4, "max_ops": 12, "answer_digits": 1, "max_trace_tokens": 72})
    if config.episodes.rule != "budgets":
        config.episodes.rule = "blocks"
    config.episodes.block = 12
    config.prefix.update({"rule": "blocks", "tokens": 36})
    config.steps = 60
    config.model.learned_positions = False  # steps are found by their labels; here they slow the warm start down
    config.learner.tokens_per_row = 36
    config.learner.optimizer.learning_rate = 3e-4
    config.warm_start.steps = 2500
    config.evaluation.budgets = (9, 18, 27, 36, 45, 54, 63, 72)
    config.evaluation.update({"extension_tokens": 12, "extension_words": ("wait",)})  # it begins a check
    if "fast" in variant.split(","):
        config.task.update({"min_ops": 3, "max_ops": 8, "max_trace_tokens": 48})
        config.budgets.tokens = (12, 24, 36, 48)[-len(config.budgets.tokens) :]
        config.evaluation.budgets = (6, 12, 18, 24, 30, 36, 42, 48)
        config.learner.tokens_per_row = 24
        config.episodes.block = 8
        config.prefix.tokens = 24
    if "two_digits" in variant.split(","):
        config.task.answer_digits = 2
    return config.lock()
