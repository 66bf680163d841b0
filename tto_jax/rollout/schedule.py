"""Which trace goes to which slot, and when answers are decoded: host arithmetic, the same on every process."""

import numpy as np

from tto_jax.rollout.config import RolloutConfig


class Scheduler:
    """Of each part of the mesh: traces in order, slots, and what is in them. Rows are counted within their part."""

    def __init__(self, config: RolloutConfig, problems: int, parts: int):
        self._config, self.parts = config, parts
        per_part = config.check(problems, parts)
        self._rows = problems * config.group_size // parts
        self.lanes = config.lanes // parts or 1  # of a part
        self._next = np.zeros(parts, np.int64)
        self._answered = np.zeros(parts, np.int64)
        self.slots = np.full((parts, per_part), -1)  # the row in each; -1: none
        self._done = np.ones((parts, per_part), bool)
        self._length = np.zeros((parts, per_part), np.int64)

    @property
    def finished(self) -> bool:
        """All answers are there."""
        return bool((self._answered == self._rows).all())

    def admit(self) -> np.ndarray | None:
        """The next traces for the free slots: rows [parts, slots], -1 where a slot stays as it is; None: no trace."""
        taken = np.full_like(self.slots, -1)
        for part in range(self.parts):
            free = np.flatnonzero(self.slots[part] < 0)[: self._rows - self._next[part]]
            taken[part, free] = self._next[part] + np.arange(len(free))
            self._next[part] += len(free)
        if (taken < 0).all():
            return None
        new = taken >= 0
        self.slots, self._done = np.where(new, taken, self.slots), self._done & ~new
        self._length = np.where(new, 0, self._length)
        return taken

    def thinking(self) -> bool:
        """Some trace goes on."""
        return bool((~self._done).any())

    def segment(self) -> tuple[int, int]:
        """Blocks of the next segment, and the least bucket that holds what any trace that goes on may then have."""
        config = self._config
        held = int(self._length[~self._done].max()) // config.block
        bucket = config.bucket(min(held + 1, config.blocks))
        return min(config.segment_blocks, bucket - held), bucket

    def see(self, done: np.ndarray, length: np.ndarray) -> None:
        """Flags of all slots after a segment: done bool[W], length i32[W]."""
        self._done, self._length = done.reshape(self.slots.shape).copy(), length.reshape(self.slots.shape).copy()

    def _waiting(self):
        return self._done & (self.slots >= 0)

    def answers_due(self) -> bool:
        """A part has as many traces that wait for their answers as are decoded together, or nothing else is left."""
        waiting = self._waiting()
        return bool((waiting.sum(axis=1) >= self.lanes).any() or (waiting.any() and not self.thinking()))

    def answer(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Slots whose answers are decoded now and the rows in them, [parts, lanes]; -1: none; and the cache's bucket.

        The slots are free then.
        """
        waiting = self._waiting()
        lanes, rows = np.zeros((self.parts, self.lanes), np.int64), np.full((self.parts, self.lanes), -1)
        longest = 1
        for part in range(self.parts):
            chosen = np.flatnonzero(waiting[part])
            chosen = chosen[np.argsort(self.slots[part, chosen])][: self.lanes]  # the oldest first
            lanes[part, : len(chosen)], rows[part, : len(chosen)] = chosen, self.slots[part, chosen]
            longest = max(longest, *self._length[part, chosen].tolist(), 1)
            self.slots[part, chosen] = -1
            self._answered[part] += len(chosen)
        return lanes, rows, self._config.bucket(-(-longest // self._config.block))
