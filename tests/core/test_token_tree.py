"""Packed rows against plain sequences: whatever a tree packs, its tokens get the log-probs they have on their own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tto_jax import learner
from tto_jax.core import token_tree
from tto_jax.core.types import Answers, Credit, Prompts, Traces
from tto_jax.models import decoder
from tto_jax.models.config import ModelConfig

B, G, S, A = 2, 2, 4, 2
P, C, E = 5, 7, 6  # prompt, trace and answer pads
VOCABULARY = 19
MODEL = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    mlp_size=20,
    max_position=64,
    rope_theta=50.0,
    attention_bias=True,
    learned_positions=True,  # rotary ones alone would not see all positions of a tree shifted
)
SEEDS = range(4)
# These programs run a few times at most: compiling them dominates.
UNOPTIMIZED = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass
class Case:
    """A random rollout with its credit, as numpy."""

    prompts: Prompts
    traces: Traces
    answers: Answers
    forks: np.ndarray  # i32[N,S]
    credit: Credit
    answer_weight: np.ndarray  # f32[S]

    def pack(self, one_token=False):
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return jitted_pack(one_token)(*fields)


@functools.cache
def jitted_pack(one_token):
    return jax.jit(functools.partial(token_tree.pack, one_token_answers=one_token))


@functools.cache
def params():
    """Random, and large enough that every token of the context is felt."""
    rng = np.random.default_rng(5)
    like = jax.eval_shape(lambda: decoder.init_params(MODEL, 0))
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * (0.5 if x.ndim == 2 else 0.3) + (x.ndim == 1), jnp.float32),
        like,
    )


def random_case(seed, one_token=False):
    """Prompts of any length; traces empty, early-ended and full; forks repeated and 0; 0 to 3 tokens inserted.

    Everything beyond a length is garbage: masks come from lengths.
    """
    rng = np.random.default_rng(seed)
    n = B * G
    answer_pad = 4 if one_token else E
    length = rng.permutation([0, C, *rng.integers(1, C, n - 2)])
    forks = np.sort(rng.integers(0, length[:, None] + 1, (n, S)), axis=1)
    if seed % 2:
        forks[:, -1] = length  # where budgets cut; a delimiter's last fork may be earlier
    forced = rng.permuted(np.arange(n * S).reshape(n, S) % 4, axis=1)  # 0 (nothing inserted) to 3 in every row
    cap = 1 if one_token else answer_pad - forced[..., None]
    sampled = rng.integers(0, cap + 1, (n, S, A))
    tokens = rng.integers(VOCABULARY, size=(n, S, A, answer_pad))
    inserted = np.arange(answer_pad) < forced[..., None, None]
    tokens = np.where(inserted, tokens[:, :, :1], tokens)  # the answers of a column share what was inserted
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    previous = np.concatenate([np.zeros((n, 1), int), forks[:, :-1]], axis=1)
    return Case(
        prompts=Prompts(
            tokens=rng.integers(VOCABULARY, size=(B, P)).astype(np.int32),
            length=rng.permutation([P, *rng.integers(1, P, B - 1)]).astype(np.int32),
            id=np.arange(B, dtype=np.uint32),
        ),
        traces=Traces(
            tokens=rng.integers(VOCABULARY, size=(n, C)).astype(np.int32),
            logprob=draw(n, C),
            length=length.astype(np.int32),
            ended=length < C,
            eos=np.zeros(n, bool),
        ),
        answers=Answers(
            tokens=tokens.astype(np.int32),
            logprob=draw(n, S, A, answer_pad),
            length=(forced[..., None] + sampled).astype(np.int32),
            forced=forced.astype(np.int32),
            ended=np.ones((n, S, A), bool),
        ),
        forks=forks.astype(np.int32),
        credit=Credit(
            trace_advantage=draw(B, G, S),
            answer_advantage=draw(B, G, S, A),
            block_mask=(forks > previous).reshape(B, G, S),
        ),
        answer_weight=rng.uniform(0.1, 1.0, S).astype(np.float32),
    )


@functools.partial(jax.jit, static_argnums=0, compiler_options=UNOPTIMIZED)
def all_logprobs(model, params, rows):
    hidden = decoder.forward_rows(model, params, rows)
    return jax.nn.log_softmax(decoder.logits(model, params, hidden))


def plain_logprobs(sequences, length):
    """Log-prob of every token but the first of plain sequences, each forwarded alone: a list of f32 arrays."""
    tokens = np.zeros((len(sequences), length), np.int32)
    for row, sequence in zip(tokens, sequences):
        row[: len(sequence)] = sequence
    rows = token_tree.sequences(tokens, [len(x) for x in sequences], np.zeros(tokens.shape, bool))
    table = np.asarray(all_logprobs(MODEL, params(), rows))
    return [np.asarray([table[i, t - 1, x[t]] for t in range(1, len(x))]) for i, x in enumerate(sequences)]


def expected_tokens(case, one_token=False):
    """{(row, slot): (log-prob, position, advantage, sampler's log-prob)} of every trained token."""
    answer_pad = case.answers.tokens.shape[-1]
    prompt_pad, trace_pad = case.prompts.tokens.shape[1], case.traces.tokens.shape[1]
    sequences, wanted = [], []
    for n in range(B * G):
        b, g = n // G, n % G
        prompt = list(case.prompts.tokens[b][: case.prompts.length[b]])
        trace = list(case.traces.tokens[n][: case.traces.length[n]])
        sequences.append(prompt + trace)
        places, begin = [], 0
        for s in range(S):
            for t in range(begin, case.forks[n, s]):
                facts = (case.credit.trace_advantage[b, g, s], case.traces.logprob[n, t])
                places.append((len(prompt) + t, (n, prompt_pad + t), *facts))
            begin = case.forks[n, s]
        beyond = range(begin, len(trace))  # the last fork: trained, without credit
        places += [(len(prompt) + t, (n, prompt_pad + t), 0.0, case.traces.logprob[n, t]) for t in beyond]
        wanted.append(places)
        for s in range(S):
            for a in range(A):
                forced, length = case.answers.forced[n, s], case.answers.length[n, s, a]
                before = prompt + trace[: case.forks[n, s]]
                sequences.append(before + list(case.answers.tokens[n, s, a, :length]))
                places = []
                for e in range(forced, length):
                    slot = prompt_pad + trace_pad + (s * A + a) * answer_pad + e
                    if one_token:
                        slot = prompt_pad + trace_pad + S * (answer_pad - 1) + s * A + a
                    advantage = case.credit.answer_advantage[b, g, s, a] * case.answer_weight[s]
                    places.append((len(before) + e, (n, slot), advantage, case.answers.logprob[n, s, a, e]))
                wanted.append(places)
    logprobs = plain_logprobs(sequences, prompt_pad + trace_pad + answer_pad)
    found = {}
    for logprob, places in zip(logprobs, wanted):
        for t, where, *facts in places:
            assert where not in found
            found[where] = (logprob[t - 1], t, *facts)
    return found


def loss_config(states, targets=C + S * A * E, **options):
    return learner.LossConfig(num_targets=targets, num_states=states, constant=10.0, **options)


def states_of(one_token):
    return token_tree.num_states(P, C, S, A, 4 if one_token else E, one_token)


@functools.cache
def cases(one_token):
    """(case, its packed rows, what they must hold), once for all tests."""
    made = [random_case(seed, one_token) for seed in SEEDS]
    return [(case, case.pack(one_token), expected_tokens(case, one_token)) for case in made]


def assert_tokens(expected, rows, logprob, place=lambda where: where):
    """Exactly the expected tokens are trained, each with its advantage and its log-probs."""
    trained = {tuple(where) for where in np.argwhere(rows.loss_mask)}
    assert trained == {place(where) for where in expected}
    for where, (plain, position, advantage, sampler) in expected.items():
        at = place(where)
        assert abs(logprob[at] - plain) < 2e-5, where
        assert rows.position[at] == position
        assert rows.advantage[at] == pytest.approx(advantage, rel=1e-6)
        assert rows.sampler_logprob[at] == rows.old_logprob[at] == rows.ref_logprob[at] == np.float32(sampler)


@pytest.mark.parametrize("one_token", [False, True], ids=["answers", "one-token"])
def test_every_trained_token_has_the_logprob_of_the_plain_sequence(one_token):
    config = loss_config(states_of(one_token))
    for _case, rows, expected in cases(one_token):
        assert rows.tokens.shape[1] == states_of(one_token) + (S * A if one_token else 0)
        logprob, _ = learner.score_logprobs(MODEL, config, params(), rows)
        assert_tokens(expected, jax.device_get(rows), np.asarray(logprob))
        np.testing.assert_array_equal(np.asarray(logprob)[~np.asarray(rows.loss_mask)], 0.0)


@pytest.mark.parametrize("one_token", [False, True], ids=["answers", "one-token"])
def test_several_trees_in_a_row(one_token):
    """Joined rows hold targets between their states: all of their tokens are computed."""
    each = 2
    for _case, rows, expected in cases(one_token)[:2]:
        joined = token_tree.join_trees(rows, each, token_tree.num_sequences(S, A))
        length = rows.tokens.shape[1]
        assert joined.tokens.shape == (B * G // each, each * length)
        config = loss_config(each * length, targets=each * (C + S * A * E))
        logprob, _ = learner.score_logprobs(MODEL, config, params(), joined)
        place = lambda where, length=length: (where[0] // each, where[0] % each * length + where[1])  # noqa: E731
        assert_tokens(expected, jax.device_get(joined), np.asarray(logprob), place)


@pytest.mark.parametrize("one_token", [False, True], ids=["answers", "one-token"])
def test_compact_rows_hold_the_same_at_their_own_length(one_token):
    """Present tokens in front, in their order; with the other columns cut off nothing of what is trained changes."""
    states = states_of(one_token)
    for _case, rows, expected in cases(one_token)[:2]:
        found, token = jax.device_get(jax.jit(token_tree.compact, static_argnums=1)(rows, states))
        present = np.asarray(rows.tree)[:, :states] >= 0
        longest, place = int(present.sum(1).max()), {}
        for n, number in enumerate(present.sum(1)):
            wanted = [*np.flatnonzero(present[n]), *np.flatnonzero(~present[n]), *range(states, rows.tree.shape[1])]
            np.testing.assert_array_equal(token[n], wanted)
            assert (found.tree[n, :number] >= 0).all() and (found.tree[n, number:states] < 0).all()
            place |= {(n, int(old)): (n, new) for new, old in enumerate(wanted)}
        assert longest < states
        cut = jax.tree.map(lambda x: np.delete(x, np.arange(longest, states), axis=1), found)  # noqa: B023
        shorter = lambda where: (where[0], where[1] - (states - longest) * (where[1] >= states))  # noqa: B023, E731
        assert (cut.source < longest).all()
        logprob, _ = learner.score_logprobs(MODEL, loss_config(longest), params(), cut)
        assert_tokens(expected, cut, np.asarray(logprob), lambda where: shorter(place[where]))  # noqa: B023
        again, _ = token_tree.compact(found, states)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), found)


def test_empty_rows():
    rows = jax.device_get(token_tree.empty_rows(cases(False)[0][1], jnp.asarray([False, True, True, False])))
    whole = jax.device_get(cases(False)[0][1])
    assert (rows.tree[1:3] == -1).all() and not rows.loss_mask[1:3].any()
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[[0, 3]], y[[0, 3]]), rows, whole)
    mask = np.asarray(jax.vmap(token_tree.visible)(rows, rows))[1:3]
    np.testing.assert_array_equal(mask, np.broadcast_to(np.eye(mask.shape[1], dtype=bool), mask.shape))


