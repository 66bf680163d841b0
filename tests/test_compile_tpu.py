"""Programs compiled for TPUs that are not there: cost by hand, memory by layout, and what is refused."""

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import math as math_config
from configs import peak
from tto_jax import aot, compile_tpu, hlo_cost, settings, tpu_chips

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # there is no such device
needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="pip install 'tto-jax[tpu]'")

# The cost of a program, by its text.

LOOPS = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[64,128], f32[5,64,128])) -> (s32[], f32[64,128], f32[5,64,128]) {
  %p = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[5,64,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[64,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %all = f32[5,64,128]{2,1,0:T(8,128)} get-tuple-element(%p), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %stored = f32[5,64,128]{2,1,0:T(8,128)} fusion(%all, %x, %i), kind=kLoop, calls=%store
  %moved = f32[64,128]{1,0:T(8,128)} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %out = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[5,64,128]{2,1,0:T(8,128)}) tuple(%next, %moved, %stored)
}

%store (a: f32[5,64,128], b: f32[64,128], at: s32[]) -> f32[5,64,128] {
  %a = f32[5,64,128]{2,1,0:T(8,128)} parameter(0)
  %b = f32[64,128]{1,0:T(8,128)} parameter(1)
  %at = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %row = f32[1,64,128]{2,1,0:T(8,128)} bitcast(%b)
  ROOT %new = f32[5,64,128]{2,1,0:T(8,128)} dynamic-update-slice(%a, %row, %at, %zero, %zero)
}

%condition (q: (s32[], f32[64,128], f32[5,64,128])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[5,64,128]{2,1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %most = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%j, %most), direction=LT
}

ENTRY %main (x: f32[64,128]) -> f32[5,64,128] {
  %start = s32[]{:T(128)} constant(0)
  %given = f32[64,128]{1,0:T(8,128)} parameter(0)
  %nothing = f32[]{:T(128)} constant(0)
  %zeros = f32[5,64,128]{2,1,0:T(8,128)S(1)} broadcast(%nothing), dimensions={}
  %begin = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[5,64,128]{2,1,0:T(8,128)}) tuple(%start, %given, %zeros)
  %loop = (s32[], f32[64,128]{1,0:T(8,128)}, f32[5,64,128]{2,1,0}) while(%begin), condition=%condition, body=%body
  ROOT %result = f32[5,64,128]{2,1,0:T(8,128)} get-tuple-element(%loop), index=2
}
"""
ROW = 64 * 128 * 4


def test_a_loop_counts_its_trips_and_an_update_in_place_what_it_changes():
    cost = hlo_cost.count(LOOPS, dynamic_trips=99)
    stored = 2 * ROW + 4  # the row is read and written, not the five of them; the index is read
    reduced, added, compared = 2 * ROW, 3 * 4, 2 * 4 + 1
    assert cost.bytes == 5 * (stored + reduced + added + compared) + 4
    assert cost.collectives == (hlo_cost.Collective("all-reduce", "ici", 2, 5, 5 * ROW),)  # 2 (n-1)/n of it
    assert cost.dynamic == {} and cost.flops == 0


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("direction=LT", "direction=LT", 5),
        ("constant(5)", "constant(12)", 12),
        ("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(2)", 3),
        ("%start = s32[]{:T(128)} constant(0)", "%start = s32[]{:T(128)} constant(3)", 2),
        ("compare(%j, %most), direction=LT", "compare(%most, %j), direction=GT", 5),
        ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}', 7),
        ("%most = s32[]{:T(128)} constant(5)", "%most = s32[]{:T(128)} convert(%j)", 99),
    ],
)
def test_trips(old, new, trips):
    assert old in LOOPS
    cost = hlo_cost.count(LOOPS.replace(old, new), dynamic_trips=99)
    assert cost.collectives[0].calls == trips
    assert list(cost.dynamic.values()) == ([99] if trips == 99 else [])


def test_a_loop_without_an_end_inside_another_counts_once():
    """Only the outermost has a known worst case."""
    outer = LOOPS.replace("constant(5)", "convert(%j)")
    functions, entry = outer[outer.index("%body") : outer.index("ENTRY")], outer[outer.index("ENTRY") :]
    inner = functools.reduce(
        lambda text, name: text.replace(name, f"{name}_2"), ("%body", "%condition", "%store"), functions
    )
    kind = "(s32[], f32[64,128], f32[5,64,128])"
    loop = f"%again = {kind} while(%p), condition=%condition_2, body=%body_2\n  ROOT %out ="
    text = "HloModule m\n\n" + inner + functions.replace("ROOT %out =", loop) + entry
    cost = hlo_cost.count(text, dynamic_trips=10)
    assert cost.collectives[0].calls == 10 + 10 * 1


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[64,128]{1,0:T(8,128)}", 64 * 128 * 4),
        ("f32[3,5]{1,0:T(8,128)}", 8 * 128 * 4),
        ("f32[3,5]{0,1:T(8,128)}", 8 * 128 * 4),
        ("f32[300,5]{0,1:T(8,128)}", 8 * 384 * 4),  # the first dimension is the minor one
        ("bf16[2,7,130]{2,1,0:T(8,128)(2,1)}", 2 * 8 * 256 * 2),
        ("s32[10]{0:T(128)}", 128 * 4),
        ("pred[4]{0}", 4),
        ("f32[]", 4),
        ("f32[64,128]{1,0:T(8,128)S(1)}", 0),
        ("s4[16]{0}", 8),
    ],
)
def test_bytes_of_an_array_in_its_tiles(text, size):
    assert sum(array.hbm for array in hlo_cost._arrays(text)) == size


CONVOLUTION = """HloModule m

