"""MRT in its online form on R1-Distill-Qwen-1.5B: outcome and progress of on-policy traces, cut into six episodes.

    python -m tto_jax.train --config=configs/mrt_r1_qwen_1p5b.py:online --workdir=runs/mrt_online \\
      --config.init=models/DeepSeek-R1-Distill-Qwen-1.5B --config.data.train=sets/deepscaler \\
      --config.data.eval="('sets/aime24','sets/amc22','sets/math500','sets/minerva')"

Variants:
  online  episodes begin at `Wait`, `Alternatively` and the like, five are merged into one, what follows the sixth is
          part of it; four answers are forced at each end, a block earns outcome + alpha progress, alpha 1 (default)
  grpo    the outcome alone, from one answer at the end
  termination, joint, explicit
          the three forms of RL from prefixes: the first episodes, any number of them within 8,192 tokens, of a trace of
          the policy of up to 20 steps ago; four traces think on, and as many answers (explicit: 16) end at once

Setup of arXiv 2503.07572 (and of its authors' run of 2026 for `online`): 256 traces a step, 4 of each problem, at
temperature 0.9, prompts of at most 4,096 tokens and traces of 24,576; AdamW at 1e-6 with warm-up over a tenth of the
steps, then a cosine. Our choices: one update a step; answers of at most 1,024 tokens; one epoch of DeepScaleR's 40,315
problems (configs/r1.py says how the sets are prepared).

A rollout holds 370.4 GB of KV cache (grpo: 195.8; termination, joint: 218.7; explicit: 294.2) and an update 28.4 GB of
parameters, moments and gradients (float32; with prefixes 7.1 more): this takes several accelerators. Not run at scale,
and not compiled for a pod. The mean of AIME24/25, AMC23, Minerva and MATH500 (n=64) in the authors' run of 2026: base
44.95, GRPO 45.43, online 45.57; their difference is noise.
"""

from ml_collections import ConfigDict

from configs import common, r1

FORMS = ("termination", "joint", "explicit")
VARIANTS = {"online": "mrt_online", "grpo": "grpo"} | {form: f"mrt_{form}" for form in FORMS}
GROUP, ROWS, LONGEST = 4, 256, 24_576


def get_config(variant: str = "online") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose one of {tuple(VARIANTS)}")
    config = common.pretrained(variant, VARIANTS[variant], budgets=(LONGEST,))
    config.model.update(r1.MODELS["1p5b"])
    config.task.update({"max_prompt_tokens": 4096, "max_answer_tokens": 1024, "elicit_tokens": 48})
    config.task.prompting = common.prompting("mrt")
    config.prefix.tokens = 8192
    config.rollout.update({"problems": ROWS // GROUP, "group_size": GROUP, "temperature": 0.9})
    config.steps = r1.PROBLEMS // config.rollout.problems
    config.learner.update({"minibatches": 1, "micro_tokens": LONGEST, "tokens_per_row": LONGEST})
    config.learner.optimizer.update({"schedule": "cosine", "warmup_steps": config.steps // 10})
    config.evaluation.budgets = tuple(range(1024, LONGEST + 1, 1024))
    config.evaluation.update({"traces": 16, "problems": 15, "every": 100})
    return config.lock()
