"""star: sample, keep the traces whose progress is maximal and whose forced answer is right, fine-tune, again.

    python -m tto_jax.star --config=configs/star.py:peak --workdir=runs/star_peak
    python -m tto_jax.evaluate --workdir=runs/star_peak

    python -m tto_jax.star --config=configs/star.py:math --workdir=runs/star_math --config.init=models/my_model \\
      --config.data.train=sets/math_train --config.data.eval="('sets/aime24',)"

Variants: a task (peak, chain, math), then perhaps `mrt` (default: MRT-STaR, traces cut at their best prefixes) or
`plain` (STaR: whole traces with right answers), and for peak and chain `fast`, the small size: `peak,plain,fast`.

Sampling is that of the sections `rollout`, `budgets` and `episodes`: group_size traces of a problem, answers before any
thinking and at each cut: the budgets, or with `math` and `mrt` the ends of up to 10 episodes (49 cuts, five episodes
made one). The numbers of `math` are those of MRT (arXiv 2503.07572): AdamW with 1e-6, weight decay 0.01, warm-up 0.1,
3 epochs, batch 256, G=4, temperature 0.9, prompts up to 4,096 tokens; how many iterations is our choice. Not run at
scale. One device is enough for peak and chain; what `math` fits on depends on the model.
"""

from ml_collections import ConfigDict

from configs import chain, common, math, peak

TASKS = {"peak": peak, "chain": chain, "math": math}
CRITERIA = {"mrt": "best", "plain": "final"}


def get_config(variant: str = "peak") -> ConfigDict:
    task, *more = variant.split(",")
    methods = [word for word in more if word != "fast"] or ["mrt"]
    if task not in TASKS or len(methods) > 1 or methods[0] not in CRITERIA or ("fast" in more and task == "math"):
        raise ValueError(
            f"variant {variant!r}: choose one of {tuple(TASKS)}, then perhaps one of {tuple(CRITERIA)}, and for peak "
            "and chain perhaps `fast`, with commas"
        )
    config = TASKS[task].get_config("mrt,fast" if "fast" in more else "mrt")
    config.unlock()
    config.variant = {"mrt": "mrt_star", "plain": "star"}[methods[0]]
    config.steps = 3  # iterations
    config.rollout.start = True  # progress begins with the score before any thinking
    config.star = common.star(CRITERIA[methods[0]], learning_rate=1e-6 if task == "math" else 1e-3)
    if task == "math":
        config.star.micro_tokens = 1  # a row
        config.episodes.rule = "delimiters" if methods[0] == "mrt" else "budgets"
        config.rollout.update({"group_size": 4, "temperature": 0.9})
        config.task.max_prompt_tokens = 4096
        config.task.prompting.style = "mrt"
        config.task.max_answer_tokens = 512  # the meta-prover explains before it boxes
        config.budgets.tokens = tuple(3000 * i for i in range(1, 9))  # with the answer the paper's 24,576
        config.evaluation.budgets = tuple(750 * i for i in range(1, 33))
        config.checkpoint.every = 50
    else:
        config.star.update({"problems": 1024, "rows": 32, "micro_tokens": 1024})
        # A whole trace of peak fills the last budget: those that end by themselves are few, and short.
        config.star.select.unfinished = methods[0] == "plain"
        config.checkpoint.update({"every": 100, "keep": 3})
    return config.lock()