ENTRY %main (a: {a}, b: {b}) -> {out} {{
  %a = {a} parameter(0)
  %b = {b} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {how}
}}
"""


@pytest.mark.parametrize(
    ("a", "b", "out", "how", "flops"),
    [
        ("f32[8,64]", "f32[64,32]", "f32[8,32]", "dim_labels=bf_io->bf", 2 * 8 * 64 * 32),
        ("f32[4,8,64]", "f32[1,64,32]", "f32[4,8,32]", "window={size=1}, dim_labels=0bf_0io->0bf", 2 * 4 * 8 * 64 * 32),
        # A product for each of 4: the window has holes, so that each meets its own only.
        (
            *("f32[4,8,64]", "f32[4,64,32]", "f32[4,8,32]"),
            "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            2 * 4 * 8 * 64 * 32,
        ),
        # 3 taps over 10 with padding of 1: the two ends meet 2.
        (
            "f32[1,10,2]",
            "f32[3,2,5]",
            "f32[1,10,5]",
            "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            2 * 28 * 2 * 5,
        ),
    ],
)
def test_flops_of_a_convolution(a, b, out, how, flops):
    assert hlo_cost.count(CONVOLUTION.format(a=a, b=b, out=out, how=how), 1).flops == flops


@pytest.mark.parametrize(
    ("spelling", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a'}", [[0, 1, 2, 3]]),
        ("replica_groups=unheard", []),
    ],
)
def test_replica_groups(spelling, groups):
    assert hlo_cost.replica_groups(f", channel_id=1, {spelling}, use_global_device_ids=true") == groups


def test_what_is_not_understood_is_said():
    with pytest.raises(ValueError, match="replica groups are not understood"):
        hlo_cost.count(LOOPS.replace("{{0,1},{2,3}}", "some"), 1)
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo_cost.count("HloModule m", 1)
    with pytest.raises(ValueError, match="arrays of 'f3'"):
        hlo_cost.count(LOOPS.replace("f32", "f3"), 1)


KERNEL = """HloModule m

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %k = f32[8,128]{1,0:T(8,128)} custom-call(%a), custom_call_target="tpu_custom_call", METADATA
}
"""


def test_a_kernel_counts_what_its_author_says():
    metadata = 'metadata={op_name="jit(f)/mine/pallas_call"}, backend_config={"custom_call_config":{%s"body":"TUzvUg"}}'
    estimate = '"cost_estimate":{"flops":"70","bytes_accessed":"9"},'
    said = hlo_cost.count(KERNEL.replace("METADATA", metadata % estimate), 1)
    assert (said.flops, said.bytes, said.kernels, said.uncounted) == (70, 9, {"mine": 1}, ())
    silent = hlo_cost.count(KERNEL.replace("METADATA", metadata % ""), 1)
    assert (silent.flops, silent.bytes, silent.uncounted) == (0, 2 * 8 * 128 * 4, ("mine",))


def test_the_slowest_of_the_bounds():
    chip = tpu_chips.Chip("x", 1, flops=10.0, hbm_bandwidth=5.0, ici_bandwidth=2.0, dcn_bandwidth=1.0)
    sent = (hlo_cost.Collective("all-gather", "ici", 4, 1, 6.0), hlo_cost.Collective("all-reduce", "dcn", 2, 1, 7.0))
    cost = hlo_cost.Cost(20.0, 15.0, sent, {}, {}, ())
    assert list(tpu_chips.bounds(chip, cost).values()) == [2.0, 3.0, 3.0, 7.0]


# Programs compiled by libtpu.


def compiled(function, *shapes, topology="v5e:2x2", slices=1, mesh=(1, -1, 1), out=None):
    """Text of a program on a pod; shapes come with their PartitionSpec."""
    pod = compile_tpu.describe(topology, slices, mesh)
    place = lambda spec: NamedSharding(pod.mesh, spec)  # noqa: E731
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=place(spec)) for shape, dtype, spec in shapes]
    with jax.set_mesh(pod.mesh):
        program = jax.jit(function, out_shardings=None if out is None else place(out)).lower(*given).compile()
    return program.as_text()


@needs_libtpu
def test_products_in_a_loop():
    """7 products of bf16 [512,256] x [256,256], rows over 4 chips; each step's product is stored."""

    def f(x, w):
        step = lambda x, _: (jnp.tanh(x @ w), x)  # noqa: E731
        return jax.lax.scan(step, x, length=7)

    rows = ((512, 256), jnp.bfloat16, P("fsdp"))
    text = compiled(f, rows, ((256, 256), jnp.bfloat16, P()))
    cost = hlo_cost.count(text, 1)
    assert cost.flops == 7 * 2 * (512 / 4) * 256 * 256
    assert cost.collectives == () and cost.dynamic == {}
    written = 7 * (512 / 4) * 256 * 2
    assert written <= cost.bytes <= 3 * written + 2 * 256 * 256 * 2


