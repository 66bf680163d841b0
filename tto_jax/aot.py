"""The trainer's jitted functions, compiled for a mesh whose devices need not be there.

What is compiled is what a step of `train` calls, with the shapes and layouts it would have; nothing is computed. Of
log-probs and update, which have a program for each bucket of row lengths, it is the longest bucket's, counted as if all
rows were in it; sorting rows is left out.
"""

import dataclasses
import functools
import math
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tto_jax import buckets, hlo_cost, learner, rollout, sharding, tpu_chips
from tto_jax.core import token_tree
from tto_jax.core.types import Answers, Credit, Prompts, TokenTree, Traces
from tto_jax.models import decoding
from tto_jax.settings import Settings

PARTS = ("weights", "prefill", "think", "answers", "logprobs", "update", "apply")  # in the order of a step
FLATTENED = "flattened"  # the update again, without shared trunks: for comparison, compiled only where it is named
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Part:
    """One jitted function of a step, and what surrounds it."""

    name: str
    function: Callable  # jitted
    arguments: tuple  # static ones, and shapes with their layout
    calls: int = 1  # a step
    held: int = 0  # bytes a chip that are no arguments, but lie there meanwhile
    most_trips: int = 1  # of a loop whose end depends on data


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a chip."""

    arguments: int
    outputs: int  # those that do not lie in the place of a donated argument
    temporaries: int
    code: int
    held: int  # no part of the program: the training state while the rollout runs
    total: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known of a part without running it."""

    part: str
    calls: int  # a step
    compile_s: float
    hbm_bytes: Memory  # where the compiler refused, the total only
    hbm_limit: int
    fits: bool
    cost: hlo_cost.Cost
    bounds: dict[str, float]  # seconds of one call, by what limits it
    largest: tuple[hlo_cost.Buffer, ...]  # what takes the memory
    why: str  # where it does not fit

    @property
    def bound_by(self) -> str:
        """What limits its speed."""
        return max(self.bounds, key=self.bounds.get)

    @property
    def bound_s(self) -> float:
        """Seconds that one call takes at least."""
        return max(self.bounds.values())


