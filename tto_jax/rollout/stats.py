"""What a rollout did with its time."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RolloutStats:
    """Counters of one rollout on the host, of all processes together.

    A slot-step is one step of the token loop for one row. Rows that have ended, or that no trace is in, pass through
    the loop while others go on: their slot-steps are lost to stragglers.
    """

    slots: int  # traces that were decoded at a time
    programs: int  # jitted calls
    prefill_seconds: float
    think_seconds: float
    answer_seconds: float
    seconds: float  # of all, with what the host did
    think_tokens: int
    answer_tokens: int
    think_slot_steps: int
    answer_slot_steps: int

    @property
    def tokens(self) -> int:
        """Sampled tokens of traces and answers."""
        return self.think_tokens + self.answer_tokens

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens over all the time."""
        return self.tokens / self.seconds

    @property
    def occupancy(self) -> float:
        """Share of the slot-steps that sampled a token, of thinking and answering."""
        return self.tokens / max(self.think_slot_steps + self.answer_slot_steps, 1)

    @property
    def straggler_share(self) -> float:
        """Share of the time that rows without anything to sample have cost: of each phase its lost slot-steps."""
        lost = self.think_seconds * (1 - self.think_tokens / max(self.think_slot_steps, 1))
        lost += self.answer_seconds * (1 - self.answer_tokens / max(self.answer_slot_steps, 1))
        return lost / self.seconds

    @property
    def prefill_share(self) -> float:
        """Share of the time that the prompts took."""
        return self.prefill_seconds / self.seconds

    def metrics(self) -> dict[str, float]:
        """`rollout/NAME` of what the tokens decide, `speed/rollout/NAME` of what the machine decides."""
        counted, timed = ("occupancy", "tokens", "programs"), ("tokens_per_second", "straggler_share", "prefill_share")
        found = {f"rollout/{name}": getattr(self, name) for name in counted}
        return found | {f"speed/rollout/{name}": getattr(self, name) for name in timed}

    def phase_seconds(self) -> dict[str, float]:
        """`seconds/think`, prefill included, and `seconds/answer`."""
        return {"seconds/think": self.prefill_seconds + self.think_seconds, "seconds/answer": self.answer_seconds}


class Watch:
    """Adds up the seconds of phases; `seconds[NAME]` of each."""

    def __init__(self, clock):
        self._clock, self._last = clock, clock()
        self._begin, self.seconds = self._last, {"prefill": 0.0, "think": 0.0, "answer": 0.0}

    def mark(self, phase: str) -> None:
        """The time since the last mark belongs to `phase`."""
        now = self._clock()
        self.seconds[phase] += now - self._last
        self._last = now

    def total(self) -> float:
        """Since it began."""
        return self._clock() - self._begin