@needs_libtpu
@pytest.mark.parametrize("kind", ["all-gather", "all-reduce", "reduce-scatter"])
def test_what_a_chip_sends(kind):
    """A float32 array of 4 MiB over 4 chips."""
    size, whole, part = 4 * 2**20, P(), P("fsdp")
    work = {
        "all-gather": (lambda x: x * 2, part, whole, 3 / 4),
        "all-reduce": (lambda x: jax.lax.psum(x, "fsdp"), whole, whole, 2 * 3 / 4),
        "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), whole, part, 3 / 4),
    }
    function, spec, out, factor = work[kind]
    if kind != "all-gather":
        function = jax.shard_map(function, in_specs=spec, out_specs=out, check_vma=False)
    text = compiled(function, ((1024, 1024), jnp.float32, spec), out=out)
    (found,) = hlo_cost.count(text, 1).collectives
    assert (found.kind, found.network, found.group, found.calls) == (kind, "ici", 4, 1)
    assert found.bytes == factor * size


@needs_libtpu
def test_a_mosaic_kernel_is_found():
    """3 calls of a kernel that says what it costs."""
    estimate = pl.CostEstimate(flops=123, bytes_accessed=456, transcendentals=0)

    def double(x):
        def kernel(source, result):
            result[...] = source[...] * 2

        return pl.pallas_call(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), cost_estimate=estimate, name="double")(x)

    local = jax.shard_map(double, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False)
    text = compiled(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: local(x), x), ((32, 128), jnp.float32, P("fsdp")))
    cost = hlo_cost.count(text, 1)
    assert (cost.flops, cost.kernels, cost.uncounted) == (3 * 123, {"double": 3}, ())


@needs_libtpu
def test_what_goes_between_slices():
    """Of a sum over data, of 2 slices of 4, each chip sends its quarter over the data-centre network."""
    function = jax.shard_map(lambda x: jax.lax.psum(x, ("data", "fsdp")), in_specs=P(), out_specs=P(), check_vma=False)
    text = compiled(function, ((1024, 1024), jnp.float32, P()), slices=2, mesh=(2, -1, 1))
    sent = hlo_cost.count(text, 1, slices=2).collectives
    assert [(x.group, x.bytes) for x in sent if x.network == "dcn"] == [(2, 2 * 1 / 2 * 2**20)]
    assert sum(x.bytes for x in sent if x.network == "ici") == 2 * 3 / 4 * 4 * 2**20


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_what_does_not_fit_says_what_it_needs_and_what_there_is(topology):
    shape = (200_000, 200_000)  # 149 GiB in float32, of which there are an argument and a result
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        compiled(lambda x: x @ x, (shape, jnp.float32, P()), topology=topology)
    needed, limit = aot.exhausted(str(refused.value))
    assert needed >= 2 * 4 * 200_000**2
    assert limit == tpu_chips.of(topology).hbm