def parts(plan: Settings, mesh: Mesh) -> dict[str, Part]:
    """The parts of a step, by name; `plan` as it is on the mesh (`Settings.on`)."""
    model, engine, loss = plan.model, plan.rollout, plan.loss
    state = _placed(mesh, learner.abstract_state(model, plan.optimizer, plan.prefix is not None), model.num_kv_heads)
    with jax.set_mesh(mesh):
        cast = jax.eval_shape(lambda params: rollout.weights(model, params), state.params)
        weights = _with(cast, decoding.shardings(mesh, model))
    prompts = split_rows(mesh, _prompts(plan, plan.problems))
    key = split_rows(mesh, jax.eval_shape(lambda: jax.random.key(0)))
    number = split_rows(mesh, _array(jnp.int32))
    started = jax.eval_shape(lambda *x: rollout.start(model, engine, *x), weights, prompts, key, number)
    thinking, cache, keys = split_rows(mesh, started)
    traces = split_rows(mesh, jax.eval_shape(lambda state: state.traces(engine), thinking))
    trunk = rollout.Trunk(prompts=prompts, prompt_cache=cache, trace_cache=thinking.cache, first_trace=number)
    forks = split_rows(mesh, _array(jnp.int32, plan.rows, plan.columns))
    rows = split_rows(mesh, packed_rows(plan, plan.rows))
    minibatch = split_rows(mesh, packed_rows(plan, plan.rows // plan.minibatches))
    with jax.set_mesh(mesh):
        scored = _sorted(mesh, jax.eval_shape(lambda rows: learner.begin_scores(loss, rows), rows))
    batch, partial = _begun(mesh, plan, loss, state.params, minibatch)
    # All of it is there while the rollout runs; the log-probs take the parameters, but not the moments.
    held, moments = bytes_a_chip(state), bytes_a_chip(state.opt_state)
    segments = math.ceil(engine.trace_pad / engine.segment)
    found = (
        Part("weights", rollout.weights, (model, state.params), held=moments),
        Part("prefill", rollout.start, (model, engine, weights, prompts, key, number), held=held),
        Part(
            "think",
            rollout.think,
            (model, engine, weights, prompts, cache, thinking, keys.thinking, number),
            calls=segments,
            held=held,
            most_trips=math.ceil(engine.trace_pad / segments),
        ),
        Part(
            "answers",
            rollout.sample_answers,
            (model, engine, weights, trunk, traces, forks, key),
            held=held,
            most_trips=max(engine.answer_cap - 1, 1),
        ),
        Part(
            "logprobs",
            learner.score_bucket,
            (model, loss, 0, state.params, *scored),
            held=moments + bytes_a_chip(rows),
            most_trips=micro_batches(loss, scored[0]),
        ),
        Part(
            "update",
            learner.accumulate,
            (learner.loss, model, loss, 0, state.params, batch, partial),
            calls=plan.minibatches,
            held=moments + bytes_a_chip(rows),
            most_trips=micro_batches(loss, batch),
        ),
        Part(
            "apply",
            learner.apply,
            (model, plan.optimizer, state, partial),
            calls=plan.minibatches,
            held=bytes_a_chip(rows),
        ),
    )
    return {part.name: part for part in found}


def flattened_update(plan: Settings, mesh: Mesh) -> Part:
    """The update of as many traces at a time whose S A branches are rows of their own: prompt, trace, answer.

    One trains the trace as well. Rows are as long as the longest.
    """
    model, branches = plan.model, plan.columns * plan.rollout.answers
    length = plan.context_pad + plan.rollout.trace_pad + plan.answer_pad
    shape = (plan.rows // plan.minibatches * branches, length)
    tokens, mask = _array(jnp.int32, *shape), _array(bool, *shape)
    rows = split_rows(mesh, jax.eval_shape(token_tree.sequences, tokens, _array(jnp.int32, shape[0]), mask))
    per_part = plan.rows // plan.minibatches // sharding.row_shards(mesh)
    loss = dataclasses.replace(
        plan.loss,
        num_targets=plan.rollout.trace_pad + plan.rollout.answer_cap,
        num_states=length,
        micro_tokens=plan.loss.micro_rows(per_part) * branches * length,
        buckets=1,
    )
    state = _placed(mesh, learner.abstract_state(model, plan.optimizer, plan.prefix is not None), model.num_kv_heads)
    batch, partial = _begun(mesh, plan, loss, state.params, rows)
    return Part(
        FLATTENED,
        learner.accumulate,
        (learner.loss, model, loss, 0, state.params, batch, partial),
        calls=plan.minibatches,
        held=bytes_a_chip(state.opt_state) + bytes_a_chip(rows),
        most_trips=micro_batches(loss, batch),
    )


def micro_batches(loss: learner.LossConfig, batch: buckets.Sorted) -> int:
    """Of a part, where all rows are in the longest bucket."""
    rows = batch.length.shape[0]
    return math.ceil(rows / loss.micro_rows(rows))


def packed_rows(plan: Settings, number: int) -> TokenTree:
    """Shapes of `number` rows as `token_tree.pack` makes them."""
    group, size, answers, width = plan.rollout.group_size, plan.columns, plan.rollout.answers, plan.answer_pad
    problems, trace = number // group, (number, plan.rollout.trace_pad)
    lead = (number, size, answers)
    flag, integer, real = (
        lambda *shape, dtype=dtype: _array(dtype, *shape) for dtype in (bool, jnp.int32, jnp.float32)
    )
    return jax.eval_shape(
        lambda *arrays: token_tree.pack(*arrays, one_token_answers=plan.credit.one_token_answers),
        _prompts(plan, problems),
        Traces(
            tokens=integer(*trace), logprob=real(*trace), length=integer(number), ended=flag(number), eos=flag(number)
        ),
        Answers(
            tokens=integer(*lead, width),
            logprob=real(*lead, width),
            length=integer(*lead),
            forced=integer(number, size),
            ended=flag(*lead),
        ),
        integer(number, size),
        Credit(
            trace_advantage=real(problems, group, size),
            answer_advantage=real(problems, group, size, answers),
            block_mask=flag(problems, group, size),
        ),
        real(size),
    )


def _prompts(plan, problems):
    return Prompts(
        tokens=_array(jnp.int32, problems, plan.context_pad),
        length=_array(jnp.int32, problems),
        id=_array(jnp.uint32, problems),
    )


def _array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def _placed(mesh, tree, kv_heads, **options):
    return _with(tree, sharding.shardings(mesh, tree, kv_heads, **options))


def _with(tree, layout):
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, layout)


def split_rows(mesh: Mesh, tree: Any) -> Any:
    """Shapes with the layout that they have in a rollout: rows split, caches by heads too, scalars on every chip."""

    def layout(leaf):
        if leaf.ndim == 4:  # a cache: rows, heads
            return NamedSharding(mesh, P(sharding.ROWS, "tensor"))
        return NamedSharding(mesh, P(sharding.ROWS) if leaf.ndim else P())

    return _with(tree, jax.tree.map(layout, tree))


def _begun(mesh, plan, loss, params, rows):
    """What the gradient of a minibatch begins with, with its layout: sorted rows, and a sum laid out as parameters."""
    begin = functools.partial(learner.begin, learner.loss, plan.model, loss)
    with jax.set_mesh(mesh):
        batch, partial = _sorted(mesh, jax.eval_shape(begin, params, rows))
    return batch, dataclasses.replace(partial, grads=params)


def _sorted(mesh, begun):
    """What begins a loop over buckets, with its layout: rows are split, lengths and sums lie on every chip."""
    batch, carry = begun
    length = _with(batch.length, NamedSharding(mesh, P()))
    return dataclasses.replace(split_rows(mesh, batch), length=length), split_rows(mesh, carry)


def bytes_a_chip(tree: Any) -> int:
    """Of shapes with shardings, without the padding of tiles."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compile_part(part: Part, mesh: Mesh, chip: tpu_chips.Chip, slices: int = 1) -> Compiled:
    """Lower, compile and count. What does not fit is a result like others; other errors of the compiler are raised."""
    begin, refused = time.perf_counter(), None
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        # The text is the compiler's own dump: it is there of programs that do not fit, too, and `as_text` fails on some
        # (jaxlib 0.10.2 does not read the asynchronous instructions of libtpu 0.0.51 for v5p and v6e).
        lowered = part.function.lower(*part.arguments)
        try:
            program = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refused = str(error)
        seconds = time.perf_counter() - begin
        cost = hlo_cost.count(_dumped(folder, "after_optimizations.txt"), part.most_trips, slices)
        largest = hlo_cost.largest_buffers(_dumped(folder, "after_optimizations-memory-usage-report.txt"))
    if refused is None:
        memory, limit = _memory(program.memory_analysis(), part.held), chip.hbm
        why = f"{memory.held:,} bytes of training state lie beside it" if memory.total > limit else ""
    else:
        needed, limit = exhausted(refused)
        memory = Memory(0, 0, 0, 0, part.held, needed + part.held)
        why = " ".join(refused.partition("HLO module")[0].split())
    bounds = tpu_chips.bounds(chip, cost)
    return Compiled(part.name, part.calls, seconds, memory, limit, not why, cost, bounds, largest, why)


def _dumped(folder, what):
    """Text of the whole program's file, not that of a piece the compiler made."""
    (path,) = [path for path in Path(folder).iterdir() if re.fullmatch(rf"module_\d+\.jit_.*\.{what}", path.name)]
    return path.read_text()


def _memory(found, held):
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    own = (found.argument_size_in_bytes, outputs, found.temp_size_in_bytes, found.generated_code_size_in_bytes)
    return Memory(*own, held=held, total=sum(own) + held)


def exhausted(said: str) -> tuple[int, int]:
    """Bytes that a program needs and those that there are, from the compiler's RESOURCE_EXHAUSTED; 0 if not said."""
    amount = r"([\d.]+)([KMGT])i?B?"
    found = re.search(rf"\({amount}\) exceeds available \w+ \({amount}\)", said) or re.search(
        rf"Used {amount} of {amount} hbm", said
    )
    if not found:
        return 0, 0
    needed, unit, limit, limit_unit = found.groups()
    return int(float(needed) * UNITS[unit]), int(float(limit) * UNITS[limit_unit])
