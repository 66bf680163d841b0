"""The experiments with R1-Distill-Qwen hold the numbers of arXiv 2505.13438 and of its code, written here again."""

import ast
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import common, mrt_r1_qwen_1p5b, r1, star
from tto_jax import settings, train
from tto_jax import star as star_page
from tto_jax.core import budgets, credit
from tto_jax.models import decoder

ROOT = Path(__file__).resolve().parents[1]
BRPO_8K, GRPO_8K = "brpo_r1_qwen_1p5b_8k", "grpo_r1_qwen_1p5b_8k"
BRPO_16K, BRPO_7B = "brpo_r1_qwen_1p5b_16k", "brpo_r1_qwen_7b_8k"
TO_8K, TO_16K = (2000, 4000, 6000, 8000), (2000, 4000, 6000, 8000, 10_000, 12_000, 14_000, 16_000)

# file, variant: answers a fork, trained answers, budgets, prior, baseline
ROWS = {
    (GRPO_8K, "grpo"): (1, "grpo", (8000,), "base", "group"),
    (BRPO_8K, "linear"): (4, "brpo", TO_8K, "linear", "brpo"),
    (BRPO_8K, "uniform"): (4, "brpo", TO_8K, "uniform", "brpo"),
    (BRPO_8K, "base"): (4, "brpo", TO_8K, "base", "brpo"),  # GRPO+vr+decouple, too
    (GRPO_8K, "linear"): (1, "grpo", TO_8K, "linear", "group"),
    (GRPO_8K, "decouple"): (4, "brpo", TO_8K, "base", "group"),
    (GRPO_8K, "vr"): (1, "grpo", TO_8K, "base", "brpo"),
    (GRPO_8K, "length"): (1, "grpo", (8000,), "base", "group"),
    **{(BRPO_16K, prior): (4, "brpo", TO_16K, prior, "brpo") for prior in ("uniform", "linear", "base")},
    **{(BRPO_7B, prior): (4, "brpo", TO_8K, prior, "brpo") for prior in ("uniform", "linear", "base")},
}
FILES = {name: [variant for file, variant in ROWS if file == name] for name, _ in ROWS}
each_row = pytest.mark.parametrize(("file", "variant"), ROWS, ids=[f"{file}:{variant}" for file, variant in ROWS])
each_file = pytest.mark.parametrize("file", FILES)


def parsed(experiment, *options):
    """The configuration as the training page reads it, `experiment` being `FILE` or `FILE:VARIANT`."""
    name, colon, variant = experiment.partition(":")
    argv = ["train", f"--config={ROOT}/configs/{name}.py{colon}{variant}", *options]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, lock_config=True, flag_values=values, sys_argv=argv)
    values(argv)
    return holder.value


def planned(experiment, *options):
    config = parsed(experiment, *options)
    return config, settings.build(config, need_model=False)


def header(file):
    return ast.get_docstring(ast.parse((ROOT / "configs" / f"{file}.py").read_text()))


def commands(file, page):
    """The commands of a header, as lists of words."""
    lines = header(file).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[3:] for line in lines if line.strip().startswith(f"python -m tto_jax.{page}")]


# ---------------------------------------------------------------- the setup


@each_row
def test_setup(file, variant):
    config, plan = planned(f"{file}:{variant}")
    assert config.is_locked and config.variant == variant
    problems, epochs = (128, 2) if file == BRPO_7B else (64, 1)
    assert (plan.problems, plan.rollout.group_size) == (problems, 8)
    assert (plan.minibatches, plan.rows // plan.minibatches) == (2, problems // 2 * 8)  # 32 problems (7B: 64)
    assert plan.steps == math.floor(epochs * 40_315 / problems) == 629
    optimizer = plan.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps) == (1e-6, "constant", 0)
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.grad_clip) == (0.9, 0.999, 0.01, 1.0)
    assert plan.model.dtype == "bfloat16"
    assert plan.prompt_pad == plan.task.max_prompt_tokens == 1024
    assert (plan.rollout.sample.temperature, plan.loss.temperature) == (1.0, 1.0)
    assert (plan.rollout.sample.top_k, plan.rollout.sample.top_p) == (0, 1.0)
    assert (plan.loss.clip_low, plan.loss.clip_high) == (0.2, 0.28 if file == BRPO_7B else 0.2)
    assert plan.loss.kl == 0
    assert plan.rollout.answer_cap == 118
    assert plan.credit.estimator.decay == 0.5
    assert not plan.credit.estimator.std and not plan.credit.estimator.leave_one_out
    assert plan.credit.answer_weights(plan.schedule, plan.rollout.answers).tolist() == [1.0] * plan.schedule.size
    assert plan.credit.length_penalty == (0.2 if variant == "length" else 0.0)