def small(remat="full", trace=256, micro=2, layers=2, mesh=(1, -1, 1), attention="reference"):
    """A small pretrained model on math problems, its sizes multiples of a tile."""
    config = math_config.get_config("brpo")
    config.model.update(dict(vocab_size=1024, hidden_size=256, num_layers=layers, num_heads=4, num_kv_heads=2))
    config.model.update(dict(head_dim=128, mlp_size=1024, max_position=100_000, rope_theta=1e4, norm_eps=1e-6))
    config.model.update(dict(attention_bias=True, qk_norm=False, tie_embeddings=False, remat=remat))
    config.learner.attention = attention
    config.task.update({"max_prompt_tokens": 128, "max_answer_tokens": 24})
    config.budgets.tokens, config.evaluation.budgets = (trace // 2, trace), (trace,)
    config.rollout.update({"problems": 8, "group_size": 4, "answers": 2, "segment": 100})
    config.mesh = mesh
    config.learner.micro_tokens = micro * settings.build(config, need_model=False).row_length
    return config


def part_of(name, topology, config):
    pod = compile_tpu.describe(topology, 1, config.mesh)
    plan = compile_tpu.on(config, pod)
    return aot.compile_part(aot.parts(plan, pod.mesh)[name], pod.mesh, pod.chip), plan, pod


def forward_flops(plan, rows):
    """Products of a forward pass over packed rows, but the head's: of the layers, and of the head's, by hand."""
    model, length = plan.model, plan.row_length
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * heads + 2 * kv + 3 * model.mlp_size)
    attention = 2 * length * heads  # scores, and their mixture of the values
    head = plan.loss.num_targets * model.hidden_size * model.vocab_size
    return 2 * rows * model.num_layers * length * (layer + attention), 2 * rows * head


@needs_libtpu
def test_logprobs_cost_what_a_forward_pass_does():
    found, plan, _ = part_of("logprobs", "v5e:2x2", small())
    assert found.cost.flops == pytest.approx(sum(forward_flops(plan, plan.rows / 4)), rel=0.02)
    assert found.fits and found.calls == 1


@needs_libtpu
def test_an_update_computes_the_forward_twice_and_the_backward():
    """With full remat all but the last product of a layer is computed again; the head always is."""
    config = small(trace=128)
    config.model.update({"hidden_size": 128, "mlp_size": 256, "vocab_size": 512})
    found, plan, pod = part_of("update", "v5p:2x2x1", config)
    model, rows = plan.model, plan.rows / plan.minibatches / 4
    layers, head = forward_flops(plan, rows)
    last = 2 * rows * model.num_layers * plan.row_length * model.hidden_size * model.mlp_size
    assert found.cost.flops == pytest.approx(4 * layers - last + 4 * head, rel=0.02)
    kinds = {x.kind for x in found.cost.collectives}
    assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
    # Its arguments are the parameters and their gradient, each chip a quarter, and the rows; small arrays are padded.
    model = dataclasses.replace(plan.model, remat="none")
    weights = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: aot.learner.decoder.init_params(model, 0))))
    batch = aot.parts(plan, pod.mesh)["update"].arguments[5]
    sized = 2 * 4 * weights / 4 + aot.bytes_a_chip(batch)
    assert found.hbm_bytes.arguments == pytest.approx(sized, rel=0.05)
    assert found.hbm_bytes.outputs < 0.05 * found.hbm_bytes.arguments, "the gradient is donated"
    rows = aot.bytes_a_chip(aot.split_rows(pod.mesh, aot.packed_rows(plan, plan.rows)))
    assert found.hbm_bytes.held == pytest.approx(2 * 4 * weights / 4 + rows, rel=0.05), "moments, and all rows"
    own = found.hbm_bytes
    assert own.total == own.arguments + own.outputs + own.temporaries + own.code + own.held
    assert found.bound_s == max(found.bounds.values()) == found.bounds[found.bound_by]


