"""The decoder of one plain sequence in float64, written from the equations with loops over tokens and heads.

RMSNorm      x / sqrt(mean(x^2) + eps) * scale
rotary       (x_i, x_{i+D/2}) turned by the angle t * theta^(-2i/D), i < D/2
attention    head h of H reads KV head h // (H/K); softmax over s <= t of q_t . k_s / sqrt(D)
SwiGLU       down(silu(gate(x)) * up(x)), silu(x) = x / (1 + exp(-x))
"""

import math

import numpy as np


def rms_norm(x, scale, eps):
    return x / math.sqrt(float(np.mean(x * x)) + eps) * scale


def rotate(x, t, theta):
    half = len(x) // 2
    out = np.zeros_like(x)
    for i in range(half):
        angle = t * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def attention(config, p, x):
    """x: list of L vectors -> list of L vectors."""
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim

    def project(name, vector):
        y = vector @ p[name]["kernel"]
        return y + p[name]["bias"] if config.attention_bias else y

    def head_of(name, vector, index, t=None):
        y = project(name, vector)[index * width : (index + 1) * width]
        if t is None:
            return y
        if config.qk_norm:
            y = rms_norm(y, p[f"{name}_norm"]["scale"], config.norm_eps)
        return rotate(y, t, config.rope_theta)

    mixed = [np.zeros(heads * width) for _ in x]
    for h in range(heads):
        kv = h // (heads // kv_heads)
        keys = [head_of("k", vector, kv, t) for t, vector in enumerate(x)]
        values = [head_of("v", vector, kv) for vector in x]
        for t, vector in enumerate(x):
            query = head_of("q", vector, h, t)
            weights = [math.exp(float(query @ keys[s]) / math.sqrt(width)) for s in range(t + 1)]
            for s in range(t + 1):
                mixed[t][h * width : (h + 1) * width] += weights[s] / sum(weights) * values[s]
    return [vector @ p["out"]["kernel"] for vector in mixed]


def swiglu(p, x):
    gate = x @ p["gate"]["kernel"]
    return (gate / (1 + np.exp(-gate)) * (x @ p["up"]["kernel"])) @ p["down"]["kernel"]


def layer_of(tree, index):
    """Parameters of one layer, float64."""
    if isinstance(tree, dict):
        return {name: layer_of(child, index) for name, child in tree.items()}
    return np.asarray(tree, np.float64)[index]


def logits(config, params, tokens):
    """tokens: L ints -> f64[L, V]."""
    embedding = np.asarray(params["embed"]["embedding"], np.float64)
    x = [embedding[token] for token in tokens]
    if config.learned_positions:
        x = [v + np.asarray(params["position_embed"]["embedding"], np.float64)[t] for t, v in enumerate(x)]
    for index in range(config.num_layers):
        p = layer_of(params["layers"], index)
        normed = [rms_norm(v, p["attention_norm"]["scale"], config.norm_eps) for v in x]
        x = [v + y for v, y in zip(x, attention(config, p["attention"], normed))]
        x = [v + swiglu(p, rms_norm(v, p["mlp_norm"]["scale"], config.norm_eps)) for v in x]
    final = np.asarray(params["norm"]["scale"], np.float64)
    hidden = np.stack([rms_norm(v, final, config.norm_eps) for v in x])
    head = embedding.T if config.tie_embeddings else np.asarray(params["lm_head"]["kernel"], np.float64)
    return hidden @ head