@each_row
def test_row_of_the_ablation(file, variant):
    answers, mode, tokens, prior, _ = ROWS[file, variant]
    config, plan = planned(f"{file}:{variant}")
    assert (plan.rollout.answers, plan.credit.answers) == (answers, mode)
    assert tuple(config.budgets.tokens) == tuple(plan.schedule.tokens.tolist()) == tokens
    assert plan.rollout.trace_pad == tokens[-1]
    total = sum(tokens)
    weights = {
        "uniform": [1 / len(tokens)] * len(tokens),
        "linear": [b / total for b in tokens],
        "base": [0.0] * (len(tokens) - 1) + [1.0],
    }
    np.testing.assert_allclose(plan.schedule.weights, weights[prior], rtol=1e-6)


@each_row
def test_strings_of_the_rollout(file, variant):
    """Of the paper; the insertion after a cut is 8 tokens with the model's tokenizer (3 and 5)."""
    _, plan = planned(f"{file}:{variant}")
    strings = plan.task.prompting
    assert strings.instruction == " Let's think step by step and output the final answer within \\boxed{}."
    assert (strings.think_end, strings.paragraph) == ("</think>", "**Final Answer**\n")
    assert strings.elicit_ended == "\n\n**Final Answer**\n"
    assert strings.elicit_cut == "...\n\n...\n\n</think>\n\n**Final Answer**\n"
    assert plan.rollout.forced_pad == 8


@each_row
def test_loss_is_divided_as_in_the_released_code(file, variant):
    """Rows of a minibatch x padded response, whatever the variant fills of it: 10,176 tokens at 8k."""
    _, plan = planned(f"{file}:{variant}")
    response = {BRPO_16K: 18_176}.get(file, 10_176)
    assert plan.loss.constant == (512 if file == BRPO_7B else 256) * response


@each_row
def test_evaluation(file, variant):
    config, _ = planned(f"{file}:{variant}")
    step = 500 if file == BRPO_16K else 250
    assert tuple(config.evaluation.budgets) == tuple(range(step, 32 * step + 1, step))
    assert config.evaluation.budgets[-1] == config.budgets.tokens[-1]
    assert (config.evaluation.temperature, config.evaluation.traces) == (0.6, 80)
    # The paper reports step 600: it is evaluated while training, and still there at the end.
    last = config.steps // config.checkpoint.every * config.checkpoint.every
    kept = range(last, last - (config.checkpoint.keep - 1) * config.checkpoint.every, -config.checkpoint.every)
    assert 600 % config.evaluation.every == 0 and 600 in kept


# ---------------------------------------------------------------- credit, from the paper's equations


def thinking_credit(score, weights, baseline):
    """score[G][S] -> advantage[G][S], as algorithmic loops."""
    traces, size = range(len(score)), len(weights)
    out = np.zeros((len(score), size))
    for s in range(size):
        returns = [sum(weights[j] * score[g][j] for j in range(s, size)) for g in traces]
        for g in traces:
            group, prefix = sum(returns) / len(score), 0.0
            if s > 0:
                decayed = [0.5 ** (s - j) for j in range(s)]
                mean = sum(d * score[g][j] for j, d in enumerate(decayed)) / sum(decayed)
                prefix = sum(weights[s:]) * mean
            value = {"group": group, "brpo": (s * prefix + (size - s) * group) / size}[baseline]
            out[g][s] = returns[g] - value
    return out


