"""Literal float64 loops for the pure core, written from the equations and sharing no code with the package.

BRPO is arXiv 2505.13438 (thinking and answer credit); MRT is arXiv 2503.07572 (progress and regret).
One problem, one trace or one scalar at a time: slow on purpose, so that every line can be checked against the papers.
"""

import math

import numpy as np

# ---------------------------------------------------------------- budgets


def prior_weights(tokens, prior):
    """P_j: "uniform", "linear" (b_j / sum b), "base" (one-hot on the last budget), or a vector scaled to sum 1."""
    count = len(tokens)
    raw = []
    for j in range(count):
        if isinstance(prior, str):
            raw.append({"uniform": 1.0, "linear": float(tokens[j]), "base": 1.0 if j == count - 1 else 0.0}[prior])
        else:
            raw.append(float(prior[j]))
    total = 0.0
    for value in raw:
        total += value
    return [value / total for value in raw]


def tails(weights):
    """tail[s] = sum_{j >= s} P_j."""
    result = []
    for s in range(len(weights)):
        total = 0.0
        for j in range(s, len(weights)):
            total += float(weights[j])
        result.append(total)
    return result


def forks_at_budgets(length, tokens):
    return [int(length) if int(length) < int(budget) else int(budget) for budget in tokens]


def block_mask(forks):
    result = []
    for s in range(len(forks)):
        before = int(forks[s - 1]) if s > 0 else 0
        result.append(int(forks[s]) > before)
    return result


def block_of_token(forks, num_tokens):
    result = []
    for t in range(num_tokens):
        block = len(forks)
        for s in range(len(forks)):
            before = int(forks[s - 1]) if s > 0 else 0
            if before <= t < int(forks[s]):
                block = s
        result.append(block)
    return result


# ---------------------------------------------------------------- values of one problem


def column_means(correct):
    """r[g][s]: mean over the A answers of one column."""
    result = []
    for trace in correct:
        row = []
        for answers in trace:
            total = 0.0
            for score in answers:
                total += float(score)
            row.append(total / len(answers))
        result.append(row)
    return result


def carry(r, scored, first):
    """An unscored column repeats the last scored one; `first` where there is none before it."""
    result = []
    for g in range(len(r)):
        last, row = first, []
        for s in range(len(r[g])):
            if scored[g][s]:
                last = r[g][s]
            row.append(last)
        result.append(row)
    return result


def pooled_values(r, forks, scored, first):
    """J[g][s]: mean over the scored columns of trace g that share the fork of column s.

    Every column has the same number of answers, so the mean of the column means is the mean of all answers. A column
    whose fork was never scored repeats the last value.
    """
    result = []
    for g in range(len(r)):
        last, row = first, []
        for s in range(len(r[g])):
            total, count = 0.0, 0
            for j in range(len(r[g])):
                if scored[g][j] and int(forks[g][j]) == int(forks[g][s]):
                    total += r[g][j]
                    count += 1
            if count > 0:
                last = total / count
            row.append(last)
        result.append(row)
    return result


def progress_of(J, first):
    """progress[g][s] = J[g][s] - J[g][s-1], J[g][-1] = the value before any thinking."""
    return [[J[g][s] - (J[g][s - 1] if s > 0 else first) for s in range(len(J[g]))] for g in range(len(J))]


# ---------------------------------------------------------------- thinking credit of one problem


def budget_return(r, weights):
    result = []
    for g in range(len(r)):
        row = []
        for s in range(len(weights)):
            total = 0.0
            for j in range(s, len(weights)):
                total += float(weights[j]) * r[g][j]
            row.append(total)
        result.append(row)
    return result


def prefix_baseline(r, weights, decay):
    """V1: tail[s] times the decayed mean of the earlier scores; 0 for the first block."""
    tail = tails(weights)
    result = []
    for g in range(len(r)):
        row = []
        for s in range(len(weights)):
            above, below = 0.0, 0.0
            for j in range(s):
                above += decay ** (s - j) * r[g][j]
                below += decay ** (s - j)
            row.append(tail[s] * above / below if s > 0 else 0.0)
        result.append(row)
    return result


