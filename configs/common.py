"""What the experiments share. Every default stands here or in the experiment's file, once."""

from ml_collections import ConfigDict, config_dict

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
    "regression": ("brpo", "uniform", "brpo", True, 4, 0.0),
    "mrt_online": ("mrt", "base", "grpo", True, 4, 0.0),
    "progress_gae_0": ("progress_gae", "uniform", "brpo", True, 4, 0.0),
    "progress_gae_half": ("progress_gae", "uniform", "brpo", True, 4, 0.0),
    "progress_gae_1": ("progress_gae", "uniform", "brpo", True, 4, 0.0),
    "potential": ("progress_gae", "uniform", "brpo", True, 4, 0.0),
    # With one answer a fork half of the samples from a prefix end there at once, and half think on.
    "mrt_termination": ("mrt_termination", "base", "grpo", False, 1, 0.0),
    "mrt_joint": ("mrt_joint", "base", "grpo", False, 1, 0.0),
    "mrt_explicit": ("mrt_explicit", "base", "grpo", True, 4, 0.0),
}
# What an algorithm sets beside its line above.
_START = {"rollout.start": True}
_PREFIX = {"prefix.every": 20, **_START}
SETS = {
    "regression": {"credit.estimator.leave_one_out": True, "credit.baseline_fit": 0.9},
    "mrt_online": {"episodes.rule": "delimiters", "episodes.most": 6},
    "progress_gae_0": {"credit.estimator.gamma": 0.0, **_START},
    "progress_gae_half": {"credit.estimator.gamma": 0.5, **_START},
    "progress_gae_1": _START,
    "potential": {"credit.estimator.progress_weights": "ones", **_START},
    "mrt_termination": _PREFIX,
    "mrt_joint": _PREFIX,
    "mrt_explicit": {"episodes.rule": "delimiters", "episodes.most": 2, **_PREFIX},  # the first new one, and the rest
}
# Ablations of the paper that only the experiments with pretrained models have.
ABLATIONS = {
    "grpo_linear": ("group", "linear", "grpo", True, 1, 0.0),
    "grpo_vr": ("brpo", "base", "grpo", True, 1, 0.0),
}
EXTENSION_WORDS = ("\nWait", "\nBut wait", "\nAlternatively", "\nBut hold on")  # of arXiv 2503.07572
MODIFIERS = ("fast", "two_digits")


def base(variant: str, budgets: tuple[int, ...]) -> ConfigDict:
    """An embedded experiment without task, sizes of the run and evaluation budgets."""
    words = variant.split(",")
    named = [word for word in words if word not in MODIFIERS]
    if len(named) > 1 or any(word not in ALGORITHMS for word in named):
        raise ValueError(
            f"variant {variant!r}: choose one of {tuple(ALGORITHMS)}, then any of {MODIFIERS}, with commas"
        )
    config = algorithm(variant, named[0] if named else "brpo", budgets)
    config.data = ConfigDict({"problems": 16_384})  # of the training split; an epoch
    config.model = ConfigDict(
        {
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
        }
    )
    config.warm_start = ConfigDict(
        {
            "seed": 0,
            "steps": 1,
            "batch_size": 32,
            "micro_tokens": 768,
            "cache": "",  # a folder shared by runs; empty: beside the workdir
            "optimizer": optimizer(learning_rate=3e-3, schedule="cosine", warmup_steps=50, b2=0.98),
        }
    )
    config.rollout.problems = 32
    config.learner.micro_tokens = 1536  # at a time in the backward; on a CPU what they need fits in its cache
    config.learner.optimizer = ConfigDict(optimizer(learning_rate=1e-3, warmup_steps=5, b2=0.95))
    config.evaluation.update({"every": 20, "problems": 256, "final_problems": 1024, "answers": 8})
    config.checkpoint.every = 20
    return config