def answer_credit(correct, forks, mode):
    """correct[G,S,A], forks[G,S] -> advantage[G,S,A]."""
    out = np.zeros(correct.shape)
    for g, s, a in np.ndindex(correct.shape):
        if mode == "grpo" and (s, a) != (correct.shape[1] - 1, correct.shape[2] - 1):
            continue
        pooled = correct[g, forks[g] == forks[g, s]] if correct.shape[2] > 1 else correct[:, s]
        out[g, s, a] = correct[g, s, a] - pooled.mean()
    return out


@each_row
def test_credit(file, variant):
    """8 traces, of which some end before budgets; the score of every answer at random."""
    answers, mode, _, _, baseline = ROWS[file, variant]
    _, plan = planned(f"{file}:{variant}")
    rng = np.random.default_rng(0)
    length = rng.integers(1500, plan.rollout.trace_pad + 1, size=8)
    forks = np.asarray(budgets.forks_at_budgets(length, plan.schedule))
    correct = rng.integers(0, 2, size=(8, plan.schedule.size, answers)).astype(np.float32)
    earned = credit.assign(correct[None], forks[None], plan.schedule, plan.credit.estimator, plan.credit.answers)
    expected = thinking_credit(correct.mean(axis=-1).tolist(), plan.schedule.weights.tolist(), baseline)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(earned.trace_advantage[0], expected, atol=1e-6)
    np.testing.assert_allclose(earned.answer_advantage[0], answer_credit(correct, forks, mode), atol=1e-6)


# ---------------------------------------------------------------- sizes


def parameters_by_hand(vocab, width, layers, heads, kv_heads, mlp):
    """Of an untied Qwen2 with heads of 128."""
    attention = width * 128 * (heads + 2 * kv_heads) + 128 * (heads + 2 * kv_heads) + 128 * heads * width
    return 2 * vocab * width + layers * (attention + 3 * width * mlp + 2 * width) + width


@each_file
def test_model(file):
    """Sizes of the public checkpoints, and their number of parameters."""
    _, plan = planned(file)
    model = plan.model
    large = file == BRPO_7B
    sizes = (152_064, 3584, 28, 28, 4, 18_944) if large else (151_936, 1536, 28, 12, 2, 8960)
    fields = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "mlp_size")
    assert tuple(getattr(model, name) for name in fields) == sizes
    assert (model.head_dim, model.max_position, model.rope_theta, model.norm_eps) == (128, 131_072, 10_000.0, 1e-6)
    assert model.attention_bias and not (model.qk_norm or model.tie_embeddings or model.learned_positions)
    assert model.rope_scaling is None
    shapes = jax.eval_shape(lambda: decoder.init_params(model, 0))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert count == parameters_by_hand(*sizes) == (7_615_616_512 if large else 1_777_088_000)
    # As the header says: parameters, two moments and a gradient.
    assert f"an update {16 * count / 1e9:.1f} GB" in header(file).replace("\n", " ")


@each_row
def test_kv_bytes(file, variant):
    """Prompts once a problem, traces once a row, 8 inserted tokens once a fork, answers in blocks of 32; in bf16."""
    answers, _, tokens, _, _ = ROWS[file, variant]
    _, plan = planned(f"{file}:{variant}")
    problems, kv_heads = (128, 4) if file == BRPO_7B else (64, 2)
    rows, forks = problems * 8, problems * 8 * len(tokens)
    held = problems * 1024 + rows * tokens[-1] + forks * 8 + forks * answers * 128
    assert plan.kv_bytes() == held * 28 * 2 * kv_heads * 128 * 2
    said = re.search(r"A rollout holds (.*) and an update", header(file).replace("\n", " ")).group(1)
    assert f"{plan.kv_bytes() / 1e9:.1f}" in said
    if (file, variant) == (BRPO_8K, "uniform"):
        assert plan.kv_bytes() == 149_854_093_312


# ---------------------------------------------------------------- the files


