"""sft: supervised fine-tuning of any pretrained model on chats.

    python -m tto_jax.sft --config=configs/sft.py --workdir=runs/sft --config.init=models/my_model \\
      --config.data.train="('chats.jsonl',)" --config.data.eval="('held_out.jsonl',)"

A line of a file: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, learned
are the assistant's turns; or {"messages": [...], "prefix": "...", "suffix": "..."}, learned is the suffix.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,
            "steps": 100,
            "mesh": (1, -1, 1),
            "init": "",  # the model to start from: a Hugging Face directory, a converted checkpoint or a run
            "model": {"dtype": "bfloat16", "remat": "full"},
            "prompting": common.prompting("anytime"),  # of it, think_start alone is used: it follows the template
            "data": {"train": (), "eval": ()},  # JSON-lines files
            "row_length": 4096,  # tokens; longer examples are left out
            "learner": {
                "rows": 16,  # of a step
                "micro_tokens": 4096,  # of each part of the mesh, computed at a time: a row at least; 0: all
                "optimizer": common.optimizer(learning_rate=1e-5, schedule="cosine", warmup_steps=10),
            },
            "evaluation": {"every": 20},
            "checkpoint": {"every": 50, "keep": 2, "keep_every": 0},
        }
    ).lock()
