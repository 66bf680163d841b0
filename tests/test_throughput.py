"""FLOPs against a count of the traced products and of every pair of tokens; MFU, memory and goodput as arithmetic."""

import dataclasses
import math
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tto_jax import throughput
from tto_jax.core import token_tree
from tto_jax.core.types import Answers, Credit, Prompts, Traces
from tto_jax.models import decoder
from tto_jax.models.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=37,
    hidden_size=24,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=40,
    max_position=64,
    attention_bias=True,
    qk_norm=True,
)


def products(jaxpr, times=1) -> int:
    """FLOPs of all matrix products of a traced function, the bodies of scans as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lengths = [equation.invars[0].aval.shape[axis] for axis in contracted]
            total += 2 * times * math.prod(lengths) * math.prod(equation.outvars[0].aval.shape)
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        assert equation.primitive.name != "while", "how often it runs is not known"
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                    total += products(getattr(part, "jaxpr", part), inner)
    return total


def traced(function, *arguments) -> int:
    return products(jax.make_jaxpr(function)(*arguments).jaxpr)


def row_of(tokens: int):
    """Abstract rows: one sequence without padding."""
    array = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    length = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(token_tree.sequences, array, length, jax.ShapeDtypeStruct((1, tokens), bool))


def forward(params, rows):
    return decoder.forward_rows(MODEL, params, rows, "reference")


PARAMS = jax.eval_shape(lambda: decoder.init_params(MODEL, 0))


@pytest.mark.parametrize("tokens", [1, 5])
def test_the_model_does_what_is_counted(tokens):
    """The reference attention computes all pairs, seen or not."""
    done = traced(forward, PARAMS, row_of(tokens))
    assert done == tokens * throughput.per_token(MODEL) + tokens**2 * throughput.per_pair(MODEL)
    hidden = jax.ShapeDtypeStruct((tokens, MODEL.hidden_size), jnp.float32)
    assert traced(lambda p, h: decoder.logits(MODEL, p, h), PARAMS, hidden) == tokens * throughput.per_logits(MODEL)


def test_a_backward_pass_is_two_forward_passes():
    backward = jax.grad(lambda params, rows: forward(params, rows).sum(), allow_int=True)
    assert traced(backward, PARAMS, row_of(5)) == 3 * traced(forward, PARAMS, row_of(5))


# ---------------------------------------------------------------- a step, counted token by token


def made_up(seed: int, one_token: bool):
    """Lengths of a step as it could be: (prompts, traces, forks, answers) with pads, and what they are packed with."""
    rng = np.random.default_rng(seed)
    problems, group, size, number = 2, 3, 2, 2
    rows, prompt_pad, trace_pad, pad = problems * group, 5, 9, 3 if one_token else 6
    prompt = rng.integers(1, prompt_pad + 1, problems).astype(np.int32)
    trace = rng.integers(1, trace_pad + 1, rows).astype(np.int32)
    forks = np.minimum(np.array([4, 9]), trace[:, None]).astype(np.int32)
    forced = rng.integers(0, 3, (rows, size)).astype(np.int32)
    sampled = np.ones((rows, size, number), int) if one_token else rng.integers(1, 5, (rows, size, number))
    zeros = lambda *shape, dtype=np.float32: np.zeros(shape, dtype)  # noqa: E731
    length = np.minimum(forced[..., None] + sampled, pad).astype(np.int32)
    return (
        Prompts(tokens=zeros(problems, prompt_pad, dtype=np.int32), length=prompt, id=np.arange(problems)),
        Traces(
            tokens=zeros(rows, trace_pad, dtype=np.int32),
            logprob=zeros(rows, trace_pad),
            length=trace,
            ended=zeros(rows, dtype=bool),
            eos=zeros(rows, dtype=bool),
        ),
        forks,
        Answers(
            tokens=zeros(rows, size, number, pad, dtype=np.int32),
            logprob=zeros(rows, size, number, pad),
            length=length,
            forced=forced,
            ended=zeros(rows, size, number, dtype=bool),
        ),
        Credit(
            trace_advantage=zeros(problems, group, size),
            answer_advantage=zeros(problems, group, size, number),
            block_mask=zeros(problems, group, size, dtype=bool),
        ),
    )


def fed(before: int, new: int) -> int:
    """FLOPs of tokens that are fed one after the other."""
    return sum(throughput.per_token(MODEL) + (before + i + 1) * throughput.per_pair(MODEL) for i in range(new))


@pytest.mark.parametrize("one_token", [False, True])
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_a_step_is_counted_token_by_token(one_token, kl):
    prompts, traces, forks, answers, credit = made_up(0, one_token)
    settings = SimpleNamespace(
        model=MODEL, credit=SimpleNamespace(one_token_answers=one_token), loss=SimpleNamespace(kl=kl)
    )
    found = throughput.step_flops(settings, prompts.length, traces, forks, answers)

    rows, size, number = answers.length.shape
    prompt = np.repeat(prompts.length, rows // len(prompts.length)).tolist()
    think = sum(fed(0, int(length)) for length in prompts.length)
    answer = 0
    for n in range(rows):
        think += fed(prompt[n], int(traces.length[n])) + int(traces.length[n]) * throughput.per_logits(MODEL)
        for s in range(size):
            before, forced = prompt[n] + int(forks[n, s]), int(answers.forced[n, s])
            answer += fed(before, forced)
            for a in range(number):
                sampled = int(answers.length[n, s, a]) - forced
                answer += sampled * throughput.per_logits(MODEL) + fed(before + forced, max(sampled - 1, 0))
    assert found["flops/think"] == think and found["flops/answer"] == answer

    # The rows as they are packed: what is there, what each token sees, what is trained.
    weight = np.ones(size, np.float32)
    packed = jax.jit(token_tree.pack, static_argnums=6)(prompts, traces, answers, forks, credit, weight, one_token)
    states = token_tree.num_states(5, 9, size, number, answers.tokens.shape[-1], one_token)
    row = 0
    for n in range(rows):
        one = jax.tree.map(lambda x, n=n: np.asarray(x)[n], packed)
        row += int(one.loss_mask.sum()) * throughput.per_logits(MODEL)
        one = jax.tree.map(lambda x: x[:states], one)
        there = one.tree >= 0
        seen = token_tree.visible(one, one) & there[:, None] & there[None, :]
        row += int(there.sum()) * throughput.per_token(MODEL) + int(seen.sum()) * throughput.per_pair(MODEL)
    assert found["flops/update"] == 3 * row
    assert found["flops/score"] == (2 if kl else 1) * row


def test_pads_cost_nothing():
    prompts, traces, forks, answers, _ = made_up(1, False)
    settings = SimpleNamespace(
        model=MODEL, credit=SimpleNamespace(one_token_answers=False), loss=SimpleNamespace(kl=0.0)
    )
    wider = dataclasses.replace(answers, tokens=np.pad(answers.tokens, ((0, 0),) * 3 + ((0, 9),)))
    counts = [throughput.step_flops(settings, prompts.length, traces, forks, x) for x in (answers, wider)]
    assert counts[0] == counts[1]


# ---------------------------------------------------------------- what is made of it


def test_utilisation_is_work_over_time_and_peak():
    row = {"flops/think": 30.0, "flops/update": 50.0, "seconds/think": 2.0, "seconds/update": 0.5, "seconds/step": 4.0}
    assert throughput.speed(row, 12, 100.0) == {
        "speed/tokens_per_second": 3.0,
        "speed/mfu": 80 / 400,
        "speed/mfu/think": 30 / 200,
        "speed/mfu/update": 50 / 50,
    }
    unknown = throughput.speed(row, 12, None)
    assert unknown.pop("speed/tokens_per_second") == 3.0 and set(unknown.values()) == {None}


def test_the_peak_is_that_of_all_chips(monkeypatch):
    assert throughput.peak(8) is None, "nobody says what a CPU can do"
    for kind, flops in (("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12), ("TPU v9", None)):
        monkeypatch.setattr(jax, "devices", lambda kind=kind: [SimpleNamespace(device_kind=kind)])
        assert throughput.peak(64) == (None if flops is None else 64 * flops)


def test_memory_of_the_first_device(monkeypatch):
    assert throughput.memory() == {"memory/in_use": None, "memory/peak": None, "memory/limit": None}
    stats = {"bytes_in_use": 1, "peak_bytes_in_use": 2, "bytes_limit": 3, "num_allocs": 4}
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])
    assert throughput.memory() == {"memory/in_use": 1, "memory/peak": 2, "memory/limit": 3}


def test_goodput_is_a_share():
    now = time.time()
    assert throughput.goodput(now - 100, 25.0)["speed/goodput"] == pytest.approx(0.25, rel=1e-2)
    assert throughput.goodput(now + 100, 25.0)["speed/goodput"] == 1.0, "a clock that was set back"
