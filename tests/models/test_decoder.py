"""The decoder against loops in NumPy, cached decoding against whole rows, and what its options may not change."""

import dataclasses
import functools

import decoder_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tto_jax import sharding
from tto_jax.core import token_tree
from tto_jax.kernels.branch_decode import Interval
from tto_jax.kernels.branch_decode.parts import untiled
from tto_jax.models import decoder, decoding
from tto_jax.models.cache import Cache, Context
from tto_jax.models.config import ModelConfig

# Sizes all differ, so that no axis can stand in for another; eps and theta are large enough to be seen.
LLAMA = ModelConfig(
    vocab_size=23,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_size=20,
    max_position=64,
    rope_theta=50.0,
    norm_eps=0.03,
)
QWEN2 = dataclasses.replace(LLAMA, attention_bias=True, num_kv_heads=1)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, tie_embeddings=False, num_layers=3)
ALL = dataclasses.replace(
    LLAMA, attention_bias=True, qk_norm=True, tie_embeddings=False, learned_positions=True, num_kv_heads=4
)
FAMILIES = {"llama-tied-2of4": LLAMA, "qwen2-tied-1of4": QWEN2, "qwen3-untied-2of4": QWEN3, "all-untied-4of4": ALL}
LENGTH = 9
# These programs run a few times at most: compiling them dominates.
UNOPTIMIZED = {"xla_backend_optimization_level": 0}


@functools.cache
def random_params(config, seed=0):
    """Every parameter random: no norm scale is 1 and no bias is 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "scale":
            return rng.uniform(0.4, 1.8, leaf.shape) * rng.choice([-1, 1], leaf.shape)
        spread = {"bias": 0.5, "embedding": 0.7, "kernel": 1.3 * leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0}[name]
        return spread * rng.normal(size=leaf.shape)

    like = jax.eval_shape(lambda: decoder.init_params(config, 0))
    drawn = jax.tree_util.tree_map_with_path(draw, like)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn)


def random_tokens(config, shape=(2, LENGTH), seed=1):
    return np.random.default_rng(seed).integers(config.vocab_size, size=shape).astype(np.int32)


def plain_rows(tokens, length=None):
    length = np.full(len(tokens), tokens.shape[1]) if length is None else np.asarray(length)
    return token_tree.sequences(tokens, length, np.zeros(tokens.shape, bool))


@functools.partial(jax.jit, static_argnums=0, compiler_options=UNOPTIMIZED)
def row_logits(config, params, rows):
    hidden = decoder.forward_rows(config, params, rows)
    return hidden, decoder.logits(config, params, hidden)


@functools.partial(jax.jit, static_argnums=0, compiler_options=UNOPTIMIZED)
def decode(config, params, tokens, position, context=()):
    return decoding.decode(config, decoding.arrange(config, params), tokens, position, context)


write = jax.jit(Cache.write)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_the_numpy_oracle(name):
    config = FAMILIES[name]
    params, tokens = random_params(config), random_tokens(config)
    _, actual = row_logits(config, params, plain_rows(tokens))
    assert actual.dtype == jnp.float32
    for row, sequence in zip(actual, tokens):
        expected = decoder_oracle.logits(config, params, sequence)
        assert expected.std() > 0.5
        np.testing.assert_allclose(row, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_then_token_by_token_equals_whole_rows(name):
    """Prefill 4 tokens, then one at a time, in a cache with room to spare that holds other things."""
    config = FAMILIES[name]
    params, tokens = random_params(config), random_tokens(config)
    expected, _ = row_logits(config, params, plain_rows(tokens))
    rows, prefill = len(tokens), 4
    cache = jax.tree.map(lambda x: x + 7.0, Cache.empty(config, rows, LENGTH + 3))
    position = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    found = []
    for begin, end in [(0, prefill)] + [(t, t + 1) for t in range(prefill, LENGTH)]:
        span, ends = slice(begin, end), np.full((rows, 1), begin, np.int32)
        seen = Interval(begin=np.zeros_like(ends), end=np.broadcast_to(ends, (rows, end - begin)))
        context = (Context(cache=cache, visible=seen),)
        hidden, new = decode(config, params, tokens[:, span], position[:, span], context)
        cache = write(cache, jnp.int32(begin), new)
        found.append(hidden)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=5e-6)
    untouched = [np.asarray(x[..., LENGTH:]) for x in cache.k] + [np.asarray(x[:, :, LENGTH:]) for x in cache.v]
    assert len(untouched) == 2 * config.num_layers and all((x == 7.0).all() for x in untouched)


def test_rows_share_finished_caches():
    """Two prompts, each continued by three rows of two tokens at once: the prompts' cache has a row a prompt."""
    config, prompt, tail, number = QWEN3, 4, 2, 3
    params = random_params(config)
    prompts, tails = random_tokens(config, (2, prompt)), random_tokens(config, (2 * number, tail), seed=2)
    length = np.asarray([prompt, prompt - 1], np.int32)
    position = np.broadcast_to(np.arange(prompt, dtype=np.int32), prompts.shape)
    _, shared = decode(config, params, prompts, position)
    seen = np.broadcast_to((np.arange(prompt) < length[:, None])[:, None], (2, number * tail, prompt))
    begin = np.repeat(length, number)[:, None]
    context = (Context(cache=shared, visible=seen),)
    hidden, cache = decode(config, params, tails, begin + np.arange(tail, dtype=np.int32), context)
    assert (cache.rows, cache.capacity) == (2 * number, tail)
    joined = np.zeros((2 * number, prompt + tail), np.int32)
    for row in range(2 * number):
        joined[row, : begin[row, 0] + tail] = [*prompts[row // number, : begin[row, 0]], *tails[row]]
    expected, _ = row_logits(config, params, plain_rows(joined, begin[:, 0] + tail))
    for row in range(2 * number):
        np.testing.assert_allclose(hidden[row], expected[row, begin[row, 0] : begin[row, 0] + tail], atol=5e-6)


@pytest.mark.parametrize("tile", [0, 2])
def test_blocks_go_to_places_of_their_own(tile):
    """Row by row: block 1, none, block 0; then block 2 of all rows. Everything else keeps its values."""
    config = ALL
    old = jax.tree.map(lambda x: x + 7.0, Cache.empty(config, 3, 8, tile))
    new = jax.tree.map(lambda x: x + jnp.arange(1.0, 4.0).reshape(3, 1, 1, 1), Cache.empty(config, 3, 2))
    found = write(jax.jit(Cache.write_blocks)(old, np.asarray([1, -1, 0]), new), jnp.int32(4), new)
    expected = np.full((3, 8), 7.0)
    expected[0, 2:4], expected[2, :2] = 1.0, 3.0
    expected[:, 4:6] = [[1.0], [2.0], [3.0]]
    assert found.capacity == 8 and found.k[0].ndim == (5 if tile else 4)
    for cache in (found, found.first(6)):
        for k, v in zip(map(untiled, cache.k), cache.v, strict=True):
            np.testing.assert_array_equal(k, np.broadcast_to(expected[:, None, None, : cache.capacity], k.shape))
            np.testing.assert_array_equal(v, np.broadcast_to(expected[:, None, : cache.capacity, None], v.shape))


def test_arranged_weights_are_arranged_once():
    """In the compute dtype, layer by layer, [out, in]; what is arranged stays, to the object."""
    config = dataclasses.replace(ALL, dtype="bfloat16")
    params = random_params(config)
    weights = decoding.arrange(config, params)
    assert decoding.arrange(config, weights) is weights
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(weights)) and len(weights.layers) == config.num_layers
    gate = params["layers"]["gate"]["kernel"][1].T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(weights.layers[1]["gate"]["kernel"], gate)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)], ids=str)
