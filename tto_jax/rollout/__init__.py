"""The rollout engine: thinking traces, then answers forced at forks of the cached traces.

Everything jitted is pure in (params, prompts, key). Shapes are static; the host loop runs segments and stops early.
Random keys are folded from (step, problem id, trace[, column, answer], position): the tokens that come out do not
depend on the batch's layout (up to floating-point ties).
"""

from tto_jax.rollout.answering import cut, sample_answers
from tto_jax.rollout.config import RolloutConfig
from tto_jax.rollout.cuts import Cuts
from tto_jax.rollout.engine import compile_all, compile_traces, sample
from tto_jax.rollout.stats import RolloutStats
from tto_jax.rollout.thinking import Trunk, sample_traces, start, think, weights

__all__ = [
    "Cuts",
    "RolloutConfig",
    "RolloutStats",
    "Trunk",
    "compile_all",
    "compile_traces",
    "cut",
    "sample",
    "sample_answers",
    "sample_traces",
    "start",
    "think",
    "weights",
]
