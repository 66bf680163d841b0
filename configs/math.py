"""math: any pretrained model on any prepared set of problems; its sizes are read from `init`.

    python -m tto_jax.train --config=configs/math.py:brpo --workdir=runs/math \\
      --config.init=models/my_model --config.data.train=sets/math_train --config.data.eval="('sets/aime24',)"

Variants: those of peak.py; mrt_online cuts at the markers of MRT. Budgets, batch, rates are options like any other:
--config.budgets.tokens="(512,1024)" --config.rollout.problems=8

Which pod it fits on depends on the model: python -m tto_jax.compile_tpu --config=configs/math.py:brpo
--config.init=models/my_model --topology=v5e:4x4 says. A 1.5B model needs what brpo_r1_qwen_1p5b_8k.py does, or less.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "brpo") -> ConfigDict:
    if variant not in common.ALGORITHMS:
        raise ValueError(f"variant {variant!r}: choose one of {tuple(common.ALGORITHMS)}")
    config = common.pretrained(variant, variant, budgets=(1024, 2048, 3072, 4096))
    config.steps = 100
    config.evaluation.budgets = tuple(4096 * i // 32 for i in range(1, 33))
    config.learner.tokens_per_row = 4096
    return config.lock()