def pretrained(variant: str, name: str, budgets: tuple[int, ...]) -> ConfigDict:
    """An experiment on math problems that starts from a pretrained model."""
    config = algorithm(variant, name, budgets)
    config.mesh = (1, -1, 1)
    config.init = ""  # the model to start from: a Hugging Face directory or a converted checkpoint
    config.model = ConfigDict({"dtype": "bfloat16", "remat": "full"})
    for size in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size"):
        config.model[size] = config_dict.placeholder(int)  # as in `init`; where given, `init` must agree
    config.model.max_position = config_dict.placeholder(int)
    config.model.update({"rope_theta": config_dict.placeholder(float), "norm_eps": config_dict.placeholder(float)})
    for option in ("attention_bias", "qk_norm", "tie_embeddings"):
        config.model[option] = config_dict.placeholder(bool)
    config.data = ConfigDict({"train": "", "eval": ()})  # sets made by `python -m tto_jax.prepare_data`
    config.task = ConfigDict(
        {
            "name": "math",
            "max_prompt_tokens": 1024,  # problems with longer prompts are left out
            "max_answer_tokens": 118,  # sampled after the insertion, as in the released code
            "elicit_tokens": 8,  # of the longest insertion; used only while there is no tokenizer to ask
            "verifier": {"workers": 0, "cpu_seconds": 2.0, "wall_seconds": 20.0, "memory_mb": 1024},  # 0: one a core
        }
    )
    config.task.prompting = prompting("anytime")
    config.learner.buckets = 3  # where lengths are spread evenly, half of one length is padding, a quarter of three
    config.learner.micro_tokens = 49_152
    config.evaluation.update({"final_problems": 1_000_000, "temperature": 0.6, "every": 100, "traces": 4})
    config.checkpoint.every = 50
    return config


def prompting(style: str) -> ConfigDict:
    """A style, `anytime` or `mrt`; a string that is None is the style's own."""
    config = ConfigDict({"style": style})
    for text in ("instruction", "system", "think_start", "think_end", "elicit_ended", "elicit_cut", "paragraph"):
        config[text] = config_dict.placeholder(str)
    return config


