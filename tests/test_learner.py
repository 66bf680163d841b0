"""The update on a tiny model: gradients against plain formulas, what a bad batch may not touch, and what compiles."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tto_jax import learner, rollout
from tto_jax.core import token_tree
from tto_jax.core.budgets import BudgetSchedule, block_mask, forks_at_budgets
from tto_jax.core.types import Answers, Credit, Prompts, Traces
from tto_jax.learner import LossConfig, OptimizerConfig
from tto_jax.models import decoder
from tto_jax.models.config import ModelConfig
from tto_jax.rollout import RolloutConfig

B, G, S, A, P, C, E = 4, 2, 2, 2, 4, 6, 4
N = B * G
VOCABULARY = 17
MODEL = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_size=16,
    max_position=32,
)
LOSS = LossConfig(
    num_targets=C + S * A * 3,
    num_states=token_tree.num_states(P, C, S, A, E, False),
    constant=50.0,
    temperature=0.8,
    clip_low=0.2,
    clip_high=0.3,
)
# These programs run a few times at most: compiling them dominates.
UNOPTIMIZED = {"xla_backend_optimization_level": 0}
ADAM = OptimizerConfig(learning_rate=1e-2, grad_clip=1e6, weight_decay=0.1)


@functools.cache
def host_params():
    rng = np.random.default_rng(0)
    like = jax.eval_shape(lambda: decoder.init_params(MODEL, 0))
    return jax.tree.map(lambda x: (0.35 * rng.normal(size=x.shape) + (x.ndim == 1)).astype(np.float32), like)


def fresh_params():
    """Buffers of their own: a step donates them."""
    return jax.tree.map(jnp.array, host_params())


def fresh_state(optimizer=ADAM):
    return learner.init_state(fresh_params(), optimizer)


@functools.cache
def random_rows(seed=0):
    """Packed rows of a random rollout: sampler, old and reference log-probs are three different things."""
    rng = np.random.default_rng(seed)
    length = np.asarray([C, 0, *rng.integers(1, C + 1, N - 2)], np.int32)
    forks = np.asarray(forks_at_budgets(length, BudgetSchedule.from_prior((2, C))))
    forced = rng.integers(1, 3, (N, S)).astype(np.int32)
    sampled = rng.integers(1, E - 1, (N, S, A))
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    tokens = lambda *shape: rng.integers(VOCABULARY, size=shape).astype(np.int32)  # noqa: E731
    rows = pack(
        Prompts(tokens=tokens(B, P), length=rng.integers(1, P + 1, B), id=np.arange(B, dtype=np.uint32)),
        Traces(tokens=tokens(N, C), logprob=draw(N, C), length=length, ended=np.ones(N, bool), eos=np.zeros(N, bool)),
        Answers(
            tokens=tokens(N, S, A, E),
            logprob=draw(N, S, A, E),
            length=(forced[..., None] + sampled).astype(np.int32),
            forced=forced,
            ended=np.ones((N, S, A), bool),
        ),
        forks,
        Credit(
            trace_advantage=draw(B, G, S),
            answer_advantage=draw(B, G, S, A),
            block_mask=np.asarray(block_mask(forks)).reshape(B, G, S),
        ),
        np.ones(S, np.float32),
    )
    current, _ = learner.score_logprobs(MODEL, LOSS, host_params(), rows)
    shift = lambda spread: (rng.normal(size=rows.tokens.shape) * spread).astype(np.float32)  # noqa: E731
    mask = np.asarray(rows.loss_mask)
    return dataclasses.replace(
        rows,
        old_logprob=np.where(mask, current + shift(0.3), 0.0).astype(np.float32),
        ref_logprob=np.where(mask, current + shift(0.4), 0.0).astype(np.float32),
    )


pack = jax.jit(token_tree.pack)


def plain_logprobs(params, rows):
    """Log-prob of every token of the rows from all logits at once: [N, L]."""
    hidden = decoder.forward_rows(MODEL, params, rows)
    table = jax.nn.log_softmax(decoder.logits(MODEL, params, hidden) / LOSS.temperature)
    table = jnp.take_along_axis(table, rows.source[..., None], axis=1)
    return jnp.take_along_axis(table, rows.tokens[..., None], axis=-1)[..., 0]


@functools.partial(jax.jit, static_argnums=0, compiler_options=UNOPTIMIZED)
def loss_and_gradient(config, params, rows):
    return jax.value_and_grad(lambda params: learner.loss(MODEL, config, params, rows), has_aux=True)(params)


def assert_close(actual, expected, relative):
    """Leaf by leaf, relative to the largest entry."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * max(float(np.abs(b).max()), 1e-8))


