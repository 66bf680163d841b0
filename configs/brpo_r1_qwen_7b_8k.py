"""AnytimeReasoner (BRPO) on R1-Distill-Qwen-7B at 2k, 4k, 6k, 8k tokens: the larger variant of arXiv 2505.13438.

    python -m tto_jax.train --config=configs/brpo_r1_qwen_7b_8k.py:uniform --workdir=runs/ar_uniform_7b \\
      --config.init=models/DeepSeek-R1-Distill-Qwen-7B --config.data.train=sets/deepscaler \\
      --config.data.eval="('sets/amc22','sets/aime24','sets/math500','sets/minerva','sets/olympiad')"

Variants: uniform (default), linear, base: the prior over the budgets.

Data: the 40,315 problems of DeepScaleR (agentica-org/DeepScaleR-Preview-Dataset, one JSON list) and five evaluation
sets; configs/r1.py says how those are prepared, and how checkpoints are evaluated.

    python -m tto_jax.prepare_data --files=deepscaler.json --out=sets/deepscaler

A rollout holds 599.4 GB of KV cache and an update 121.8 GB of parameters, moments and gradients (float32):
this takes several accelerators. Not run at scale, and we hold no averages of the paper for this size.

Fits, as compiled ahead of time (README): v5e:16x16 with --config.mesh="(1,64,4)"; v5p:4x4x4 with the default mesh (all
devices on fsdp).

As 1.5B, but 2 epochs in batches of 128 problems (629 steps, each with two updates of 64 problems) and clip-higher. The
paper gives no upper clip: 0.28 is our choice.
"""

from ml_collections import ConfigDict

from configs import r1


def get_config(variant: str = "uniform") -> ConfigDict:
    config = r1.experiment(variant, r1.BRPO, "7b", budgets=(2000, 4000, 6000, 8000), problems=128, epochs=2)
    config.learner.clip_high = 0.28
    return config
