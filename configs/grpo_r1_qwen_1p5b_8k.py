"""GRPO (Dr.GRPO's form) and its ablations on R1-Distill-Qwen-1.5B at 8k tokens, as in arXiv 2505.13438.

    python -m tto_jax.train --config=configs/grpo_r1_qwen_1p5b_8k.py:grpo --workdir=runs/grpo \\
      --config.init=models/DeepSeek-R1-Distill-Qwen-1.5B --config.data.train=sets/deepscaler \\
      --config.data.eval="('sets/amc22','sets/aime24','sets/math500','sets/minerva','sets/olympiad')"

Variants, as (answers a fork, answers trained, budgets, prior, baseline):
  grpo      1, the last, 8k, base, group (default)
  linear    1, the last, 2k to 8k, linear, group: GRPO+linear
  decouple  4, all, 2k to 8k, base, group: GRPO+decouple
  vr        1, the last, 2k to 8k, base, BRPO's: GRPO+vr
  length    grpo, and a right answer is worth 1 - 0.2 |z| / 8000 after a trace of |z| tokens
GRPO+vr+decouple is `base` of brpo_r1_qwen_1p5b_8k.py. The length penalty relative to the group (Arora and Zanette) is
not in the library.

Data: the 40,315 problems of DeepScaleR (agentica-org/DeepScaleR-Preview-Dataset, one JSON list) and five evaluation
sets; configs/r1.py says how those are prepared, and how checkpoints are evaluated.

    python -m tto_jax.prepare_data --files=deepscaler.json --out=sets/deepscaler

A rollout holds 121.3 GB of KV cache (linear, vr: 127.3; decouple: 149.9) and an update 28.4 GB of parameters, moments
and gradients (float32): this takes several accelerators. Not run at scale: the numbers are the paper's, to be
reproduced.

Fits, as compiled ahead of time (README): v5e:8x8 with the default mesh (all devices on fsdp).

| final / anytime accuracy, % | average of AMC22, AIME24, MATH500, Minerva, OlympiadBench |
|---|---|
| R1-Distill-Qwen-1.5B | 45.6 / 39.8 |
| grpo | 50.7 / 43.0 |

After 600 of the 629 steps (one epoch); final: at 8,000 tokens, anytime: the mean of 32 budgets from 250 to 8,000.
"""

from ml_collections import ConfigDict

from configs import r1


def get_config(variant: str = "grpo") -> ConfigDict:
    return r1.experiment(variant, r1.GRPO, "1p5b", budgets=(2000, 4000, 6000, 8000))