def assert_bitwise(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def adam(tree):
    """Optax's state with the first and second moments."""
    found = []
    jax.tree.map(
        lambda node: found.append(node) if hasattr(node, "mu") else None,
        tree,
        is_leaf=lambda node: hasattr(node, "mu"),
    )
    (moments,) = found
    return moments


def masked(values, rows):
    return np.asarray(values, np.float64)[np.asarray(rows.loss_mask)]


# The loss.


def test_entropy_and_logprobs_of_trained_tokens_only():
    rows = random_rows()
    logprob, entropy = learner.score_logprobs(MODEL, LOSS, host_params(), rows)
    mask = np.asarray(rows.loss_mask)
    assert mask.any() and not np.asarray(logprob)[~mask].any() and not np.asarray(entropy)[~mask].any()
    expected = jax.jit(plain_logprobs, compiler_options=UNOPTIMIZED)(host_params(), rows)
    np.testing.assert_allclose(masked(logprob, rows), masked(expected, rows), atol=1e-5)
    assert (masked(entropy, rows) > 0).all() and masked(entropy, rows).max() < np.log(VOCABULARY)


def test_loss_and_its_metrics_equal_loops():
    rows = random_rows()
    old, advantage, branch = (np.asarray(x) for x in (rows.old_logprob, rows.advantage, rows.branch))
    current = np.asarray(learner.score_logprobs(MODEL, LOSS, host_params(), rows)[0], np.float64)
    total, clipped, ratios, shares = 0.0, 0, [1.0], [0.0, 0.0]
    for at in map(tuple, np.argwhere(rows.loss_mask)):
        ratio = np.exp(current[at] - old[at])
        total -= min(ratio * advantage[at], min(max(ratio, 0.8), 1.3) * advantage[at]) / LOSS.constant
        clipped += (advantage[at] > 0 and ratio > 1.3) or (advantage[at] < 0 and ratio < 0.8)
        ratios.append(ratio)
        shares[int(branch[at] > 0)] += abs(advantage[at])
    state, metrics = learner.train_step(MODEL, LOSS, ADAM, fresh_state(), rows)
    assert clipped > 5
    assert metrics["loss/total"] == pytest.approx(total, rel=1e-4)
    assert metrics["loss/clip_fraction"] == pytest.approx(clipped / (len(ratios) - 1), rel=1e-5)
    assert metrics["loss/ratio_min"] == pytest.approx(min(ratios), rel=1e-4)
    assert metrics["loss/ratio_max"] == pytest.approx(max(ratios), rel=1e-4)
    assert metrics["loss/share_thinking"] == pytest.approx(shares[0] / sum(shares), rel=1e-4)
    assert metrics["loss/share_answers"] == pytest.approx(shares[1] / sum(shares), rel=1e-4)
    k3 = np.mean([1 / ratio - 1 + np.log(ratio) for ratio in ratios[1:]])
    assert metrics["loss/kl_old"] == pytest.approx(k3, rel=1e-3)
    assert int(state.step) == 1 and int(metrics["update/skipped"]) == 0


def test_gradient_at_ratio_one_is_reinforce():
    rows = random_rows()
    current, _ = learner.score_logprobs(MODEL, LOSS, host_params(), rows)
    rows = dataclasses.replace(rows, old_logprob=current)
    _, actual = loss_and_gradient(LOSS, host_params(), rows)
    expected = weighted_gradient(-np.where(rows.loss_mask, rows.advantage, 0.0) / LOSS.constant, host_params(), rows)
    assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(expected))
    assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_to_the_reference(kind):
    """The loss grows by weight * sum of the estimate / constant; the gradient by its slope in the log-prob (of k3)."""
    rows, weight = random_rows(), 0.7
    rows = dataclasses.replace(rows, advantage=jnp.zeros_like(rows.advantage))
    config = dataclasses.replace(LOSS, kl=weight, kl_estimator=kind)
    value, _ = jax.jit(learner.loss, static_argnums=(0, 1), compiler_options=UNOPTIMIZED)(
        MODEL, config, host_params(), rows
    )
    current = np.asarray(learner.score_logprobs(MODEL, LOSS, host_params(), rows)[0], np.float64)
    total, slope = 0.0, np.zeros(current.shape)
    for at in map(tuple, np.argwhere(rows.loss_mask)):
        gap = current[at] - float(rows.ref_logprob[at])
        total += {"k1": gap, "k2": gap**2 / 2, "k3": np.exp(-gap) - 1 + gap}[kind]
        slope[at] = 1 - np.exp(-gap)
    assert float(value) == pytest.approx(weight * total / LOSS.constant, rel=1e-4, abs=1e-6)
    if kind == "k3":
        _, actual = loss_and_gradient(config, host_params(), rows)
        expected = weighted_gradient(slope.astype(np.float32) * weight / LOSS.constant, host_params(), rows)
        assert_close(actual, expected, 5e-5)


@functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
def weighted_gradient(weights, params, rows):
    """Of sum(weight * log-prob), from all logits at once."""
    return jax.grad(lambda params: jnp.sum(weights * plain_logprobs(params, rows)))(params)


def test_what_stands_beside_untrained_tokens_changes_nothing():
    """Log-probs and advantages of tokens outside the loss mask may be anything: no ratio of theirs overflows."""
    rows = random_rows()
    anything = {"old_logprob": -500.0, "ref_logprob": 500.0, "advantage": 1e30}
    other = {name: jnp.where(rows.loss_mask, getattr(rows, name), value) for name, value in anything.items()}
    config = dataclasses.replace(LOSS, kl=0.7)
    results = [loss_and_gradient(config, host_params(), x) for x in (rows, dataclasses.replace(rows, **other))]
    assert_bitwise(*results)


# The step.


@functools.cache
def moment_and_metrics(config):
    """The first moment, a tenth of the gradient."""
    state, metrics = learner.train_step(MODEL, config, ADAM, fresh_state(), random_rows())
    return jax.device_get((adam(state).mu, metrics))


@pytest.mark.parametrize(("number", "tokens"), [(1, 3 * 26), (3, 1), (3, 50)])
def test_buckets_and_micro_batches_change_nothing(number, tokens):
    """The gradient is that of the whole minibatch at once, whatever the rows' lengths and those of a micro-batch."""
    config = dataclasses.replace(LOSS, buckets=number, micro_tokens=tokens)
    (moment, metrics), (whole, whole_metrics) = moment_and_metrics(config), moment_and_metrics(LOSS)
    assert all(np.abs(x).max() > 1e-6 for x in jax.tree.leaves(whole))
    assert_close(moment, whole, 5e-6)  # of each array: float32 sums in another order
    one, other = (np.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (moment, whole))
    assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(other)
    padding = metrics.keys() & {"update/padding_share"}
    assert_close(*({k: x for k, x in found.items() if k not in padding} for found in (metrics, whole_metrics)), 1e-5)
    real = (np.asarray(random_rows().tree) >= 0).sum(axis=1)
    for found, options in ((metrics, config), (whole_metrics, LOSS)):
        share = 1 - real.sum() / computed_tokens(options, real)
        assert found["update/padding_share"] == pytest.approx(share, abs=1e-6)


def test_log_probs_of_buckets_lie_where_the_tokens_were():
    config = dataclasses.replace(LOSS, buckets=3, micro_tokens=50)
    for one, other in zip(*(learner.score_logprobs(MODEL, x, host_params(), random_rows()) for x in (config, LOSS))):
        np.testing.assert_allclose(one, other, atol=2e-6)


