"""Static options of a rollout, and what follows from them: blocks, segments, length buckets, slots."""

import dataclasses

from tto_jax.core.sampling import SampleConfig

BLOCK = 32  # tokens between two flushes of the short cache into the long one, at most
BUCKETS, LEAST_BUCKET = 4, 64  # length buckets of the cache at most; tokens of one at least


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Static options of a rollout; token ids come from the tokenizer."""

    group_size: int  # G
    trace_pad: int  # C, the largest budget in tokens
    answers: int  # A
    answer_cap: int  # sampled tokens an answer
    think_end: int
    eos: int  # -1 where the vocabulary has none
    elicit_ended: tuple[int, ...]  # inserted after a trace that ended with think_end
    elicit_cut: tuple[int, ...]  # inserted after a cut
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    segment: int = 256  # tokens a jitted segment: how soon the host can stop
    slots: int = 0  # traces that are decoded at a time; 0: all of them
    answer_slots: int = 0  # traces whose answers are decoded together; 0: a quarter of the slots

    def __post_init__(self):
        for name in ("group_size", "trace_pad", "answers", "answer_cap", "segment"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name}={getattr(self, name)}: it must be a positive integer")
        for name in ("slots", "answer_slots"):
            if getattr(self, name) < 0:
                raise ValueError(f"rollout.{name}={getattr(self, name)}: it must be 0 or a positive integer")
        if self.answer_slots > self.slots:
            raise ValueError(
                f"rollout.answer_slots={self.answer_slots} exceeds rollout.slots={self.slots}: choose 0 (a quarter of "
                "the slots; without slots all traces at once) or at most the slots"
            )

    @property
    def forced_pad(self) -> int:
        """Longest elicitation, in tokens."""
        return max(len(self.elicit_ended), len(self.elicit_cut))

    @property
    def refed(self) -> int:
        """1 where an answer may follow the trunk directly: the token before the fork is then fed once more, as the
        hidden state that predicts the answer is not kept. Else 0: an inserted token predicts it.
        """
        return int(not (self.elicit_ended and self.elicit_cut))

    @property
    def block(self) -> int:
        """T, tokens a block: a segment is a whole number of blocks, of as many tokens as the option allows."""
        segment = min(self.segment, self.trace_pad)
        return segment // -(-segment // BLOCK)

    @property
    def blocks(self) -> int:
        """Blocks of the longest trace."""
        return -(-self.trace_pad // self.block)

    @property
    def segment_blocks(self) -> int:
        """Blocks a segment."""
        return min(self.segment, self.trace_pad) // self.block

    @property
    def buckets(self) -> tuple[int, ...]:
        """Blocks of the cache that a program attends to: each bucket is a program of its own."""
        number = max(min(BUCKETS, self.trace_pad // LEAST_BUCKET), 1)
        return tuple(sorted({-(-self.blocks * (i + 1) // number) for i in range(number)}))

    def bucket(self, blocks: int) -> int:
        """The least bucket that holds so many blocks."""
        return next(size for size in self.buckets if size >= blocks)

    @property
    def answer_block(self) -> int:
        """Tokens between two flushes of the answers' short cache."""
        return min(BLOCK, max(self.answer_cap - 1, 1))

    @property
    def answer_capacity(self) -> int:
        """Tokens of an answer's caches: the long one holds all whole blocks but the last, the short one a block."""
        return -(-max(self.answer_cap - 1, 1) // self.answer_block) * self.answer_block

    @property
    def lanes(self) -> int:
        """Slots whose answers are decoded together, of all parts."""
        return self.answer_slots or max(self.slots // 4, 1)

    def check(self, problems: int, shards: int) -> int:
        """Slots of each of the parts that rows are split into; 0: all rows at once.

        Raises:
          ValueError: slots that cannot be split over the parts, or of which there are more than traces.
        """
        rows = problems * self.group_size
        if not self.slots or self.slots == rows:
            return 0
        if self.slots > rows or self.slots % shards or self.answer_slots % shards or problems % shards:
            raise ValueError(
                f"rollout.slots={self.slots}, answer_slots={self.answer_slots}: {problems} problems of "
                f"{self.group_size} traces are split into {shards} parts, each with slots of its own, so both must be "
                f"multiples of {shards}, and the slots at most {rows}; 0 decodes all traces at once"
            )
        return self.slots // shards

    def kv_tokens(self, problems: int, prompt_pad: int, columns: int) -> int:
        """Tokens whose keys and values a rollout holds at most: of prompts, traces, inserted tokens and answers."""
        trace = self.blocks * self.block
        answers = columns * (self.refed + self.forced_pad + self.answers * self.answer_capacity)
        prompts = problems * prompt_pad
        rows = problems * self.group_size
        if not 0 < self.slots < rows:
            return prompts + rows * (trace + answers)
        return prompts + self.slots * (prompt_pad + trace) + self.lanes * (prompt_pad + trace + answers)
