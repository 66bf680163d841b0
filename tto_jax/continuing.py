"""Thinking that goes on: rollouts whose prompts hold what was thought before.

Everything before is prefilled again, once a trace: prompts of different traces have nothing in common that the rollout
could share.
"""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from tto_jax import data, sharding
from tto_jax.core.types import Prompts


@dataclasses.dataclass(frozen=True)
class Rows:
    """N traces of this process that go on."""

    prompt: list[list[int]]  # token ids, without padding
    problem: np.ndarray  # u32[N], ids
    number: np.ndarray  # i32[N], of the trace among those of its problem

    @classmethod
    def of(cls, prompts: Prompts, group_size: int, first_trace: int) -> "Rows":
        """Of B prompts on the host, with so many traces each."""
        each = [row[:n].tolist() for row, n in zip(prompts.tokens, prompts.length)]
        return cls(
            prompt=[ids for ids in each for _ in range(group_size)],
            problem=np.repeat(prompts.id, group_size),
            number=np.tile(first_trace + np.arange(group_size, dtype=np.int32), len(each)),
        )

    def then(self, thinking: Sequence[list[int]], pad: int, pad_id: int) -> Prompts:
        """Prompts followed by thinking, on the devices; their ids tell (problem, trace), as random keys must."""
        rows = [before + after for before, after in zip(self.prompt, thinking)]
        tokens, length = data.pad_right(rows, pad, pad_id, "prompt_pad", np.int32)
        pairs = np.stack([self.problem, self.number.astype(np.uint32)], axis=1)
        ids = np.array([zlib.crc32(pair.tobytes()) for pair in pairs], np.uint32)
        return sharding.put_rows(Prompts(tokens=tokens, length=length, id=ids))