def computed_tokens(config, real):
    """By a loop over the sorted rows of one part."""
    left, found, lengths = sorted(real, reverse=True), 0, config.lengths
    for length, shorter in zip(lengths, (*lengths[1:], -1)):
        most = max(config.micro_tokens // length, 1) if config.micro_tokens else len(real)
        most = math.ceil(len(real) / math.ceil(len(real) / most))
        while left and left[0] > shorter:
            assert left[0] <= length
            left, found = left[most:], found + most * length
    assert not left
    return found


def test_the_rows_reach_every_bucket():
    """What the test above rests on."""
    lengths = dataclasses.replace(LOSS, buckets=3).lengths
    real = (np.asarray(random_rows().tree) >= 0).sum(axis=1)
    assert lengths == (26, 24, 16) and len(set(np.digitize(real, lengths[::-1], right=True))) > 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(value):
    rows = random_rows()
    at = tuple(np.argwhere(rows.loss_mask)[3])
    bad = dataclasses.replace(rows, advantage=rows.advantage.at[at].set(value))
    warm, _ = learner.train_step(MODEL, LOSS, ADAM, fresh_state(), rows)
    before = jax.device_get((warm.params, adam(warm)))
    state, metrics = learner.train_step(MODEL, LOSS, ADAM, warm, bad)
    assert not np.isfinite(metrics["update/grad_norm"]) and int(metrics["update/skipped"]) == 1
    assert int(state.step) == 2
    assert_bitwise((state.params, adam(state)), before)

    # The next finite step goes on as if nothing had been; the counter stays.
    state, metrics = learner.train_step(MODEL, LOSS, ADAM, state, rows)
    assert int(metrics["update/skipped"]) == 1 and np.isfinite(metrics["update/grad_norm"]) and int(state.step) == 3
    straight, _ = learner.train_step(MODEL, LOSS, ADAM, fresh_state(), rows)
    straight, _ = learner.train_step(MODEL, LOSS, ADAM, straight, rows)
    assert_bitwise((state.params, adam(state)), (straight.params, adam(straight)))


def test_the_gradient_is_clipped_by_its_global_norm():
    rows = random_rows()
    free, metrics = learner.train_step(MODEL, LOSS, ADAM, fresh_state(), rows)
    norm = float(metrics["update/grad_norm"])
    gradient = jax.tree.map(lambda x: np.asarray(x) / (1 - ADAM.b1), adam(free).mu)
    assert norm == pytest.approx(
        np.sqrt(sum((x.astype(float) ** 2).sum() for x in jax.tree.leaves(gradient))), rel=1e-4
    )
    optimizer = learner.make_optimizer(dataclasses.replace(ADAM, grad_clip=norm / 7))
    _, opt_state = jax.jit(optimizer.update)(gradient, optimizer.init(host_params()), host_params())
    assert_close(adam(opt_state).mu, jax.tree.map(lambda x: x / 7 * (1 - ADAM.b1), gradient), 1e-5)


def test_one_step_is_adamw():
    """From the gradient in the first moment: rate * (g / (|g| + eps) + decay * parameter), by its equation."""
    state, _ = learner.train_step(MODEL, LOSS, ADAM, fresh_state(), random_rows())
    for new, old, mu in zip(*map(jax.tree.leaves, (state.params, host_params(), adam(state).mu))):
        g = np.asarray(mu, np.float64) / (1 - ADAM.b1)
        expected = old - ADAM.learning_rate * (g / (np.abs(g) + 1e-8) + ADAM.weight_decay * old)
        np.testing.assert_allclose(new, expected, atol=3e-6)
        assert new.dtype == mu.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"warmup_steps": 2}, [0.5, 0.75, 1, 1, 1, 1]),
        ({"schedule": "cosine", "warmup_steps": 2, "decay_steps": 6}, [0, 0.5, 1, 0.853553, 0.5, 0.146447]),
    ],
    ids=["constant", "warm-up", "cosine"],
)
def test_learning_rates(options, expected):
    """A constant gradient moves a parameter by the rate of the step, under Adam."""
    optimizer = learner.make_optimizer(OptimizerConfig(learning_rate=0.1, **options))
    params = {"x": jnp.asarray([0.2, -0.1])}
    state, gradient, rates = optimizer.init(params), {"x": jnp.asarray([0.3, -0.4])}, []
    update = jax.jit(optimizer.update)
    for _ in expected:
        updates, state = update(gradient, state, params)
        rates.append(float(-updates["x"][0]) / 0.1)
    np.testing.assert_allclose(rates, expected, atol=2e-3)


def test_supervised_step_is_maximum_likelihood():
    rng = np.random.default_rng(3)
    tokens = rng.integers(VOCABULARY, size=(N, 9)).astype(np.int32)
    length = rng.integers(4, 10, N)
    mask = (np.arange(9) >= 2) & (np.arange(9) < length[:, None])
    rows = token_tree.sequences(tokens, length, mask)
    config = LossConfig(num_targets=8, num_states=8, constant=1.0, temperature=LOSS.temperature, micro_tokens=16)
    state, values = fresh_state(), []
    for step in range(8):
        state, metrics = learner.supervised_step(MODEL, config, ADAM, state, rows)
        if step == 0:
            gradient = weighted_gradient(-mask.astype(np.float32) / mask.sum(), host_params(), rows)
            assert_close(adam(state).mu, jax.tree.map(lambda x: x * (1 - ADAM.b1), gradient), 2e-5)
        values.append(float(metrics["loss/total"]))
    expected = -np.asarray(jax.jit(plain_logprobs)(host_params(), rows))[mask].mean()
    assert values[0] == pytest.approx(expected, rel=1e-5), "one mean over all micro-batches"
    assert (np.diff(values) < 0).all() and values[-1] < 0.8 * values[0]


