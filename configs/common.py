"""What the embedded experiments share. Every default stands here or in the experiment's file, once."""

from ml_collections import ConfigDict

ALGORITHMS = {
    # name: (estimator, prior, answers credit, all budgets, answers a fork, length penalty)
    "brpo": ("brpo", "uniform", "brpo", True, 4, 0.0),
    "brpo_linear": ("brpo", "linear", "brpo", True, 4, 0.0),
    "brpo_base": ("brpo", "base", "brpo", True, 4, 0.0),
    "group": ("group", "uniform", "brpo", True, 4, 0.0),
    "mrt": ("mrt", "base", "grpo", True, 4, 0.0),
    "grpo": ("grpo", "base", "grpo", False, 1, 0.0),
    "grpo_length": ("grpo", "base", "grpo", False, 1, 0.5),
    "grpo_answers": ("grpo", "base", "brpo", True, 4, 0.0),
}
MODIFIERS = ("fast", "two_digits")


def base(variant: str, budgets: tuple[int, ...]) -> ConfigDict:
    """A configuration without task, sizes of the run and evaluation budgets."""
    words = variant.split(",")
    named = [word for word in words if word not in MODIFIERS]
    if len(named) > 1 or any(word not in ALGORITHMS for word in named):
        raise ValueError(
            f"variant {variant!r}: choose one of {tuple(ALGORITHMS)}, then any of {MODIFIERS}, with commas"
        )
    estimator, prior, answers, all_budgets, number, penalty = ALGORITHMS[named[0] if named else "brpo"]
    return ConfigDict(
        {
            "variant": variant,
            "seed": 0,
            "steps": 1,
            "data": {"problems": 16_384},  # of the training split; an epoch
            "model": {
                "hidden_size": 64,
                "num_layers": 2,
                "num_heads": 4,
                "num_kv_heads": 4,
                "head_dim": 16,
                "mlp_size": 192,
                "max_position": 128,
                "rope_theta": 100.0,
                "norm_eps": 1e-6,
                "attention_bias": True,
                "qk_norm": True,
                "tie_embeddings": False,
                "learned_positions": True,
                "dtype": "float32",
                "remat": "none",
            },
            "warm_start": {
                "seed": 0,
                "steps": 1,
                "batch_size": 32,
                "micro_rows": 8,
                "cache": "",  # a folder shared by runs; empty: beside the workdir
                "optimizer": _optimizer(learning_rate=3e-3, schedule="cosine", warmup_steps=50, b2=0.98),
            },
            "budgets": {"tokens": budgets if all_budgets else budgets[-1:], "prior": prior},
            "rollout": {"problems": 32, "group_size": 8, "answers": number, "temperature": 1.0, "segment": 256},
            "credit": {
                "estimator": {
                    "kind": estimator,
                    "decay": 0.5,
                    "alpha": 1.0,
                    "gamma": 1.0,
                    "leave_one_out": False,
                    "std": False,
                },
                "answers": answers,
                "answer_weight": "code",
                "length_penalty": penalty,
            },
            "learner": {
                "minibatches": 2,
                "micro_rows": 16,  # rows at a time in the backward; on a CPU they then fit in its cache
                "clip_low": 0.2,
                "clip_high": 0.2,
                "kl": 0.0,
                "kl_estimator": "k3",
                "normalizer": "constant",  # loss / (rows * tokens_per_row); "released": rows * padded response length
                "tokens_per_row": 1,
                "optimizer": _optimizer(learning_rate=1e-3, warmup_steps=5, b2=0.95),
            },
            "evaluation": {
                "every": 20,
                "problems": 256,
                "final_problems": 1024,
                "budgets": budgets,
                "answers": 8,
                "seed": 0,
            },
            "checkpoint": {"every": 20, "keep": 2},
            "log": {"samples_every": 20, "samples": 4},
        }
    )


def _optimizer(**given) -> dict:
    defaults = {
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_steps": 0,
        "b1": 0.9,
        "b2": 0.999,
        "weight_decay": 0.0,
        "grad_clip": 1.0,
    }
    return defaults | given