def mean_for(g, column, leave_one_out):
    """Group mean as trace g sees it: 0 in a group of one, the others' mean where the flag says so."""
    if len(column) == 1:
        return 0.0
    total, count = 0.0, 0
    for other in range(len(column)):
        if leave_one_out and other == g:
            continue
        total += column[other]
        count += 1
    return total / count


def sample_std(column):
    mean = 0.0
    for value in column:
        mean += value / len(column)
    square = 0.0
    for value in column:
        square += (value - mean) ** 2
    return math.sqrt(square / (len(column) - 1))


def final_score_credit(r, leave_one_out, std):
    """GRPO and RLOO: the last column's score against the group, the same for every block."""
    S = len(r[0])
    final = [r[g][S - 1] for g in range(len(r))]
    result = []
    for g in range(len(r)):
        value = final[g] - mean_for(g, final, leave_one_out)
        if std:
            value = value / (sample_std(final) + 1e-6)
        result.append([value] * S)
    return result


def budget_relative_credit(r, weights, kind, decay, leave_one_out, coef):
    """BRPO, its ablations (prefix, group, none) and the regression baseline."""
    R = budget_return(r, weights)
    V1 = prefix_baseline(r, weights, decay)
    G, S = len(r), len(weights)
    result = []
    for g in range(G):
        row = []
        for s in range(S):
            v1 = V1[g][s]
            v2 = mean_for(g, [R[h][s] for h in range(G)], leave_one_out)
            if coef is not None:
                baseline = float(coef[s][0]) * v1 + float(coef[s][1]) * v2 + float(coef[s][2])
            elif kind == "brpo":
                baseline = (s * v1 + (S - s) * v2) / S
            else:
                baseline = {"prefix": v1, "group": v2, "none": 0.0}[kind]
            row.append(R[g][s] - baseline)
        result.append(row)
    return result


def mean_reached(g, s, progress, reached, leave_one_out):
    total, count = 0.0, 0
    for other in range(len(progress)):
        if not reached[other][s] or (leave_one_out and other == g):
            continue
        total += progress[other][s]
        count += 1
    return total / count if count > 0 else 0.0


def mrt_credit(r, progress, reached, alpha, leave_one_out, std):
    outcome = final_score_credit(r, leave_one_out, std)
    result = []
    for g in range(len(r)):
        row = []
        for s in range(len(r[g])):
            bonus = progress[g][s] - mean_reached(g, s, progress, reached, leave_one_out)
            row.append(outcome[g][s] + alpha * bonus)
        result.append(row)
    return result


def normalised(column):
    """(x - mean) / (sample deviation + 1e-6)."""
    mean = sum(column) / len(column)
    return [(value - mean) / (sample_std(column) + 1e-6) for value in column]


def continuation_credit(kind, r, J, start, first, alpha, leave_one_out):
    """MRT's RL: (one advantage a trace that continues, one a sample that ended at once; None where it is as usual)."""
    final = [row[-1] for row in r]
    if kind == "mrt_termination":
        return [value - first for value in final], None
    if kind == "mrt_joint":
        both = normalised(final + [float(score) for score in start])
        return both[: len(final)], both[len(final) :]
    reward = [value + alpha * (row[0] - first) for value, row in zip(final, J)]
    std = sample_std(reward) + 1e-6
    return [(reward[g] - mean_for(g, reward, leave_one_out)) / std for g in range(len(reward))], None


def progress_gae_credit(progress, weights, gamma, progress_weights):
    """A[s] = sum_{k >= s} gamma^(k-s) c[k] progress[k]."""
    c = tails(weights) if progress_weights == "tail" else [1.0] * len(weights)
    result = []
    for g in range(len(progress)):
        row = []
        for s in range(len(weights)):
            total = 0.0
            for k in range(s, len(weights)):
                total += gamma ** (k - s) * c[k] * progress[g][k]
            row.append(total)
        result.append(row)
    return result


# ---------------------------------------------------------------- answer credit of one problem