def algorithm(variant: str, name: str, budgets: tuple[int, ...]) -> ConfigDict:
    """What every experiment has, and the credit of algorithm `name` of ALGORITHMS or ABLATIONS."""
    estimator, prior, answers, all_budgets, number, penalty = (ALGORITHMS | ABLATIONS)[name]
    config = ConfigDict(
        {
            "variant": variant,
            "seed": 0,
            "steps": 1,
            "mesh": (1, 1, 1),  # devices along data, fsdp, tensor; -1: the rest of them
            "budgets": {
                "tokens": budgets if all_budgets else budgets[-1:],
                "spacing": "given",  # or uniform, exponential: `count` budgets up to the last of `tokens`
                "count": 0,  # of budgets that are spaced
                "ratio": 2.0,  # of each budget to the one before, where spacing is exponential
                "prior": prior,
                "sampled": False,  # all but the last one are drawn anew at every step, below it
            },
            "episodes": {  # where traces are cut instead of at all budgets but the last
                "rule": "budgets",  # or delimiters, paragraphs, blocks
                "most": 0,  # episodes of a trace; what follows is part of the last one; 0: as many as the rule makes
                "block": 1024,  # tokens of a block
                "markers": (),  # a paragraph that starts with one opens an episode; empty: MRT's
                "separator": "\n\n",  # of paragraphs
                "gap": 2,  # paragraphs after a cut in which no other is made
                "max_cuts": 49,  # at markers
                "group": 5,  # consecutive episodes that are made one
            },
            "prefix": {  # episodes of a trace of an earlier policy that follow a prompt; they are not trained
                "every": 0,  # steps after which that policy is the present one again; 0: no prefixes
                "tokens": 1024,  # of the longest prefix
                "rule": "delimiters",  # of the section `episodes`, or budgets: where that trace is cut
            },
            "rollout": {
                "problems": 64,
                "group_size": 8,
                "answers": number,
                "resample": 0,  # most rollouts beside the first, to replace problems whose scores are all alike
                "start": False,  # answers are forced before any thinking, too
                "temperature": 1.0,
                "segment": 256,
                "slots": 0,  # traces decoded at a time; 0: all of them
                "answer_slots": 0,  # of them, whose answers are decoded together; 0: a quarter
            },
            "credit": {
                "estimator": {
                    "kind": estimator,
                    "decay": 0.5,
                    "alpha": 1.0,
                    "gamma": 1.0,
                    "progress_weights": "tail",  # in progress_gae: the prior's tail, or ones
                    "leave_one_out": False,
                    "std": False,
                },
                "fork_values": "scores",  # they pay thinking; or reference: the reference answer's probability
                "baseline_fit": 0.0,  # decay a step of what fits the regression baseline, such as 0.9; 0: BRPO's own
                "baseline_ridge": 1.0,  # how much the fit is drawn to BRPO's coefficients, in traces
                "answers": answers,
                "answer_weight": "code",
                "length_penalty": penalty,
                "relative_length_penalty": 0.0,  # by the group's right traces, such as 0.2
                "overlong_margin": 0,  # scores fall by up to 1 in so many tokens before the last budget; 0: off
                "mask_overlong": False,  # thinking that the last budget has cut short is not trained
                "serial_decay": False,  # the n-th right answer along a trace earns 2^(1-n)
            },
            "learner": {
                "minibatches": 2,
                "buckets": 1,  # row lengths that are computed: even shares of the longest; each compiles a program
                "micro_tokens": 0,  # tokens of each part of the mesh whose gradient is computed at a time; 0: all
                "attention": "",  # kernels.tree_attention's implementation; empty: the platform's own
                "objective": "ppo",  # or gspo, cispo
                "clip_low": 0.2,
                "clip_high": 0.2,
                "dual_clip": 0.0,  # a negative advantage counts so many times at most, such as 3.0; 0: off
                "aggregate": "constant",  # or token_mean, sequence_mean
                "importance": "none",  # or token, sequence: truncated ratios of trainer to sampler
                "importance_cap": 2.0,
                "kl": 0.0,
                "kl_estimator": "k3",
                "normalizer": "constant",  # loss / (rows * tokens_per_row); "released": rows * padded response length
                "tokens_per_row": 1,
                "optimizer": optimizer(learning_rate=1e-6, weight_decay=0.01),
            },
            "evaluation": {
                "every": 20,
                "problems": 32,  # of each set, while training; 0: none
                "final_problems": 1024,  # by `python -m tto_jax.evaluate`
                "budgets": budgets,
                "traces": 1,
                "answers": 1,
                "temperature": 1.0,
                "seed": 0,
                "forks": "budgets",  # or a rule of the section `episodes`, by `evaluate --forks`
                "start": False,  # answers before any thinking, too: budget 0, by `evaluate --start`
                "extensions": 0,  # how often thinking goes on after its end, by `evaluate --extend`
                "extension_tokens": 2048,  # of thinking in each, or in a round, at most
                "extension_words": EXTENSION_WORDS,  # one of which replaces `</think>`
                "linearise": 0,  # tokens of linearised thinking from which it goes on, by `evaluate --linearise`
                "rounds": 4,  # of it; see `tto_jax.linearised`
            },
            "checkpoint": {"every": 20, "keep": 2, "keep_every": 0},
            "log": {"samples_every": 20, "samples": 4},
        }
    )
    config.update_from_flattened_dict(SETS.get(name, {}))
    return config


def star(criterion: str, learning_rate: float) -> ConfigDict:
    """What `python -m tto_jax.star` has beside sampling; `criterion`: see `core.selection.Rule`."""
    adamw = optimizer(learning_rate=learning_rate, weight_decay=0.01)
    del adamw["warmup_steps"]  # follow from `warmup`
    return ConfigDict(
        {
            "problems": 0,  # sampled in an iteration, drawn anew for each; 0: all
            "begin": "initial",  # fine-tuning begins with the initial model, as STaR's; or with the `current` one
            "select": {"criterion": criterion, "cut": criterion != "final", "ties": "all", "unfinished": False},
            "train_inserted": True,  # learned is what was inserted into kept responses, too: to stop by oneself
            "epochs": 3,  # of the kept responses, in an iteration
            "rows": 256,  # of a step
            "micro_tokens": 0,  # tokens of each part of the mesh whose gradient is computed at a time; 0: all
            "row_length": 0,  # tokens; longer responses are left out; 0: as long as any response can be
            "warmup": 0.1,  # share of the steps
            "optimizer": adamw,
        }
    )


def optimizer(**given) -> dict:
    """AdamW after a clip of the global norm; see `learner.OptimizerConfig`."""
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