@each_file
def test_header(file):
    """Its command works but for the model's files, and it names its variants, its data and that it was not run."""
    text = header(file)
    (words,) = commands(file, "train")
    config_flag, *options = words
    experiment = re.fullmatch(r"--config=configs/(.*)\.py:(\w+)", config_flag)
    assert experiment.group(1) == file and experiment.group(2) in FILES[file]
    config = parsed(f"{file}:{experiment.group(2)}", *[x for x in options if x.startswith("--config.")])
    assert config.init == f"models/DeepSeek-R1-Distill-Qwen-{'7B' if file == BRPO_7B else '1.5B'}"
    assert config.data.train == "sets/deepscaler" and len(config.data.eval) == 5
    (workdir,) = [x for x in options if not x.startswith("--config.")]
    assert workdir.startswith("--workdir=runs/")
    assert [variant for variant in FILES[file] if not re.search(rf"\b{variant}\b", text)] == []
    assert "40,315 problems" in text and "Not run at scale" in text and "2505.13438" in text
    assert config.variant == parsed(file).variant, "the command shows the default variant"
    (prepare,) = commands(file, "prepare_data")
    assert prepare[-1] == f"--out={config.data.train}"
    assert set(config.data.eval) | {config.data.train} == {words[-1][6:] for words in commands("r1", "prepare_data")}


def test_evaluation_commands():
    """320 traces of the two small sets, 80 of the others: all flags exist, and so do the sets."""
    from tto_jax import evaluate  # noqa: F401, defines the flags

    prepared = {words[-1].removeprefix("--out=") for words in commands("r1", "prepare_data")}
    given = [dict(word.removeprefix("--").split("=") for word in words) for words in commands("r1", "evaluate")]
    assert [name for options in given for name in options if name not in flags.FLAGS] == []
    assert [options["traces"] for options in given] == ["320", "80", "80"]
    first, second, _ = (set(options["data"].split(",")) for options in given)
    assert first == {"sets/amc22", "sets/aime24"} and first | second == prepared - {"sets/deepscaler"}


PUBLISHED = {  # final / anytime
    BRPO_8K: ("45.6 / 39.8", "50.7 / 43.0", "52.7 / 44.9", "52.6 / 45.6", "52.5 / 46.0"),
    GRPO_8K: ("45.6 / 39.8", "50.7 / 43.0"),
}
NAMES = {BRPO_8K: ("R1-Distill", "GRPO", "base", "linear", "uniform"), GRPO_8K: ("R1-Distill", "grpo")}


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_numbers(file):
    rows = [line for line in header(file).splitlines() if line.startswith("| ") and re.search(r"\d / \d", line)]
    for row, name, numbers in zip(rows, NAMES[file], PUBLISHED[file], strict=True):
        assert row.startswith(f"| {name}") and row.endswith(f"| {numbers} |")


@pytest.mark.parametrize("file", [BRPO_16K, BRPO_7B])
def test_no_number_where_none_is_known(file):
    assert re.findall(r"\d\d\.\d / \d\d\.\d", header(file)) == []


# ---------------------------------------------------------------- the command line


def test_overrides():
    changes = {
        "rollout.group_size": 4,
        "budgets.tokens": "(1000,3000)",
        "model.num_layers": 2,
        "learner.clip_high": 0.3,
    }
    config, plan = planned(f"{BRPO_8K}:linear", *(f"--config.{name}={value}" for name, value in changes.items()))
    assert (plan.rollout.group_size, plan.rollout.trace_pad, plan.model.num_layers) == (4, 3000, 2)
    assert plan.schedule.weights.tolist() == pytest.approx([0.25, 0.75])
    assert (config.learner.clip_low, plan.loss.clip_high) == (0.2, 0.3)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        (("spacing=exponential", "count=4"), (1000, 2000, 4000, 8000)),
        (("spacing=exponential", "count=3", "ratio=1.25"), (5120, 6400, 8000)),
        (("spacing=uniform", "count=5", "tokens=(10000,)"), (2000, 4000, 6000, 8000, 10_000)),
    ],
)
def test_spaced_budgets(options, tokens):
    _, plan = planned(f"{BRPO_8K}:linear", *(f"--config.budgets.{option}" for option in options))
    assert tuple(plan.schedule.tokens.tolist()) == tokens and plan.rollout.trace_pad == tokens[-1]
    assert plan.schedule.weights.tolist() == pytest.approx([b / sum(tokens) for b in tokens])