@needs_libtpu
@pytest.mark.slow
def test_flattened_branches_cost_what_their_tokens_do():
    """The same traces at a time, each branch with its own prompt and trace."""
    pod, config = compile_tpu.describe("v5e:2x2", 1, (1, -1, 1)), small(trace=128)
    plan = compile_tpu.on(config, pod)
    shared, flat = (
        aot.compile_part(part, pod.mesh, pod.chip)
        for part in (aot.parts(plan, pod.mesh)["update"], aot.flattened_update(plan, pod.mesh))
    )
    branches = plan.columns * plan.rollout.answers
    longer = branches * (plan.prompt_pad + plan.rollout.trace_pad + plan.answer_pad) / plan.row_length
    assert longer > 2 and flat.cost.flops > 0.8 * longer * shared.cost.flops
    assert flat.hbm_bytes.temporaries > 1.5 * shared.hbm_bytes.temporaries
    assert flat.calls == shared.calls


@needs_libtpu
def test_the_kernel_follows_the_platform_of_the_mesh():
    """Compiled on a machine with CPUs only, for TPUs: Mosaic calls, forward and backward, whose work is counted."""
    found, plan, _ = part_of("update", "v5e:2x2", small(trace=128, attention=""))
    assert plan.loss.attention == "pallas_tpu"
    names = ("forward", "backward_queries", "backward_keys")
    calls = {name: n for kernel, n in found.cost.kernels.items() for name in names if name in kernel}
    assert calls.keys() == set(names) and all(n >= plan.model.num_layers for n in calls.values())
    assert not found.cost.uncounted and found.fits


@needs_libtpu
def test_thinking_on_tensor_shards():
    """The loop that may end early counts a segment's tokens; each reads the weights and the whole cache."""
    found, plan, pod = part_of("think", "v5p:2x2x1", small(mesh=(1, 2, 2)))
    assert found.calls == 3 and 86 in found.cost.dynamic.values()  # segments of at most 100 of 256 tokens
    model, rows = plan.model, plan.rows / 2
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * heads + 2 * kv + 3 * model.mlp_size) / 2
    token = model.num_layers * layer + model.hidden_size * model.vocab_size / 2
    assert found.cost.flops >= 86 * 2 * rows * token
    cache = model.num_layers * 2 * rows * (kv / 2) * plan.rollout.trace_pad * 2
    assert found.cost.bytes >= 86 * (2 * token + cache), "every token reads the weights and the cache"
    held = aot.parts(plan, pod.mesh)["apply"].arguments[2]
    assert found.hbm_bytes.held == aot.bytes_a_chip(held), "the training state lies there while the rollout runs"


@needs_libtpu
def test_a_part_gets_what_the_one_before_gives():
    """The layouts that thinking and answers are compiled for are those in which the compiler leaves the results."""
    config = small(mesh=(1, 2, 2))
    pod = compile_tpu.describe("v5e:2x2", 1, config.mesh)
    found = aot.parts(compile_tpu.on(config, pod), pod.mesh)

    def results(part):
        with jax.set_mesh(pod.mesh):
            return part.function.lower(*part.arguments).compile().output_shardings

    think, (_, _, _, trunk, traces, _, _) = found["think"].arguments, found["answers"].arguments
    started, thought = results(found["prefill"]), results(found["think"])[0]
    given = (started[0].flow.hidden, started[0].cache, started[1], started[2].thinking, thought)
    taken = (think[5].flow.hidden, think[5].cache, think[4], think[6], think[5])
    given, taken = (*given, thought.cache, thought.tokens), (*taken, trunk.trace_cache, traces.tokens)
    for layout, wanted in zip(jax.tree.leaves(given), jax.tree.leaves(taken), strict=True):
        assert layout.is_equivalent_to(wanted.sharding, len(wanted.shape)), (layout, wanted)