def test_arranged_weights_lie_as_the_table_says(shape):
    """Split over `tensor` along the dimension that the table names, whole along `fsdp`; few KV heads are whole."""
    mesh = sharding.make_mesh(shape)
    config = dataclasses.replace(ALL, num_heads=8, num_kv_heads=2, vocab_size=24, hidden_size=16, mlp_size=32)
    with jax.set_mesh(mesh):
        found = decoding.shardings(mesh, config)
    attention, kv = found.layers[2 - 1]["attention"], ("tensor",) if shape[2] == 2 else ()
    for name, spec in (("q", ("tensor", None)), ("out", (None, "tensor")), ("k", (*kv, *[None] * len(kv)))):
        expected = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert attention[name]["kernel"].is_equivalent_to(expected, 2), name
    assert found.embed.spec[0] == found.head.spec[0] == "tensor" and not any(found.norm.spec)


def test_a_token_changes_nothing_before_it_and_everything_after():
    config = ALL
    params, tokens = random_params(config), random_tokens(config)
    base, _ = row_logits(config, params, plain_rows(tokens))
    for t in range(LENGTH):
        changed = tokens.copy()
        changed[:, t] = (changed[:, t] + 1) % config.vocab_size
        other, _ = row_logits(config, params, plain_rows(changed))
        np.testing.assert_array_equal(other[:, :t], base[:, :t])
        assert (np.abs(other - base).max(axis=-1)[:, t:] > 1e-4).all()


def test_padding_changes_nothing():
    config = LLAMA
    params, tokens = random_params(config), random_tokens(config)
    length = np.asarray([LENGTH, 4])
    base, _ = row_logits(config, params, plain_rows(tokens, length))
    garbage = np.where(np.arange(LENGTH) < length[:, None], tokens, (tokens + 5) % config.vocab_size)
    other, _ = row_logits(config, params, plain_rows(garbage, length))
    for row, end in enumerate(length):
        np.testing.assert_array_equal(other[row, :end], base[row, :end])
    assert np.isfinite(other).all()


def summed_loss(config, params, rows, weights):
    hidden = decoder.forward_rows(config, params, rows)
    return jnp.sum(weights * jax.nn.log_softmax(decoder.logits(config, params, hidden)))