@each_file
def test_unknown_options_are_refused(file):
    with pytest.raises((AttributeError, KeyError, flags.Error), match=r"Did you mean.*clip_high"):
        parsed(file, "--config.learner.clip_hihg=0.3")


@each_file
def test_unknown_variants_are_refused(file):
    with pytest.raises(flags.IllegalFlagValueError, match="variant 'linaer': choose one of") as refused:
        parsed(f"{file}:linaer")
    assert [variant for variant in FILES[file] if repr(variant) not in str(refused.value)] == []


def test_dry_run():
    command = [sys.executable, "-m", "tto_jax.train", f"--config=configs/{BRPO_8K}.py", "--dry_run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for words in (
        "1,777,088,000 parameters",
        "149,854,093,312 bytes of KV cache",
        "[2000, 4000, 6000, 8000] tokens",
        "64 problems x 8 traces x 4 forks x 4 answers",
        "2 minibatches of 256 rows",
        "learning_rate: 1.0e-06",
        "tokens_per_row: 10176",
    ):
        assert words in done.stdout


# ---------------------------------------------------------------- MRT


MRT = "mrt_r1_qwen_1p5b"


def test_setup_of_mrt():
    """Of arXiv 2503.07572 and, for `online`, of its authors' run of 2026."""
    _, plan = planned(f"{MRT}:online")
    assert (plan.rows, plan.rollout.group_size, plan.problems) == (256, 4, 64)
    assert (plan.prompt_pad, plan.rollout.trace_pad, plan.rollout.answers) == (4096, 24_576, 4)
    assert (plan.rollout.sample.temperature, plan.loss.temperature) == (0.9, 0.9)
    optimizer = plan.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.weight_decay) == (1e-6, "cosine", 0.01)
    assert optimizer.decay_steps == plan.steps * plan.minibatches == 629 and optimizer.warmup_steps == 62
    assert (plan.credit.estimator.kind, plan.credit.estimator.alpha) == ("mrt", 1.0)
    assert plan.names == tuple(f"episode_{s}" for s in range(1, 7)) and plan.episodes.size == plan.columns == 6
    rule = plan.episodes.text_rule
    assert (rule.max_cuts, rule.group, rule.gap, rule.separator) == (49, 5, 2, "\n\n")
    assert rule.markers[:3] == ("Wait", "But wait", "Alternatively") and len(rule.markers) == 6
    assert plan.schedule.weights.tolist() == [0] * 5 + [1]
    assert plan.task.prompting.elicit_cut.startswith("Time is up.") and not plan.task.prompting.elicit_ended
    assert f"{plan.kv_bytes() / 1e9:.1f}" in header(MRT)
    assert "six episodes" in header(MRT) and "Not run at scale" in header(MRT)
    (words,) = commands(MRT, "train")
    assert parsed(f"{MRT}:online", *words[2:]).data.train == "sets/deepscaler"


def test_grpo_beside_mrt():
    _, plan = planned(f"{MRT}:grpo")
    assert (plan.credit.estimator.kind, plan.rollout.answers, plan.names) == ("grpo", 1, ("24576",))
    assert plan.episodes is None and f"{plan.kv_bytes() / 1e9:.1f}" in header(MRT)
    with pytest.raises(flags.IllegalFlagValueError, match="choose one of"):
        parsed(f"{MRT}:star")


@pytest.mark.parametrize("form", ["termination", "joint", "explicit"])
def test_prefixes_of_mrt(form):
    """Episodes of the policy of some steps ago; room for them in prompts and rows."""
    _, plan = planned(f"{MRT}:{form}")
    assert (plan.credit.estimator.kind, plan.credit.start) == (f"mrt_{form}", True)
    assert (plan.prefix.every, plan.prefix.tokens, plan.context_pad) == (20, 8192, 4096 + 8192)
    assert plan.prefix.episodes.text_rule.group == 5 and plan.prompt_pad == 4096
    columns, answers = (3, 4) if form == "explicit" else (2, 1)
    assert (plan.columns, plan.rollout.answers) == (columns, answers)
    inserted = plan.rollout.forced_pad
    row = plan.context_pad + plan.rollout.trace_pad + columns * answers * (inserted + 1024)
    assert plan.row_length == row
    assert f"{plan.kv_bytes() / 1e9:.1f}" in header(MRT)