@needs_libtpu
def test_a_part_that_does_not_fit_is_a_row():
    """The scores of a row of 160,192 tokens do not fit: the row says how much they are and what they are."""
    config = small(trace=80_000, layers=1)
    found, plan, pod = part_of("logprobs", "v5e:2x2", config)
    scores = 2 * 4 * 4 * plan.row_length**2  # of 2 rows and 4 heads, in float32
    assert not found.fits and found.hbm_bytes.total > scores > found.hbm_limit == pod.chip.hbm
    assert found.largest[0].bytes > scores
    assert math.prod(json.loads(found.largest[0].array.removeprefix("f32"))) >= scores / 4
    # The compiler computes the scores again rather than to keep them.
    forward, again = sum(forward_flops(plan, plan.rows / 4)), 2 * plan.rows * plan.row_length**2 * 4 * 128 / 4
    assert forward <= found.cost.flops <= 1.02 * (forward + again)
    row = json.loads(json.dumps(compile_tpu.record(config, plan, pod, found)))
    assert row["hbm_bytes"]["total"] == found.hbm_bytes.total and "RESOURCE_EXHAUSTED" in row["why"]
    said = compile_tpu.advice(plan, pod, "logprobs")
    assert f"learner.micro_tokens={plan.row_length}" in said and "tensor (2, 4)" in said


def test_the_compiler_says_what_it_needs():
    said = "RESOURCE_EXHAUSTED: E1000: ... for HLO temporaries (204.50G) exceeds available HBM (15.75G). HLO module: f"
    assert aot.exhausted(said) == (int(204.5 * 2**30), int(15.75 * 2**30))
    older = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 900.12M of 15.75G hbm. Exceeded by 1M"
    assert aot.exhausted(older) == (int(900.12 * 2**20), int(15.75 * 2**30))
    assert aot.exhausted("RESOURCE_EXHAUSTED: of something else") == (0, 0)


# The page.


@needs_libtpu
def test_the_page(tmp_path):
    """One small part for a pod, in a process of its own; and what does not fit ends with 1."""
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "tto_jax.compile_tpu", "--config=configs/peak.py", "--topology=v5e:2x2"]
    command += ["--mesh=1,4,1", "--parts=weights,prefill", f"--json={file}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "all fit" in done.stdout and "these parts take at least" in done.stdout
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["weights", "prefill"]
    required = {"part", "topology", "chips", "compile_s", "hbm_bytes", "hbm_limit", "flops", "bytes"}
    required |= {"collective_bytes", "bound_s", "bound_by"}
    assert all(required <= set(row) and row["chips"] == 4 and row["fits"] for row in rows)
    gathered = rows[0]["collective_bytes"]
    plan = settings.build(peak.get_config("brpo"))
    params = jax.eval_shape(lambda: aot.learner.decoder.init_params(plan.model, 0))
    assert gathered == pytest.approx(3 / 4 * 4 * sum(x.size for x in jax.tree.leaves(params)), rel=0.03)


def fake(needs):
    """A compiler for which an update needs `needs[remat]` bytes and a second for every row it does not batch."""

    def compile_part(part, mesh, chip, slices):
        _, model, loss = part.arguments[:3]
        micro = loss.micro_tokens // loss.num_states
        size = needs[model.remat] * micro
        seconds = {"none": 1.0, "dots": 2.0, "attention": 2.5, "full": 3.0}[model.remat] - 0.1 * micro
        cost = hlo_cost.Cost(0.0, 0.0, (), {}, {}, ())
        memory = aot.Memory(0, 0, size, 0, 0, size)
        return aot.Compiled(part.name, 1, 0.0, memory, 100, size <= 100, cost, {"compute": seconds}, (), "")

    return compile_part


@pytest.mark.parametrize(
    ("needs", "tried", "best"),
    [
        # 4 rows a part: full fits with all of them, dots with 2, none with no row.
        (
            {"full": 25, "attention": 30, "dots": 50, "none": 101},
            ["full1", "full2", "full4", "attention1", "attention2", "attention4", "dots1", "dots2", "dots4", "none1"],
            "dots2",
        ),
        ({"full": 101, "attention": 150, "dots": 200, "none": 300}, ["full1"], None),
        (
            {"full": 10, "attention": 101, "dots": 20, "none": 100},
            ["full1", "full2", "full4", "attention1", "dots1", "dots2", "dots4", "none1", "none2"],
            "none1",
        ),
    ],
)
def test_fit(monkeypatch, needs, tried, best):
    monkeypatch.setattr(aot, "compile_part", fake(needs))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")
    config = small()
    mesh = compile_tpu.sharding.make_mesh((1, 4, 1), jax.devices()[:4])
    pod = compile_tpu.Pod("v5e:2x2", 1, tpu_chips.of("v5e:2x2"), mesh)
    rows = compile_tpu.fit(config, pod)
    assert [f"{row['remat']}{row['micro_rows']}" for row in rows] == tried
    given = 2 * settings.build(config, need_model=False).row_length
    assert all(row["trial"] for row in rows) and (config.learner.micro_tokens, config.model.remat) == (given, "full")
    found = compile_tpu.fastest(rows)
    assert (found and f"{found['remat']}{found['micro_rows']}") == best


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v5e", "chips along each axis"),
        ("h100:8", r"\('v5e', 'v5p', 'v6e'\)"),
        ("v7:2x2", "such as v5e:8x8"),
        ("", "v6e:4x4"),
    ],
)
def test_topologies_that_are_none(topology, said):
    with pytest.raises(ValueError, match=said):
        compile_tpu.describe(topology, 1, (1, -1, 1))