def test_remat_changes_neither_values_nor_gradients():
    rows = plain_rows(random_tokens(ALL))
    weights = np.random.default_rng(3).normal(size=(*rows.tokens.shape, ALL.vocab_size)).astype(np.float32)
    params = random_params(ALL)
    results = {}
    for remat in ("none", "dots", "attention", "full"):
        config = dataclasses.replace(ALL, remat=remat)
        function = functools.partial(summed_loss, config)
        traced = str(jax.make_jaxpr(function)(params, rows, weights))
        assert ("remat2[" in traced, "policy=None" in traced) == (remat != "none", remat == "full")
        results[remat] = jax.jit(jax.value_and_grad(function), compiler_options=UNOPTIMIZED)(params, rows, weights)
    value, gradient = results["none"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 1e-3, f"no gradient reaches {jax.tree_util.keystr(path)}"
    for remat in ("dots", "full"):
        other_value, other = results[remat]
        np.testing.assert_allclose(other_value, value, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(gradient)):
            np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()))


def test_a_vocabulary_that_the_devices_do_not_divide():
    """23 tied tokens on 4 devices: logits and gradients are those of one, in arrays of their true shapes."""
    mesh, rows = sharding.make_mesh((2, 1, 4)), plain_rows(random_tokens(QWEN2))
    config = dataclasses.replace(QWEN2, kv_copies=sharding.kv_copies(4, 1, mesh))
    weights = np.random.default_rng(3).normal(size=(*rows.tokens.shape, 23)).astype(np.float32)

    def everything(config, params, rows, weights):
        padded = decoder.pad_vocabulary(params)
        gradient = jax.grad(functools.partial(summed_loss, config))(params, rows, weights)
        logits = [row_logits.__wrapped__(config, x, rows)[1] for x in (params, padded)]
        return *logits, gradient, padded

    jitted = jax.jit(everything, static_argnums=0, compiler_options=UNOPTIMIZED)
    logits, _, gradient, untouched = jitted(QWEN2, random_params(QWEN2), rows, weights)
    assert untouched["embed"]["embedding"].shape == (23, 16)
    with jax.set_mesh(mesh):
        placed = sharding.place(mesh, random_params(QWEN2), 1)
        *many, many_gradient, padded = jitted(config, placed, sharding.put_rows(rows), sharding.put_rows(weights))
    assert padded["embed"]["embedding"].shape == (24, 16) and not padded["embed"]["embedding"][23:].any()
    for found in many:
        np.testing.assert_allclose(found, logits, atol=1e-5)
    for a, b in zip(jax.tree.leaves(many_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()))


def test_bfloat16_is_close_to_float32():
    """8 bits of mantissa through 2 layers: logits within a tenth of their spread, log-probs within 0.06 on average."""
    config = ALL
    low = dataclasses.replace(config, dtype="bfloat16")
    params, rows = random_params(config), plain_rows(random_tokens(config))
    hidden, exact = row_logits(config, params, rows)
    low_hidden, rounded = row_logits(low, params, rows)
    assert hidden.dtype == jnp.float32 and low_hidden.dtype == jnp.bfloat16 and rounded.dtype == jnp.float32
    gap = np.abs(np.asarray(rounded) - np.asarray(exact))
    assert 1e-3 < gap.max() < 0.1 * np.std(exact)
    logprob_gap = jax.nn.log_softmax(rounded) - jax.nn.log_softmax(exact)
    assert float(jnp.abs(logprob_gap).mean()) < 0.06


def test_initial_parameters():
    config = dataclasses.replace(LLAMA, dtype="bfloat16")
    params = decoder.init_params(config, 0)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    kernel = np.asarray(params["layers"]["gate"]["kernel"])
    assert kernel.shape == (2, config.hidden_size, config.mlp_size)
    assert not np.array_equal(kernel[0], kernel[1])
    assert decoder.head(config, params).shape == (config.hidden_size, config.vocab_size)
    programs = [str(jax.make_jaxpr(lambda seed=seed: decoder.init_params(config, seed))()) for seed in (0, 0, 1)]
    assert programs[0] == programs[1] != programs[2], "the seed decides"


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("num_kv_heads", 3, r"model\.num_kv_heads=3 .* choose one of \(1, 2, 4\)"),
        ("num_kv_heads", 8, r"choose one of \(1, 2, 4\)"),
        ("head_dim", 5, r"model\.head_dim=5"),
        ("dtype", "float16", r"'float16' .*\('float32', 'bfloat16'\)"),
        ("remat", "some", r"'some' .*\('none', 'dots', 'attention', 'full'\)"),
        ("vocab_size", 0, r"model\.vocab_size=0"),
        ("hidden_size", -16, r"model\.hidden_size=-16"),
        ("num_layers", 0, r"model\.num_layers=0"),
        ("num_heads", 0, r"model\.num_heads=0"),
        ("num_kv_heads", 0, r"model\.num_kv_heads=0"),
        ("mlp_size", 0, r"model\.mlp_size=0"),
        ("rope_theta", 0.0, r"model\.rope_theta=0\.0"),
        ("norm_eps", 0.0, r"norm_eps=0\.0"),
    ],
)
def test_configurations_that_cannot_work_are_refused(option, value, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(LLAMA, **{option: value})
