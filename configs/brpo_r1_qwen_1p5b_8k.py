"""AnytimeReasoner (BRPO) on R1-Distill-Qwen-1.5B at 2k, 4k, 6k, 8k tokens: the main result of arXiv 2505.13438.

    python -m tto_jax.train --config=configs/brpo_r1_qwen_1p5b_8k.py:uniform --workdir=runs/ar_uniform \\
      --config.init=models/DeepSeek-R1-Distill-Qwen-1.5B --config.data.train=sets/deepscaler \\
      --config.data.eval="('sets/amc22','sets/aime24','sets/math500','sets/minerva','sets/olympiad')"

Variants: uniform (default), linear, base: the prior over the budgets. `base` is also the ablation GRPO+vr+decouple.

Data: the 40,315 problems of DeepScaleR (agentica-org/DeepScaleR-Preview-Dataset, one JSON list) and five evaluation
sets; configs/r1.py says how those are prepared, and how checkpoints are evaluated.

    python -m tto_jax.prepare_data --files=deepscaler.json --out=sets/deepscaler

A rollout holds 149.9 GB of KV cache and an update 28.4 GB of parameters, moments and gradients (float32):
this takes several accelerators. Not run at scale: the numbers are the paper's, to be reproduced.

Fits, as compiled ahead of time (README): v5e:8x8, v6e:4x4 and v5p:4x4x4 with the default mesh (all devices on fsdp).

| final / anytime accuracy, % | average of AMC22, AIME24, MATH500, Minerva, OlympiadBench |
|---|---|
| R1-Distill-Qwen-1.5B | 45.6 / 39.8 |
| GRPO (grpo_r1_qwen_1p5b_8k.py) | 50.7 / 43.0 |
| base | 52.7 / 44.9 |
| linear | 52.6 / 45.6 |
| uniform | 52.5 / 46.0 |

After 600 of the 629 steps (one epoch); final: at 8,000 tokens, anytime: the mean of 32 budgets from 250 to 8,000.
"""

from ml_collections import ConfigDict

from configs import r1


def get_config(variant: str = "uniform") -> ConfigDict:
    return r1.experiment(variant, r1.BRPO, "1p5b", budgets=(2000, 4000, 6000, 8000))