@needs_libtpu
def test_slices_that_libtpu_does_not_know():
    with pytest.raises(ValueError, match=r"topology='v5e:3x3'.*not divisible.*v5e:8x8"):
        compile_tpu.describe("v5e:3x3", 1, (1, -1, 1))


def test_a_mesh_that_does_not_split_the_rows_or_heads():
    config = small()
    for mesh, said in [
        ((1, 8, 1), r"multiples of 8:"),
        ((1, 1, 8), "tensor=8 does not divide the 4 query heads"),
    ]:
        pod = compile_tpu.Pod("v5e:2x4", 1, tpu_chips.of("v5e:2x4"), compile_tpu.sharding.make_mesh(mesh))
        config.rollout.problems = 6 if mesh[1] == 8 else 8
        with pytest.raises(ValueError, match=said):
            compile_tpu.on(config, pod)


def test_without_libtpu_the_command_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'libtpu==[\d.]+\*'"):
        compile_tpu.describe("v5e:2x2", 1, (1, -1, 1))


BIG = [  # configuration, topology, mesh: each fits
    ("brpo_r1_qwen_1p5b_8k", "v5e:8x8", (1, 64, 1)),
    ("brpo_r1_qwen_1p5b_8k", "v6e:4x4", (1, 16, 1)),
    ("brpo_r1_qwen_1p5b_8k", "v5p:4x4x4", (1, 64, 1)),
    ("brpo_r1_qwen_1p5b_16k", "v5e:8x8", (1, 16, 4)),
    ("brpo_r1_qwen_1p5b_16k", "v6e:4x4", (1, 8, 2)),
    ("brpo_r1_qwen_1p5b_16k", "v5p:4x4x4", (1, 64, 1)),
    ("brpo_r1_qwen_7b_8k", "v5e:16x16", (1, 64, 4)),
    ("brpo_r1_qwen_7b_8k", "v5p:4x4x4", (1, 64, 1)),
]


@needs_libtpu
@pytest.mark.parametrize(("name", "topology", "mesh"), BIG)
def test_shipped_configurations_split_over_pods_of_several_hosts(name, topology, mesh):
    """Each host holds the rows that it grades, and they lie together: nothing is compiled here."""
    config = importlib.import_module(f"configs.{name}").get_config()
    pod = compile_tpu.describe(topology, 1, mesh)
    plan = compile_tpu.on(config, pod)
    assert plan.loss.micro_rows(compile_tpu.minibatch_rows(plan, pod)) == 1
    hosts = {device.process_index for device in pod.mesh.devices.flat}
    assert len(hosts) == pod.mesh.size / 4


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(("name", "topology", "mesh"), BIG)
def test_shipped_configurations_fit(name, topology, mesh):
    """Minutes each, and up to 8 GB of memory."""
    config = importlib.import_module(f"configs.{name}").get_config()
    pod = compile_tpu.describe(topology, 1, mesh)
    plan = compile_tpu.on(config, pod)
    for part in aot.parts(plan, pod.mesh).values():
        found = aot.compile_part(part, pod.mesh, pod.chip)
        assert found.fits, (part.name, found.hbm_bytes, found.largest)
        assert found.cost.flops > 0 or part.name in ("weights", "apply"), "the others have matrix products"