def answer_baseline(g, s, correct, forks, scored):
    """Mean over the answers of the same fork of the same trace; with one answer a column, over the traces instead."""
    total, count = 0.0, 0
    if len(correct[g][s]) > 1:
        for j in range(len(correct[g])):
            if scored[g][j] and int(forks[g][j]) == int(forks[g][s]):
                for score in correct[g][j]:
                    total += float(score)
                    count += 1
    else:
        for other in range(len(correct)):
            if scored[other][s]:
                total += float(correct[other][s][0])
                count += 1
    return total / count


def answer_credit(correct, forks, scored, mode):
    G, S, A = len(correct), len(correct[0]), len(correct[0][0])
    result = []
    for g in range(G):
        trace = []
        for s in range(S):
            row = []
            for a in range(A):
                kept = mode == "brpo" or (mode == "grpo" and s == S - 1 and a == A - 1)
                if kept and scored[g][s]:
                    row.append(float(correct[g][s][a]) - answer_baseline(g, s, correct, forks, scored))
                else:
                    row.append(0.0)
            trace.append(row)
        result.append(trace)
    return result


def start_credit(start, mode):
    mean = 0.0
    for score in start:
        mean += float(score) / len(start)
    return [float(score) - mean if mode == "brpo" else 0.0 for score in start]


# ---------------------------------------------------------------- the door, one problem


def assign_one(
    correct,
    forks,
    weights,
    *,
    kind,
    answers="brpo",
    decay=0.5,
    alpha=1.0,
    gamma=1.0,
    progress_weights="tail",
    leave_one_out=False,
    std=False,
    start=None,
    values=None,
    scored=None,
    coef=None,
    start_value=None,
):
    """Credit of one problem as nested lists: trace [G,S], answer [G,S,A], mask [G,S], start [A0] or None."""
    G, S = len(correct), len(correct[0])
    if scored is None:
        scored = [[True] * S for _ in range(G)]
    first = 0.0
    if start is not None:
        for score in start:
            first += float(score) / len(start)
    first = first if start_value is None else float(start_value)
    raw = column_means(correct)
    if values is not None:
        raw = [[float(values[g][s]) for s in range(S)] for g in range(G)]
    r = carry(raw, scored, first)
    progress = progress_of(pooled_values(raw, forks, scored, first), first)
    reached = [block_mask(forks[g]) for g in range(G)]
    ended = None
    if kind in ("mrt_termination", "mrt_joint", "mrt_explicit"):
        pooled = pooled_values(raw, forks, scored, first)
        each, ended = continuation_credit(kind, r, pooled, start, first, alpha, leave_one_out)
        trace = [[value] * S for value in each]
    elif kind in ("grpo", "rloo"):
        trace = final_score_credit(r, leave_one_out or kind == "rloo", std)
    elif kind == "mrt":
        trace = mrt_credit(r, progress, reached, alpha, leave_one_out, std)
    elif kind == "progress_gae":
        trace = progress_gae_credit(progress, weights, gamma, progress_weights)
    else:
        trace = budget_relative_credit(r, weights, kind, decay, leave_one_out, coef)
    return {
        "trace_advantage": trace,
        "answer_advantage": answer_credit(correct, forks, scored, answers),
        "block_mask": reached,
        "start_advantage": ended or (None if start is None else start_credit(start, answers)),
    }


def assign(correct, forks, weights, *, start=None, values=None, scored=None, start_value=None, **options):
    """`assign_one` for every problem of a batch, as arrays."""
    problems = []
    for b in range(len(correct)):
        own = {"start": start, "values": values, "scored": scored, "start_value": start_value}
        own = {name: None if array is None else array[b] for name, array in own.items()}
        problems.append(assign_one(correct[b], forks[b], weights, **own, **options))
    return {
        name: None if problems[0][name] is None else np.asarray([problem[name] for problem in problems])
        for name in problems[0]
    }


# ---------------------------------------------------------------- losses


def clipped_objective(logprob, old_logprob, advantage, clip_low=0.2, clip_high=0.2):
    ratio = math.exp(logprob - old_logprob)
    clipped = ratio
    if ratio < 1.0 - clip_low:
        clipped = 1.0 - clip_low
    if ratio > 1.0 + clip_high:
        clipped = 1.0 + clip_high
    plain, bounded = ratio * advantage, clipped * advantage
    return plain if plain < bounded else bounded


