"""How fast a step was: sampled tokens a second, the model's FLOPs and their share of the peak (MFU), memory, goodput.

**What is counted as FLOPs.** Matrix products only, 2 a multiplication and addition, from the sizes of the model and the
lengths of what was there: a token passes the layers (q, k, v, out, gate, up, down), attends to what it may see (two
products a pair of tokens, head and layer), and is projected on the vocabulary if it predicts a token that was sampled
or is trained. Not counted: padding, what is computed again (by `remat`, or by the implementation), embeddings, norms,
softmax, rotations, the optimizer, credit, communication. By phase:

- think: prompts, each once; all tokens of the traces, which are also sampled; the same of an earlier policy's traces,
  where prefixes are taken from them.
- answer: the inserted tokens, once a fork; the sampled ones, of which the last one of an answer is not fed.
- score: the packed rows (prompt, trace, and every branch as it is packed); twice where there is a reference.
- update: 3 times the packed rows, 1 forward and 2 backward.

A phase's MFU is its FLOPs over its seconds and the peak of all chips of the mesh: that of bfloat16 products, whatever
the model's dtype. It is null where the peak is not known: on CPUs, on GPUs, on other TPUs than those of `tpu_chips`.
"""

import time

import jax
import numpy as np

from tto_jax import tpu_chips
from tto_jax.core.types import Answers, Traces
from tto_jax.models.config import ModelConfig
from tto_jax.settings import Settings

# What jax calls a chip -> its name in `tpu_chips.CHIPS`.
KINDS = {
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), "v5e"),
    **dict.fromkeys(("TPU v5", "TPU v5p"), "v5p"),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), "v6e"),
}


def per_token(model: ModelConfig) -> int:
    """FLOPs of one token's products with the weights of all layers."""
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim  # q and out, k and v
    return 2 * model.num_layers * model.hidden_size * (heads + 3 * model.mlp_size)


def per_pair(model: ModelConfig) -> int:
    """FLOPs of one token that attends to one: its score and its share of the output, in all heads and layers."""
    return 4 * model.num_layers * model.num_heads * model.head_dim


def per_logits(model: ModelConfig) -> int:
    """FLOPs of the projection of one token on the vocabulary."""
    return 2 * model.hidden_size * model.vocab_size


def _segments(model, before, new):
    """FLOPs of segments of `new` tokens, each of which sees `before` tokens, those of its segment up to it, and itself.

    Arrays of numbers of tokens; the sum over all segments.
    """
    before, new = np.asarray(before, np.float64), np.asarray(new, np.float64)
    return float((new * per_token(model) + (new * before + new * (new + 1) / 2) * per_pair(model)).sum())


def think_flops(model: ModelConfig, prompt_length: np.ndarray, trace_length: np.ndarray) -> float:
    """FLOPs of prompts i32[B], each once, and of the traces i32[N] sampled from them."""
    prompt = np.repeat(prompt_length, len(trace_length) // len(prompt_length))
    sampled = per_logits(model) * float(trace_length.sum())
    return _segments(model, 0, prompt_length) + _segments(model, prompt, trace_length) + sampled


def step_flops(
    settings: Settings, prompt_length: np.ndarray, traces: Traces, forks: np.ndarray, answers: Answers
) -> dict[str, float]:
    """`flops/PHASE` of a step's rows, on the host; what is counted stands at the top of this file.

    prompt_length i32[B]; forks i32[N,S], tokens of the trace before each cut; of traces and answers, of N = B*G rows,
    only the lengths are read. The settings say what the model is, how rows are packed, whether there is a reference.
    """
    model, rows = settings.model, forks.shape[0]
    prompt = np.repeat(prompt_length, rows // len(prompt_length))
    trace, inserted = traces.length, answers.forced  # [N], [N,S]
    before = prompt[:, None] + forks  # [N,S], tokens before the cut
    sampled = answers.length - inserted[..., None]  # [N,S,A]
    insertions = _segments(model, before, inserted)
    one_token = settings.credit.one_token_answers  # then the insertion stands once a column, and no answer is fed
    branches = insertions if one_token else _segments(model, before[..., None], answers.length)
    thought, answered = (per_logits(model) * float(x.sum()) for x in (trace, sampled))
    packed = _segments(model, 0, prompt + trace) + branches + thought + answered
    fed = _segments(model, (before + inserted)[..., None], np.maximum(sampled - 1, 0))
    return {
        "flops/think": think_flops(model, prompt_length, trace),
        "flops/answer": insertions + fed + answered,
        "flops/score": packed * (2 if settings.loss.kl else 1),
        "flops/update": 3 * packed,
    }


def peak(devices: int) -> float | None:
    """FLOPs a second of so many of this machine's chips, as their maker says; None if it is not known."""
    name = KINDS.get(jax.devices()[0].device_kind)
    return tpu_chips.CHIPS[name].flops * devices if name else None


def speed(row: dict, tokens: int, most: float | None) -> dict:
    """`speed/...` of a step: sampled tokens a second, model FLOPs utilisation of the step and of its phases.

    Args:
      row: has `flops/PHASE`, summed over all processes, with `seconds/PHASE` of each, and `seconds/step`.
      tokens: that were sampled, by all processes.
      most: FLOPs a second that the chips can do, of `peak`.
    """
    flops = {name.removeprefix("flops/"): n for name, n in row.items() if name.startswith("flops/")}
    flops |= {"step": sum(flops.values())}
    used = {phase: n / (row[f"seconds/{phase}"] * most) if most else None for phase, n in flops.items()}
    found = {"speed/tokens_per_second": tokens / row["seconds/step"], "speed/mfu": used.pop("step")}
    return found | {f"speed/mfu/{phase}": share for phase, share in used.items()}


def memory() -> dict:
    """`memory/...` of this process's first device, in bytes: in use, the most that was, the limit; None if unknown."""
    found = jax.local_devices()[0].memory_stats() or {}
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    return {f"memory/{name}": found.get(key) for name, key in names.items()}


def goodput(began: float, seconds: float) -> dict:
    """`speed/goodput`: the share of the time since `began` (Unix) that went into steps that count, `seconds` in all.

    Steps that were lost and done again count once. The rest is starts, restores, checkpoints, evaluations, the time in
    which the run was not running. Compilation inside of a step is part of its time.
    """
    return {"speed/goodput": seconds / max(time.time() - began, seconds, 1e-9)}