# name: estimator, discount, weights of progress, start, decay of the fitted baseline, cuts
MRT_VARIANTS = {
    "mrt_online": ("mrt", 1.0, "tail", False, 0.0, "episodes"),
    "progress_gae_0": ("progress_gae", 0.0, "tail", True, 0.0, "budgets"),
    "progress_gae_half": ("progress_gae", 0.5, "tail", True, 0.0, "budgets"),
    "progress_gae_1": ("progress_gae", 1.0, "tail", True, 0.0, "budgets"),
    "potential": ("progress_gae", 1.0, "ones", True, 0.0, "budgets"),
    "regression": ("brpo", 1.0, "tail", False, 0.9, "budgets"),
    "mrt_termination": ("mrt_termination", 1.0, "tail", True, 0.0, "budgets"),
    "mrt_joint": ("mrt_joint", 1.0, "tail", True, 0.0, "budgets"),
    "mrt_explicit": ("mrt_explicit", 1.0, "tail", True, 0.0, "episodes"),
}


@pytest.mark.parametrize("file", ["peak", "chain"])
@pytest.mark.parametrize("variant", MRT_VARIANTS)
def test_variants_of_the_embedded_experiments(file, variant):
    _, plan = planned(f"{file}:{variant}")
    kind, gamma, weights, start, fit, cuts = MRT_VARIANTS[variant]
    estimator = plan.credit.estimator
    assert (estimator.kind, estimator.gamma, estimator.progress_weights) == (kind, gamma, weights)
    assert (plan.credit.start, plan.credit.baseline_fit) == (start, fit)
    assert estimator.leave_one_out == (variant == "regression")
    assert (plan.episodes is not None) == (cuts == "episodes")
    assert (plan.prefix is not None) == variant.startswith(("mrt_t", "mrt_j", "mrt_e"))
    if plan.prefix:
        assert (plan.prefix.every, plan.prefix.tokens) == (20, {"peak": 18, "chain": 36}[file])
        assert plan.prefix.episodes.size == 4, "three episodes, and what follows them"
        # Answers at once, and traces that go on.
        assert plan.rollout.answers == (4 if variant == "mrt_explicit" else 1)
        assert plan.columns == plan.schedule.size + 1 == (3 if variant == "mrt_explicit" else 2)
    elif cuts == "episodes":
        assert plan.columns == {"peak": 4, "chain": 6}[file] and plan.schedule.weights[-1] == 1


# ---------------------------------------------------------------- every experiment


SIZES = tuple(f"--config.model.{name}={size}" for name, size in r1.MODELS["1p5b"].items())  # `init` gives them else
EXPERIMENTS = {
    **{f"{file}:{variant}": train for file in ("peak", "chain") for variant in common.ALGORITHMS},
    **{f"math:{variant}": train for variant in common.ALGORITHMS},
    **{f"{MRT}:{variant}": train for variant in mrt_r1_qwen_1p5b.VARIANTS},
    **{f"star:{task},{method}": star_page for task in star.TASKS for method in star.CRITERIA},
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_can_be_planned(experiment):
    """What `--dry_run` does, but for the process: the configuration as read, its settings, what is printed."""
    variant = experiment.partition(":")[2]
    named = {"mrt": "mrt_star", "plain": "star"}
    page, sizes = EXPERIMENTS[experiment], SIZES if "math" in experiment else ()
    config = parsed(experiment, *sizes)
    plan = (settings if page is train else page).build(config, need_model=False)
    assert len(page.describe(plan).splitlines()) > 5
    assert config.variant == (variant if page is train else named[variant.partition(",")[2]])


def test_dry_run_of_star():
    command = [sys.executable, "-m", "tto_jax.star", "--config=configs/star.py:math,mrt", "--dry_run", *SIZES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "before thinking and at episode_1, " in done.stdout and "criterion='best'" in done.stdout