@pytest.mark.parametrize("one_token", [False, True], ids=["answers", "one-token"])
def test_padding_sees_itself_alone(one_token):
    """And nothing sees it: attention has nothing to compute for it."""
    for _case, rows, _ in cases(one_token)[:2]:
        compact = token_tree.compact(rows, states_of(one_token))[0]
        for some in (rows, compact, token_tree.join_trees(rows, 2, token_tree.num_sequences(S, A))):
            mask = np.asarray(jax.vmap(token_tree.visible)(some, some))
            padding = np.asarray(some.tree) < 0
            alone = np.broadcast_to(np.eye(mask.shape[1], dtype=bool), mask.shape)
            np.testing.assert_array_equal(mask[padding], alone[padding])
            np.testing.assert_array_equal(mask.swapaxes(1, 2)[padding], alone[padding])


@pytest.mark.parametrize("one_token", [False, True], ids=["answers", "one-token"])
def test_sequences_are_blocks_and_answers(one_token):
    """How many trained tokens each sequence has; tokens behind the last fork go with its block."""
    number = token_tree.num_sequences(S, A)
    for case, rows, _ in cases(one_token):
        for n in range(B * G):
            ends = [0, *case.forks[n].tolist()]
            expected = [ends[s + 1] - ends[s] for s in range(S)]
            expected[-1] += case.traces.length[n] - ends[-1]
            expected += (case.answers.length[n] - case.answers.forced[n][:, None]).ravel().tolist()
            trained = np.asarray(rows.sequence)[n][np.asarray(rows.loss_mask)[n]]
            np.testing.assert_array_equal(np.bincount(trained, minlength=number), expected)
        joined = token_tree.join_trees(rows, 2, number)
        counts = np.bincount(np.asarray(joined.sequence)[0][np.asarray(joined.loss_mask)[0]], minlength=2 * number)
        np.testing.assert_array_equal(
            counts,
            np.concatenate([np.bincount(rows.sequence[n][rows.loss_mask[n]], minlength=number) for n in range(2)]),
        )