def kl_estimate(logprob, ref_logprob, kind):
    difference = logprob - ref_logprob
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference * difference
    return math.exp(-difference) - 1.0 + difference


def aggregate(per_token, mask, constant):
    total = 0.0
    for value, trained in zip(np.ravel(per_token), np.ravel(mask)):
        if trained:
            total += float(value)
    return total / constant


# ---------------------------------------------------------------- progress and regret of one trace


def block_progress(values, start):
    return [float(values[s]) - (float(values[s - 1]) if s > 0 else float(start)) for s in range(len(values))]


def cumulative_regret(values, optimal):
    total, result = 0.0, []
    for value in values:
        total += float(optimal) - float(value)
        result.append(total)
    return result


def normalized_regret(accuracy, tokens, limit):
    """1 - (area under the piecewise-linear curve from (0, 0) up to `limit`) / limit; flat after the last point."""
    area, x0, y0 = 0.0, 0.0, 0.0
    for x1, y1 in zip(tokens, accuracy):
        x1, y1 = float(x1), float(y1)
        if x1 >= limit:
            if x1 > x0:
                at_limit = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
                area += (limit - x0) * (y0 + at_limit) / 2.0
            return 1.0 - area / limit
        area += (x1 - x0) * (y0 + y1) / 2.0
        x0, y0 = x1, y1
    area += (limit - x0) * y0
    return 1.0 - area / limit


# ---------------------------------------------------------------- sampling of one token


def token_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """What a token is drawn from: temperature, then the k likeliest, then the smallest set of mass top_p."""
    scaled = [float(logit) / temperature for logit in logits]
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    if top_k > 0:
        order = order[:top_k]
    order = [token for token in order if scaled[token] > -math.inf]
    highest, total = scaled[order[0]], 0.0
    for token in order:
        total += math.exp(scaled[token] - highest)
    kept, mass = [], 0.0
    for token in order:
        if kept and mass >= top_p and top_p < 1.0:
            break
        kept.append(token)
        mass += math.exp(scaled[token] - highest) / total
    below = 0.0
    for token in kept:
        below += math.exp(scaled[token] - highest)
    result = [0.0] * len(scaled)
    for token in kept:
        result[token] = math.exp(scaled[token] - highest) / below
    return result


# ---------------------------------------------------------------- random problems


def random_budgets(rng, S):
    return np.cumsum(rng.integers(1, 9, size=S)).astype(np.int32)


def random_forks(rng, shape, tokens):
    """Traces that end early (repeated forks), at once (fork 0) or never."""
    lengths = rng.integers(0, int(1.3 * tokens[-1]) + 2, size=shape)
    lengths = np.where(rng.random(shape) < 0.15, 0, lengths)
    return np.minimum(lengths[..., None], tokens).astype(np.int32)


def random_scores(rng, shape):
    """Half of the time binary, which is full of ties, half of the time real."""
    if rng.random() < 0.5:
        return (rng.random(shape) < rng.random()).astype(np.float32)
    return rng.normal(size=shape).astype(np.float32)


def random_weights(rng, tokens):
    prior = ["uniform", "linear", "base", rng.random(len(tokens)) + 0.01][rng.integers(4)]
    return np.asarray(prior_weights(tokens, prior))


def random_batch(rng, B, G, S, A, start_answers=3):
    """Every array the door takes, as a dictionary, with the weights beside it."""
    tokens = random_budgets(rng, S)
    forks = random_forks(rng, (B, G), tokens)
    scored = rng.random((B, G, S)) < rng.choice([0.3, 0.8, 1.0])
    # First column of the same fork; argmax finds the first True.
    first = (forks[..., :, None] == forks[..., None, :]).argmax(-1)
    return {
        "correct": random_scores(rng, (B, G, S, A)),
        "forks": forks,
        "weights": random_weights(rng, tokens).astype(np.float32),
        "start": random_scores(rng, (B, start_answers)),
        "values": rng.normal(size=(B, G, S)).astype(np.float32),
        "scored": scored,
        "scored_by_fork": np.take_along_axis(scored, first, -1),
        "coef": rng.normal(size=(S, 3)).astype(np.float32),
        "start_value": rng.normal(size=B).astype(np.float32),
    }
