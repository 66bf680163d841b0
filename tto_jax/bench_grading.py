"""The workload of `python -m tto_jax.bench grading` under its earlier name."""

from tto_jax.bench.grading import judge_alone, made_references, mistake, spellings, workload

__all__ = ["judge_alone", "made_references", "mistake", "spellings", "workload"]