def test_trees_per_row_must_divide_the_trees():
    with pytest.raises(ValueError, match="trees_per_row=3 does not divide the 4 trees"):
        token_tree.join_trees(cases(False)[0][1], 3, 12)


@pytest.mark.parametrize("one_token", [False, True], ids=["answers", "one-token"])
def test_what_is_trained(one_token):
    """Never a prompt's token, an inserted one or padding; what is trained was sampled, and all of that is trained."""
    for case, rows, _ in cases(one_token):
        rows = jax.device_get(rows)
        assert not rows.loss_mask[:, :P].any()
        assert not rows.loss_mask[rows.tree < 0].any()
        sampled = case.traces.length.sum() + (case.answers.length - case.answers.forced[..., None]).sum()
        assert rows.loss_mask.sum() == sampled
        inserted = case.answers.forced.sum() * (1 if one_token else A)
        assert (rows.tree >= 0).sum() == sampled + G * case.prompts.length.sum() + inserted


def test_the_cases_reach_the_corners():
    """What the tests above rest on."""
    for one_token in (False, True):
        made = [case for case, _, _ in cases(one_token)]
        for case in made:
            assert {0, C} <= set(case.traces.length.tolist())
            assert (case.answers.forced == 0).any() and (case.answers.forced == 3).any()
        assert any(((case.forks == 0) & (case.traces.length[:, None] > 0)).any() for case in made)
        assert any((np.diff(case.forks) == 0).any() for case in made)
        # An empty insertion after a trace, and one right after the prompt.
        assert any(((case.answers.forced == 0) & (case.forks > 0)).any() for case in made)
        assert any(((case.answers.forced == 0) & (case.forks == 0)).any() for case in made)
    lengths = np.concatenate([case.answers.length - case.answers.forced[..., None] for case, _, _ in cases(False)])
    assert {0, 1, 2, 3} <= set(lengths.ravel().tolist())