def test_the_state_is_donated():
    state = fresh_state()
    new, _ = learner.train_step(MODEL, LOSS, ADAM, state, random_rows())
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, adam(state))))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), jax.eval_shape(fresh_state)
    )


def test_minibatches_are_consecutive_and_cover_the_rows():
    rows = random_rows()
    parts = [learner.minibatch(rows, 4, jnp.int32(index)) for index in range(4)]
    assert_bitwise(jax.tree.map(lambda *x: np.concatenate(x), *parts), rows)


# What compiles.


def test_later_steps_compile_nothing():
    """One warm-up step compiles; later ones, from the state it returned and with new data, do not."""
    compiled = []
    listener = lambda name, _seconds, **_: compiled.append(name)  # noqa: E731
    config = RolloutConfig(
        group_size=G,
        trace_pad=C,
        answers=A,
        answer_cap=2,
        think_end=1,
        eos=2,
        elicit_ended=(3,),
        elicit_cut=(3, 4),
        segment=4,
    )
    schedule = BudgetSchedule.from_prior((2, C))
    cut = jax.jit(forks_at_budgets)

    def one_step(state, step):
        rng = np.random.default_rng(step)
        prompts = Prompts(
            tokens=rng.integers(VOCABULARY, size=(B, P)).astype(np.int32),
            length=rng.integers(1, P + 1, B).astype(np.int32),
            id=rng.integers(2**32, size=B, dtype=np.uint32),
        )
        prompts = jax.device_put(prompts)
        key = jax.random.fold_in(jax.random.key(0), step)
        traces, trunk = rollout.sample_traces(MODEL, config, state.params, prompts, key)
        forks = cut(traces.length, schedule)
        answers = rollout.sample_answers(MODEL, config, state.params, trunk, traces, forks, key)
        credit = Credit(
            trace_advantage=rng.normal(size=(B, G, S)).astype(np.float32),
            answer_advantage=rng.normal(size=(B, G, S, A)).astype(np.float32),
            block_mask=np.ones((B, G, S), bool),
        )
        rows = pack(prompts, traces, answers, forks, credit, np.ones(S, np.float32))
        old, _ = learner.score_logprobs(MODEL, LOSS, state.params, rows)
        rows = dataclasses.replace(rows, old_logprob=old)
        rows = learner.minibatch(rows, 1, jnp.int32(0))
        state, metrics = learner.train_step(MODEL, LOSS, ADAM, state, rows)
        return state, jax.device_get(metrics)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        state, _ = one_step(fresh_state(), 0)
        assert any("compile" in name for name in compiled), f"the listener hears no compilation, only {set(compiled)}"
        compiled.clear()
        for step in range(1, 4):
            state, metrics = one_step(state, step)
            assert np.isfinite(metrics["loss/total"])
        assert not [name for name in compiled if "compile" in name or "trac" in name]
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: dataclasses.replace(LOSS, kl_estimator="k4"), r"'k4' is unknown: choose one of \('k1', 'k2', 'k3'\)"),
        (lambda: dataclasses.replace(LOSS, clip_low=1.1), r"clip_low=1\.1"),
        (lambda: dataclasses.replace(LOSS, clip_low=-0.1), r"clip_low=-0\.1"),
        (lambda: dataclasses.replace(LOSS, clip_high=-0.1), r"clip_high=-0\.1"),
        (lambda: dataclasses.replace(LOSS, constant=0.0), r"constant=0\.0"),
        (lambda: dataclasses.replace(LOSS, constant=float("nan")), "constant=nan"),
        (
            lambda: dataclasses.replace(ADAM, schedule="step"),
            r"'step' is unknown: choose one of \('constant', 'cosine'\)",
        ),
        (lambda: dataclasses.replace(ADAM, learning_rate=0.0), r"learning_rate=0\.0"),
        (lambda: dataclasses.replace(LOSS, kl=-0.1), r"kl=-0\.1"),
        (lambda: dataclasses.replace(ADAM, learning_rate=float("inf")), "learning_rate=inf"),
        (lambda: dataclasses.replace(ADAM, b2=1.0), r"b2=1\.0"),
        (lambda: dataclasses.replace(ADAM, grad_clip=-1.0), r"grad_clip=-1\.0"),
        (lambda: dataclasses.replace(ADAM, schedule="cosine", warmup_steps=5, decay_steps=5), "decay_steps=5"),
    ],
)
def test_configurations_that_cannot_work_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
