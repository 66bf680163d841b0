"""Attention of new tokens over a cache in parts against loops: every query looks its parts' rows up by itself."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tto_jax import compile_tpu
from tto_jax.kernels.branch_decode import (
    IMPLEMENTATIONS,
    CachePart,
    Interval,
    blocked,
    branch_decode,
    choose,
    lay_out,
    pallas_tpu,
    tile,
)

M, D = 12, 4
jitted = jax.jit(branch_decode, static_argnums=2)
interpreted = jax.jit(pallas_tpu.interpreted)
ON_ANY = [name for name in IMPLEMENTATIONS if name != "pallas_tpu"]  # platform


def random_part(rng, rows, kv_heads, capacity, seen=0.5, width=D):
    return CachePart(
        k=rng.normal(size=(rows, kv_heads, width, capacity)).astype(np.float32),
        v=rng.normal(size=(rows, kv_heads, capacity, width)).astype(np.float32),
        visible=rng.random((rows, M // rows, capacity)) < seen,
    )


def random_parts(kv_heads, seed=0):
    """A row for 6 queries, a row for 3 and a row for each; every query sees its own first slot."""
    rng = np.random.default_rng(seed)
    parts = [random_part(rng, *sizes) for sizes in ((2, kv_heads, 5), (4, kv_heads, 3), (12, kv_heads, 7))]
    parts[-1].visible[..., 0] = True
    return rng.normal(size=(M, 4, D)).astype(np.float32), parts


def random_interval(rng, rows, capacity):
    """Of each query's own; every third is empty, some end beyond the row or begin before it."""
    begin, end = np.sort(rng.integers(-2, capacity + 3, size=(2, rows, M // rows)), axis=0)
    end = np.where(np.arange(M // rows) % 3 == 1, begin, end)
    return Interval(begin=begin.astype(np.int32), end=end.astype(np.int32))


def mask_of(interval, capacity):
    slot = np.arange(capacity)
    return (interval.begin[..., None] <= slot) & (slot < interval.end[..., None])


def oracle(q, parts):
    group = q.shape[1] // parts[0].k.shape[1]
    out = np.zeros(q.shape)
    for m in range(len(q)):
        for h in range(q.shape[1]):
            scores, values = [], []
            for part in parts:
                each = len(q) // len(part.k)
                row, index = m // each, m % each
                for slot in np.flatnonzero(part.visible[row, index]):
                    key = part.k[row, h // group, :, slot].astype(np.float64)
                    scores.append(np.exp(float(q[m, h] @ key) / np.sqrt(q.shape[2])))
                    values.append(part.v[row, h // group, slot])
            out[m, h] = np.asarray(scores) / sum(scores) @ np.asarray(values)
    return out


@pytest.mark.parametrize("implementation", ON_ANY)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_oracle(implementation, kv_heads):
    q, parts = random_parts(kv_heads)
    expected = oracle(q, parts)
    np.testing.assert_allclose(jitted(q, parts, implementation), expected, atol=2e-6)
    np.testing.assert_allclose(jitted(q, parts[::-1], implementation), expected, atol=2e-6)


@pytest.mark.parametrize("attend", [*ON_ANY, "interpreted"])
def test_intervals(attend, monkeypatch):
    """Blocks that are skipped: with 128 slots a block, rows begin and end in any of the three."""
    monkeypatch.setattr(pallas_tpu, "BLOCK_BYTES", 1)
    monkeypatch.setattr(pallas_tpu, "WHOLE", 128)
    monkeypatch.setattr(blocked, "BLOCK", 100)
    rng = np.random.default_rng(1)
    parts, dense = [], []
    for rows, capacity in ((2, 384), (12, 20)):
        part, interval = random_part(rng, rows, 2, capacity), random_interval(rng, rows, capacity)
        if rows == 12:
            interval = Interval(begin=np.zeros((12, 1), np.int32), end=rng.integers(1, 21, (12, 1)).astype(np.int32))
        dense.append(dataclasses.replace(part, visible=mask_of(interval, capacity)))
        parts.append(dataclasses.replace(part, visible=interval))
    assert [pallas_tpu.block_slots(part) for part in parts] == [128, 20]
    q = rng.normal(size=(M, 6, D)).astype(np.float32)
    run = interpreted if attend == "interpreted" else functools.partial(jitted, implementation=attend)
    np.testing.assert_allclose(run(q, parts), oracle(q, dense), atol=2e-6)


@pytest.mark.parametrize("attend", ["blocked", "interpreted"])
def test_slots_outside_of_the_intervals_are_not_read(attend, monkeypatch):
    """Blocks that no query sees hold NaN: a kernel that multiplied them by 0 would show it."""
    monkeypatch.setattr(pallas_tpu, "BLOCK_BYTES", 1)
    monkeypatch.setattr(blocked, "BLOCK", 128)
    monkeypatch.setattr(blocked, "FEW", 1)
    rng = np.random.default_rng(2)
    part = random_part(rng, 3, 2, 640)
    begin, end = np.full((3, 4), 256, np.int32), rng.integers(257, 385, (3, 4)).astype(np.int32)
    end[1] = 256  # nothing of this row
    part = dataclasses.replace(part, visible=Interval(begin=begin, end=end))
    own = random_part(rng, 12, 2, 4)
    own = dataclasses.replace(own, visible=Interval(begin=np.zeros((12, 1), np.int32), end=np.full((12, 1), 4)))
    q = rng.normal(size=(M, 4, D)).astype(np.float32)
    dense = [dataclasses.replace(x, visible=mask_of(x.visible, x.k.shape[-1])) for x in (part, own)]
    expected = oracle(q, dense)
    for x in (part.k, part.v.swapaxes(2, 3)):
        x[..., :256], x[..., 384:] = np.nan, np.nan
    run = interpreted if attend == "interpreted" else functools.partial(jitted, implementation=attend)
    np.testing.assert_allclose(run(q, [part, own]), expected, atol=2e-6)


@pytest.mark.parametrize("attend", ON_ANY)
@pytest.mark.parametrize("rows", [12, 6, 1], ids="{} rows".format)
def test_keys_in_tiles(attend, rows, monkeypatch):
    """Of 2, 4 and 24 rows a query matrix, where the last goes block by block, beside a part that has no tiles."""
    monkeypatch.setattr(blocked, "BLOCK", 100)
    rng = np.random.default_rng(3)
    part, own = random_part(rng, rows, 2, 128), random_part(rng, 12, 2, 7, seen=1.0)
    seen = random_interval(rng, rows, 128)
    k = part.k.reshape(rows, 2, D, 4, 32).swapaxes(2, 3)
    q = rng.normal(size=(M, 4, D)).astype(np.float32)
    expected = oracle(q, [dataclasses.replace(part, visible=mask_of(seen, 128)), own])
    found = jitted(q, [CachePart(k=k, v=part.v, visible=seen), own], attend)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_keys_are_laid_out_in_tiles_for_few_queries_of_a_long_part():
    k = np.arange(2 * 3 * D * 160, dtype=np.float32).reshape(2, 3, D, 160)
    tiles = lay_out("blocked", k, 2)
    assert tiles.shape == (2, 3, 5, D, tile("blocked", 2, 160))
    np.testing.assert_array_equal(tiles[1, 2, 4, 3], k[1, 2, 3, 128:])
    for same in ((tiles, 8), (k, 1), (k, 9), (k[..., :96], 2), (k[..., :150], 2)):
        assert lay_out("blocked", *same) is same[0], same[1]
    for name in IMPLEMENTATIONS:
        np.testing.assert_array_equal(lay_out(name, tiles, 9), k)
        assert name == "blocked" or lay_out(name, k, 2) is k


def test_an_unseen_part_and_unseen_slots_change_nothing():
    q, parts = random_parts(2)
    base = jitted(q, parts)
    unseen = random_part(np.random.default_rng(9), 3, 2, 6, seen=0.0)
    np.testing.assert_allclose(jitted(q, [unseen, *parts]), base, atol=1e-6)
    # Row 0 of the first part serves queries 0..5: hide slot 2 from them, then put anything there.
    parts[0].visible[0, :, 2] = False
    hidden = jitted(q, parts)
    parts[0].k[0, :, :, 2], parts[0].v[0, :, 2] = 50.0, -50.0
    np.testing.assert_array_equal(jitted(q, parts), hidden)


def test_shared_rows_equal_copied_rows():
    """One row for six queries is the same as six rows with the same content."""
    q, parts = random_parts(2)
    shared = parts[0]
    copied = CachePart(
        k=np.repeat(shared.k, 6, axis=0), v=np.repeat(shared.v, 6, axis=0), visible=shared.visible.reshape(M, 1, -1)
    )
    expected = jitted(q, parts)
    np.testing.assert_allclose(jitted(q, [copied, *parts[1:]]), expected, atol=1e-6)


def test_visible_is_broadcast():
    q, parts = random_parts(2)
    narrow = np.asarray([True, True, False, True, False])
    wide = np.broadcast_to(narrow, parts[0].visible.shape)
    expected = oracle(q, [CachePart(k=parts[0].k, v=parts[0].v, visible=wide)])
    actual = jitted(q, [CachePart(k=parts[0].k, v=parts[0].v, visible=narrow[None, None])])
    np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.parametrize("attend", [*ON_ANY, "interpreted"])
def test_bfloat16_in_bfloat16_out(attend):
    q, parts = random_parts(1)
    q, parts = q[:, :2], parts[1:]
    ends = [Interval(begin=np.zeros(x.visible.shape[:2], np.int32), end=x.visible.sum(-1)) for x in parts]
    expected = oracle(q, [dataclasses.replace(x, visible=mask_of(y, x.k.shape[-1])) for x, y in zip(parts, ends)])
    low = lambda x: jnp.asarray(x, jnp.bfloat16)  # noqa: E731
    parts = [CachePart(k=low(x.k), v=low(x.v), visible=y) for x, y in zip(parts, ends)]
    run = interpreted if attend == "interpreted" else functools.partial(jitted, implementation=attend)
    actual = run(low(q), parts)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, atol=0.05)


@pytest.mark.parametrize("implementation", ["merged", "blocked"])
def test_rows_and_heads_on_devices(implementation, monkeypatch):
    """2 x 2 devices, rows by heads, each part's rows and intervals split alike."""
    monkeypatch.setattr(blocked, "BLOCK", 4)
    rng = np.random.default_rng(4)
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    part, own = random_part(rng, 2, 2, 9), random_part(rng, 12, 2, 5, seen=1.0)
    part = dataclasses.replace(part, visible=random_interval(rng, 2, 9))
    q = rng.normal(size=(M, 4, D)).astype(np.float32)
    heads, rows = P("rows", "heads"), P("rows")
    specs = (heads, [CachePart(k=heads, v=heads, visible=rows)] * 2)
    split = jax.jit(
        jax.shard_map(
            functools.partial(branch_decode, implementation=implementation), mesh=mesh, in_specs=specs, out_specs=heads
        )
    )
    dense = [dataclasses.replace(part, visible=mask_of(part.visible, 9)), own]
    np.testing.assert_allclose(split(q, [part, own]), oracle(q, dense), atol=2e-6)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="pip install 'tto-jax[tpu]'")
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_tpus(topology):
    """On 2 x 2 chips, rows by heads, a trunk that 16 branches share, and their own caches: Mosaic takes it, no cache
    is copied.
    """
    mesh = compile_tpu.describe(topology, 1, (2, 1, 2)).mesh
    heads, rows = P("data", "tensor"), P("data")

    def shape(dtype, spec, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def part(number, capacity):
        k, v = (shape(jnp.bfloat16, heads, number, 4, *sizes) for sizes in ((128, capacity), (capacity, 128)))
        seen = shape(jnp.int32, rows, number, 128 // number)
        return CachePart(k=k, v=v, visible=Interval(begin=seen, end=seen))

    specs = (heads, [CachePart(k=heads, v=heads, visible=rows)] * 2)
    split = jax.shard_map(pallas_tpu.branch_decode, mesh=mesh, in_specs=specs, out_specs=heads)
    arguments = shape(jnp.bfloat16, heads, 128, 24, 128), [part(8, 32_768), part(128, 128)]
    memory = jax.jit(split).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * memory.argument_size_in_bytes


def test_a_platform_has_a_default():
    assert {choose(platform) for platform in ("cpu", "tpu", "gpu", "cuda")} <= set(IMPLEMENTATIONS)
    with pytest.raises(ValueError, match="platform='abacus'"):
        choose("abacus")


def test_misuse_is_refused():
    q, parts = random_parts(2)
    with pytest.raises(ValueError, match=r"implementation='paged' is unknown: choose one of \('blocked', "):
        branch_decode(q, parts, "paged")
    for bad in (q[:9], q[:, :3], q[..., :2]):
        with pytest.raises(ValueError, match="rows must divide the queries"):
            branch_decode(bad, parts)
    with pytest.raises(ValueError, match="KV heads: they must have the same number"):
        branch_decode(q, [parts[0], random_part(np.random.default_rng(0), 4, 1, 5)])
    for bad in (parts[0].v, parts[0].k[None], parts[0].k[..., None], parts[0].k[0]):
        with pytest.raises(ValueError, match=r"k must be \[R,K,D,C\], or \[R,K,C/T,D,T\] in tiles"):
            branch_decode(q, [dataclasses.replace(parts[0], k=bad)])
    with pytest.raises(ValueError, match="at least one part"):
        branch_decode(q, [])


def test_what_the_kernel_does_not_take_is_refused():
    q, parts = random_parts(2)
    with pytest.raises(ValueError, match="not as a mask"):
        branch_decode(q, parts, "pallas_tpu")
    all_of = lambda part: dataclasses.replace(part, visible=Interval(begin=0, end=3))  # noqa: E731
    tiles = dataclasses.replace(all_of(parts[0]), k=parts[0].k[:, :, None])
    with pytest.raises(ValueError, match="not in tiles"):
        branch_decode(q, [tiles], "pallas_tpu")
    with pytest.raises(ValueError, match="one dtype of"):
        branch_decode(q.astype(np.float16), [all_of(part) for part in parts], "pallas_tpu")
    with pytest.raises(ValueError, match=r"capacity=600: above 512 slots it must be a multiple of 128"):
        branch_decode(q, [all_of(random_part(np.random.default_rng(0), 4, 2, 600))], "pallas_tpu")