def grown(case, more):
    """The same rollout in longer pads, with other garbage in them."""
    rng = np.random.default_rng(99)

    def pad(x, by):
        tail = rng.integers(VOCABULARY, size=(*x.shape[:-1], by))
        return np.concatenate([x, tail.astype(x.dtype)], axis=-1)

    p, c, e = more
    replace = dataclasses.replace
    return replace(
        case,
        prompts=replace(case.prompts, tokens=pad(case.prompts.tokens, p)),
        traces=replace(case.traces, tokens=pad(case.traces.tokens, c), logprob=pad(case.traces.logprob, c)),
        answers=replace(case.answers, tokens=pad(case.answers.tokens, e), logprob=pad(case.answers.logprob, e)),
    )


@functools.partial(jax.jit, static_argnums=0, compiler_options=UNOPTIMIZED)
def loss_and_gradient(config, params, rows):
    return jax.value_and_grad(lambda params: learner.loss(MODEL, config, params, rows), has_aux=True)(params)


def as_numbers(config, rows):
    """The loss, its metrics and its gradient, as one list of arrays."""
    return [np.asarray(x) for x in jax.tree.leaves(loss_and_gradient(config, params(), rows))]


@pytest.mark.parametrize("one_token", [False, True], ids=["answers", "one-token"])
def test_larger_pads_change_neither_loss_nor_gradient(one_token):
    more = (3, 4, 2)
    pads = [pad + extra for pad, extra in zip((P, C, 4 if one_token else E), more)]
    states = token_tree.num_states(*pads[:2], S, A, pads[2], one_token)
    case, rows, _ = cases(one_token)[1]
    base = as_numbers(loss_config(states_of(one_token), kl=0.1), rows)
    wide_config = loss_config(states, pads[1] + S * A * pads[2], kl=0.1)
    wide = as_numbers(wide_config, grown(case, more).pack(one_token))
    assert np.abs(base[0]) > 1e-3
    for a, b in zip(wide, base):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1e-2, np.abs(b).max()), rtol=1e-5)


def test_sequences():
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    mask = np.zeros((2, 6), bool)
    mask[0, 2:4] = True
    rows = jax.device_get(token_tree.sequences(tokens, [4, 6], mask))
    np.testing.assert_array_equal(rows.tokens, tokens)
    np.testing.assert_array_equal(rows.tree, [[0, 0, 0, 0, -1, -1], [0] * 6])
    np.testing.assert_array_equal(rows.position, [range(6)] * 2)
    np.testing.assert_array_equal(rows.source, [[0, 0, 1, 2, 3, 4]] * 2)
    np.testing.assert_array_equal(rows.loss_mask, mask)
    np.testing.assert_array_equal(rows.branch, [[0, 0, 0, 0, -5, -6], [0] * 6])
    for name in ("fork", "sequence", "advantage", "sampler_logprob", "old_logprob", "ref_logprob"):
        assert getattr(rows, name).shape == (2, 6) and not getattr(rows, name).any()
    with pytest.raises(AssertionError):
        token_tree.sequences(tokens, [4, 6], mask[:, 1:])


def test_shapes_are_checked():
    case = random_case(0)
    with pytest.raises(AssertionError):
        dataclasses.replace(case, forks=case.forks[:, 1:]).pack()
    with pytest.raises(AssertionError):
        dataclasses.replace(case, answer_weight=case.answer_weight[1:]).pack()
