"""AnytimeReasoner (BRPO) on R1-Distill-Qwen-1.5B at 8 budgets, 2k to 16k: the long variant of arXiv 2505.13438.

    python -m tto_jax.train --config=configs/brpo_r1_qwen_1p5b_16k.py:uniform --workdir=runs/ar_uniform_16k \\
      --config.init=models/DeepSeek-R1-Distill-Qwen-1.5B --config.data.train=sets/deepscaler \\
      --config.data.eval="('sets/amc22','sets/aime24','sets/math500','sets/minerva','sets/olympiad')"

Variants: uniform (default), linear, base: the prior over the budgets.

Data: the 40,315 problems of DeepScaleR (agentica-org/DeepScaleR-Preview-Dataset, one JSON list) and five evaluation
sets; configs/r1.py says how those are prepared, and how checkpoints are evaluated.

    python -m tto_jax.prepare_data --files=deepscaler.json --out=sets/deepscaler

A rollout holds 297.8 GB of KV cache and an update 28.4 GB of parameters, moments and gradients (float32):
this takes several accelerators. Not run at scale: to be compared with brpo_r1_qwen_1p5b_8k.py at equal budgets.

Fits, as compiled ahead of time (README): v5e:8x8 with --config.mesh="(1,16,4)"; v6e:4x4 and v5p:4x4x4 with the default
mesh (all devices on fsdp).

Batch, group, answers and steps are those of 8k; evaluated at 32 budgets from 500 to 16,000. We hold no averages of the
paper for this size.
"""

from ml_collections import ConfigDict

from configs import r1


def get_config(variant: str = "uniform") -> ConfigDict:
    return r1.experiment(variant, r1.BRPO, "1p5b", budgets=tuple(range(2000, 16_001, 2000)))
