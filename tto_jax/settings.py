"""From an experiment's ConfigDict to the frozen, static settings of the parts: here the ConfigDict ends.

Every combination that cannot work is refused here, before any work, with the value, the rule and the choices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from tto_jax import data, episodes, inputs, sharding
from tto_jax.core import budgets, token_tree
from tto_jax.core.budgets import BudgetSchedule
from tto_jax.core.credit import ANSWERS, GROUP_ONLY, NEEDS_START, Estimator
from tto_jax.core.losses import released_constant
from tto_jax.core.sampling import SampleConfig
from tto_jax.episodes import Episodes
from tto_jax.kernels import branch_decode, tree_attention
from tto_jax.learner import LossConfig, OptimizerConfig
from tto_jax.models.config import ModelConfig
from tto_jax.rollout import Cuts, RolloutConfig
from tto_jax.tasks import Task
from tto_jax.tokenizer import Tokenizer

SPACINGS = ("given", "uniform", "exponential")
BUDGETS = 0xB0D6  # keeps the keys of drawn budgets apart from those of rollouts
ANSWER_WEIGHTS = ("code", "paper")
VALUES = ("scores", "reference")
NORMALIZERS = ("constant", "released")
AT_LEAST_ONE = (
    *("steps", "rollout.problems", "learner.tokens_per_row", "evaluation.every", "evaluation.final_problems"),
    *("evaluation.traces", "evaluation.answers", "checkpoint.every", "checkpoint.keep", "log.samples_every"),
)
EMBEDDED_AT_LEAST_ONE = ("data.problems", "warm_start.steps", "warm_start.batch_size")


@dataclasses.dataclass(frozen=True)
class CreditConfig:
    """Static options between scores and packed rows."""

    estimator: Estimator
    answers: str
    answer_weight: str
    length_penalty: float
    one_token_answers: bool  # how answers are packed, see core.token_tree
    fork_values: str = "scores"  # of a fork: the mean score of its answers, or the probability of the reference answer
    baseline_fit: float = 0.0  # decay a step of the regression baseline's normal equations; 0: no such baseline
    baseline_ridge: float = 1.0
    start: bool = False  # the first column of a trace is the fork 0: answers before any thinking
    relative_length_penalty: float = 0.0
    overlong_margin: int = 0  # tokens before the last budget in which scores fall by up to 1; 0: off
    serial_decay: bool = False
    mask_overlong: bool = False  # thinking that the last budget has cut short is not trained

    def __post_init__(self):
        if self.answers not in ANSWERS:
            raise ValueError(f"credit.answers={self.answers!r} is unknown: choose one of {ANSWERS}")
        if self.answer_weight not in ANSWER_WEIGHTS:
            raise ValueError(f"credit.answer_weight={self.answer_weight!r} is unknown: choose one of {ANSWER_WEIGHTS}")
        if not 0 <= self.length_penalty <= 1:
            raise ValueError(f"credit.length_penalty={self.length_penalty}: the coefficient lies in [0, 1]; choose 0.2")
        if not 0 <= self.relative_length_penalty < 1:
            raise ValueError(
                f"credit.relative_length_penalty={self.relative_length_penalty}: the coefficient lies in [0, 1); "
                "choose 0.2"
            )
        if self.overlong_margin < 0:
            raise ValueError(f"credit.overlong_margin={self.overlong_margin}: tokens, or 0 for no such penalty")
        if self.fork_values == "reference" and (
            self.relative_length_penalty or self.overlong_margin or self.serial_decay
        ):
            raise ValueError(
                "credit.fork_values='reference' with credit.relative_length_penalty, overlong_margin or serial_decay: "
                "these are of scores of sampled answers; choose 'scores', or credit.length_penalty"
            )
        if self.fork_values not in VALUES:
            raise ValueError(f"credit.fork_values={self.fork_values!r} is unknown: choose one of {VALUES}")
        if not (0 <= self.baseline_fit <= 1 and self.baseline_ridge > 0):
            raise ValueError(
                f"credit.baseline_fit={self.baseline_fit}, baseline_ridge={self.baseline_ridge}: the decay lies in "
                "[0, 1], the ridge is positive; choose 0.9 and 1.0, or 0 for no fit"
            )
        if self.baseline_fit and not (self.estimator.kind == "brpo" and self.estimator.leave_one_out):
            raise ValueError(
                f"credit.baseline_fit={self.baseline_fit} with estimator {self.estimator.kind!r}, "
                f"leave_one_out={self.estimator.leave_one_out}: the regression replaces the baseline of 'brpo', "
                "without bias only where a group's mean leaves its own trace out: choose 'brpo' and leave_one_out=True"
            )

    def answer_weights(self, schedule: BudgetSchedule, answers: int) -> jax.Array:
        """f32[S], one more before them for the start: P_j / A (the paper's eq. 10; 1 / (S A) for the start, which has
        no prior) or 1 (the released code).
        """
        if self.answer_weight == "code":
            return jnp.ones(schedule.size + self.start)
        first = jnp.full(int(self.start), 1 / schedule.size)
        return jnp.concatenate([first, schedule.weights]) / answers


@dataclasses.dataclass(frozen=True)
class PrefixConfig:
    """Prompts that go on with some episodes of a trace of an earlier policy."""

    every: int  # steps after which that policy is the present one again
    tokens: int  # of the longest prefix
    episodes: Episodes | None  # where its traces are cut; None: at the budgets
    budgets: tuple[int, ...]

    def age(self, step: int) -> int:
        """Steps, of `step` and counted from 1, since the earlier policy was the present one."""
        return (step - 1) % self.every

    def forks(self, tokens: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Ends of the episodes of traces i32[N,C] of length i32[N]: i32[N,S], the last one that of the trace."""
        if self.episodes is not None:
            return self.episodes(tokens, length)
        return np.minimum(length[:, None], np.append(self.budgets, np.iinfo(np.int32).max)).astype(np.int32)

    def rollout(self, config: RolloutConfig) -> RolloutConfig:
        """One trace a problem: a token more than a prefix has, which tells whether an episode ends there."""
        return dataclasses.replace(config, group_size=1, trace_pad=self.tokens + 1, answers=1, slots=0, answer_slots=0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that the training page needs, resolved."""

    seed: int
    steps: int
    problems: int  # B, problems a step
    minibatches: int
    prompt_pad: int  # P, of a problem
    mesh: tuple[int, int, int]  # devices along data, fsdp, tensor; -1: the rest
    task: Task
    tokenizer: Tokenizer
    model: ModelConfig
    rollout: RolloutConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    schedule: BudgetSchedule
    credit: CreditConfig
    episodes: Episodes | None = None  # where traces are cut, instead of at the budgets
    sampled_budgets: bool = False  # all but the last one are drawn at every step
    resample: int = 0  # rollouts beside the first, for problems in place of those whose scores are all alike
    prefix: PrefixConfig | None = None  # what follows a problem's prompt in training

    @property
    def context_pad(self) -> int:
        """Tokens of the longest prompt that is trained on: of a problem, and its prefix."""
        return self.prompt_pad + (self.prefix.tokens if self.prefix else 0)

    @property
    def rows(self) -> int:
        """N = B*G."""
        return self.problems * self.rollout.group_size

    @property
    def names(self) -> tuple[str, ...]:
        """Of the S cuts: their tokens; or the episodes that they end, or drawn budgets, from 1."""
        if self.schedule.tokens is None or self.sampled_budgets:
            name = "episode" if self.schedule.tokens is None else "budget"
            return tuple(f"{name}_{number}" for number in range(1, self.schedule.size + 1))
        return tuple(str(tokens) for tokens in np.asarray(self.schedule.tokens).tolist())

    @property
    def columns(self) -> int:
        """Forks of a trace: S, and one more where answers are forced before any thinking."""
        return self.schedule.size + self.credit.start

    def schedule_of(self, step: int) -> BudgetSchedule:
        """The step's budgets, on the host's first device: the same on every process."""
        if not self.sampled_budgets:
            return self.schedule
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), step), BUDGETS)
        return budgets.draw(key, self.schedule, self.rollout.trace_pad)

    def cuts(self, schedule: BudgetSchedule) -> Cuts:
        """Where traces are cut; schedule: this one, on the devices."""
        return Cuts(schedule, self.credit.start, self.episodes)

    @property
    def answer_pad(self) -> int:
        """E."""
        return self.rollout.forced_pad + self.rollout.answer_cap

    @property
    def row_length(self) -> int:
        """Tokens of a packed row that are computed."""
        return self.loss.num_states

    def on(self, mesh: jax.sharding.Mesh | None) -> "Settings":
        """These settings on a mesh, or on the first device: with its layout, and its platform's kernels.

        Raises ValueError if the mesh's `tensor` axis cannot split the heads.
        """
        platform = (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform
        copies = sharding.kv_copies(self.model.num_heads, self.model.num_kv_heads, mesh)
        model = dataclasses.replace(self.model, kv_copies=copies, branch_decode=branch_decode.choose(platform))
        loss = dataclasses.replace(self.loss, attention=self.loss.attention or tree_attention.choose(platform))
        return dataclasses.replace(self, model=model, loss=loss)

    @property
    def kernels(self) -> str:
        """The implementations in use, known once the settings are `on` a mesh."""
        loss = self.loss
        return (
            f"tree_attention {loss.attention}, branch_decode {self.model.branch_decode}, token_logprobs {loss.logprobs}"
        )

    def check_rows(self, mesh: jax.sharding.Mesh | None) -> None:
        """Raises ValueError if the rows of a training step cannot be split as the mesh asks."""
        shards = 1 if mesh is None else sharding.row_shards(mesh)
        rows = self.rows // self.minibatches
        if self.problems % shards or rows % shards:
            raise ValueError(
                f"rollout.problems={self.problems} and the {rows} rows of a minibatch must be multiples of {shards}: "
                f"mesh {dict(mesh.shape)} splits rows into {shards} parts over data, fsdp; choose multiples, or put "
                "more devices on tensor"
            )

    def kv_bytes(self) -> int:
        """Bytes of KV that a rollout holds at most: prompts, traces or slots, inserted tokens and answers."""
        tokens = self.rollout.kv_tokens(self.problems, self.context_pad, self.columns)
        if self.prefix:
            tokens = max(tokens, self.prefix.rollout(self.rollout).kv_tokens(self.problems, self.prompt_pad, 0))
        width = jnp.dtype(self.model.dtype).itemsize * self.model.num_kv_heads * self.model.kv_copies
        return 2 * self.model.num_layers * tokens * width * self.model.head_dim

    def kv_bytes_a_chip(self, mesh: jax.sharding.Mesh | None) -> int:
        """Of these settings on the mesh (`on`): rows are split over data and fsdp, heads over tensor."""
        return self.kv_bytes() if mesh is None else -(-self.kv_bytes() // mesh.size)

    def check_slots(self, mesh: jax.sharding.Mesh | None, memory: int | None) -> None:
        """Raises ValueError if the slots cannot be split as the mesh asks, or their KV exceeds a chip's memory.

        memory: bytes of a chip; None where it is not known.
        """
        self.rollout.check(self.problems, 1 if mesh is None else sharding.row_shards(mesh))
        if memory and (needed := self.kv_bytes_a_chip(mesh)) > memory:
            raise ValueError(
                f"rollout.slots={self.rollout.slots} (0: all {self.rows} traces): KV cache of {needed:,} bytes a chip, "
                f"which has {memory:,}; choose fewer slots, or put more devices on data, fsdp or tensor"
            )


def build(config: ml_collections.ConfigDict, *, need_model: bool = True) -> Settings:
    """Resolve and check a configuration. Raises ValueError for what cannot work.

    With need_model=False the model that `init` should name may be absent, if the configuration gives all its sizes:
    enough to print them or to compile, not to run.
    """
    for name in AT_LEAST_ONE if inputs.is_pretrained(config) else AT_LEAST_ONE + EMBEDDED_AT_LEAST_ONE:
        if (value := functools.reduce(getattr, name.split("."), config)) < 1:
            raise ValueError(f"{name}={value}: it must be at least 1")
    if not config.rollout.temperature > 0:
        raise ValueError(
            f"rollout.temperature={config.rollout.temperature}: it must be positive, as greedy traces have no log-prob "
            "to train on; choose 1.0"
        )
    task, tokenizer, model = inputs.resolve(config, need_model)
    tokens = budget_tokens(config.budgets)
    schedule = BudgetSchedule.from_prior(tokens, config.budgets.prior)
    cut_by = episodes.of_section(config.episodes.to_dict(), tokenizer, int(tokens[-1]))
    if cut_by is not None:
        schedule = _episode_prior(config.budgets.prior, cut_by.size)
    rollout = RolloutConfig(
        group_size=config.rollout.group_size,
        trace_pad=int(tokens[-1]),
        answers=config.rollout.answers,
        answer_cap=task.max_answer_tokens,
        think_end=tokenizer.think_end_id,
        eos=tokenizer.eos_id,
        elicit_ended=tokenizer.elicit_ended,
        elicit_cut=tokenizer.elicit_cut,
        sample=SampleConfig(temperature=config.rollout.temperature),
        segment=config.rollout.segment,
        slots=config.rollout.slots,
        answer_slots=config.rollout.answer_slots,
    )
    prefix = _prefix(config, tokenizer)
    context_pad = task.max_prompt_tokens + (prefix.tokens if prefix else 0)
    settings = Settings(
        seed=config.seed,
        steps=config.steps,
        problems=config.rollout.problems,
        minibatches=config.learner.minibatches,
        prompt_pad=task.max_prompt_tokens,
        mesh=sharding.check_shape(config.mesh),
        task=task,
        tokenizer=tokenizer,
        model=model,
        rollout=rollout,
        loss=_loss(config, rollout, schedule.size + config.rollout.start, context_pad),
        optimizer=OptimizerConfig(
            **config.learner.optimizer.to_dict(), decay_steps=config.steps * config.learner.minibatches
        ),
        schedule=schedule,
        credit=CreditConfig(
            estimator=Estimator(**config.credit.estimator.to_dict()),
            answers=config.credit.answers,
            answer_weight=config.credit.answer_weight,
            length_penalty=config.credit.length_penalty,
            fork_values=config.credit.fork_values,
            baseline_fit=config.credit.baseline_fit,
            baseline_ridge=config.credit.baseline_ridge,
            one_token_answers=rollout.answer_cap == 1,
            start=config.rollout.start,
            relative_length_penalty=config.credit.relative_length_penalty,
            overlong_margin=config.credit.overlong_margin,
            serial_decay=config.credit.serial_decay,
            mask_overlong=config.credit.mask_overlong,
        ),
        episodes=cut_by,
        sampled_budgets=config.budgets.sampled,
        resample=config.rollout.resample,
        prefix=prefix,
    )
    _check(settings, config)
    return settings


def budget_tokens(section) -> tuple[int, ...]:
    """The budgets of a configuration's section `budgets`, as given or spaced up to the last one that is given.

    Raises ValueError for an unknown spacing, and for numbers that do not go with it.
    """
    spacing, count, tokens = section.spacing, section.count, tuple(section.tokens)
    if spacing not in SPACINGS:
        raise ValueError(f"budgets.spacing={spacing!r} is unknown: choose one of {SPACINGS}")
    if spacing == "given":
        if count:
            raise ValueError(f"budgets.count={count} with spacing 'given': choose 0, or one of {SPACINGS[1:]}")
        return tokens
    if not tokens:
        raise ValueError(f"budgets.tokens=() with spacing {spacing!r}: give the last budget, such as (8000,)")
    try:
        if spacing == "uniform":
            return budgets.uniform(tokens[-1], count)
        return budgets.exponential(tokens[-1], count, section.ratio)
    except ValueError as error:
        raise ValueError(f"budgets.spacing={spacing!r}, budgets.count={count}: {error}") from error


def _episode_prior(prior, size) -> BudgetSchedule:
    """Over S episodes, which have no tokens to be weighted by."""
    if isinstance(prior, str):
        if prior not in ("uniform", "base"):
            raise ValueError(f"budgets.prior={prior!r} over episodes: choose 'uniform', 'base', or {size} weights")
        return BudgetSchedule.from_weights([float(prior == "uniform")] * (size - 1) + [1.0])
    if len(prior) != size:
        raise ValueError(f"budgets.prior={prior!r} over {size} episodes: choose 'uniform', 'base', or {size} weights")
    return BudgetSchedule.from_weights(prior)


def _prefix(config, tokenizer) -> PrefixConfig | None:
    every, tokens, rule = config.prefix.every, config.prefix.tokens, config.prefix.rule
    if every < 0:
        raise ValueError(f"prefix.every={every}: steps between two copies of the policy, 0 for no prefixes; choose 20")
    if not every:
        return None
    budgets = budget_tokens(config.budgets)
    if not 1 <= tokens < budgets[-1]:
        raise ValueError(f"prefix.tokens={tokens}: choose 1 to {budgets[-1] - 1} tokens, below the last budget")
    try:
        # As many episodes as a prefix can have, and what follows them.
        cut_by = episodes.of_section(
            config.episodes.to_dict() | {"rule": rule, "most": tokens + 1}, tokenizer, tokens + 1
        )
    except ValueError as error:
        raise ValueError(f"prefix.rule={rule!r}, prefix.tokens={tokens}: {error}") from error
    if cut_by is None and budgets[0] > tokens:
        raise ValueError(
            f"prefix.rule='budgets', prefix.tokens={tokens}: no prefix ends at one of budgets.tokens={budgets}; choose "
            f"at least {budgets[0]} tokens, or one of {episodes.RULES[1:]}"
        )
    return PrefixConfig(every, tokens, cut_by, budgets)


def _loss(config, rollout, size, prompt_pad):
    learner = config.learner
    if learner.minibatches < 1 or config.rollout.problems % learner.minibatches:
        choices = tuple(n for n in range(1, config.rollout.problems + 1) if config.rollout.problems % n == 0)
        raise ValueError(
            f"learner.minibatches={learner.minibatches} does not divide rollout.problems={config.rollout.problems}: "
            f"choose one of {choices}"
        )
    if learner.attention and learner.attention not in tree_attention.IMPLEMENTATIONS:
        choices = tuple(tree_attention.IMPLEMENTATIONS)
        raise ValueError(
            f"learner.attention={learner.attention!r} is unknown: choose one of {choices}, or leave it empty"
        )
    if learner.normalizer not in NORMALIZERS:
        raise ValueError(f"learner.normalizer={learner.normalizer!r} is unknown: choose one of {NORMALIZERS}")
    rows = config.rollout.problems * rollout.group_size // learner.minibatches
    response = rollout.trace_pad + size * rollout.answers * (rollout.forced_pad + rollout.answer_cap)
    constant = rows * learner.tokens_per_row if learner.normalizer == "constant" else released_constant(rows, response)
    return LossConfig(
        num_targets=rollout.trace_pad + size * rollout.answers * rollout.answer_cap,
        num_states=token_tree.num_states(
            prompt_pad,
            rollout.trace_pad,
            size,
            rollout.answers,
            rollout.forced_pad + rollout.answer_cap,
            rollout.answer_cap == 1,
        ),
        buckets=learner.buckets,
        micro_tokens=learner.micro_tokens,
        constant=float(constant),
        temperature=rollout.sample.temperature,
        clip_low=learner.clip_low,
        clip_high=learner.clip_high,
        kl=learner.kl,
        kl_estimator=learner.kl_estimator,
        objective=learner.objective,
        dual_clip=learner.dual_clip,
        aggregate=learner.aggregate,
        importance=learner.importance,
        importance_cap=learner.importance_cap,
        num_sequences=token_tree.num_sequences(size, rollout.answers),
        attention=learner.attention,
    )


def _check(settings: Settings, config) -> None:
    kind = settings.credit.estimator.kind
    seeds = (
        {"seed": settings.seed}
        if inputs.is_pretrained(config)
        else {"seed": settings.seed, "warm_start.seed": config.warm_start.seed}
    )
    for name, seed in seeds.items():
        if not 0 <= seed < 2**32:
            raise ValueError(f"{name}={seed}: seeds lie in [0, 2**32)")
    if settings.rollout.group_size == 1 and kind in GROUP_ONLY:
        raise ValueError(f"rollout.group_size=1 with {kind!r}: every advantage would be zero; choose 2 or more")
    if settings.rollout.group_size == 1 and settings.credit.baseline_fit:
        raise ValueError("rollout.group_size=1 with credit.baseline_fit: a trace has no others; choose 2 or more")
    if settings.resample < 0:
        raise ValueError(f"rollout.resample={settings.resample}: rollouts beside the first, 0 for none; choose 2")
    if settings.resample and settings.prefix:
        raise ValueError(
            f"rollout.resample={settings.resample} with prefix.every={settings.prefix.every}: problems are replaced "
            "only where there are no prefixes; choose 0 for one of them"
        )
    if settings.credit.overlong_margin > settings.rollout.trace_pad:
        raise ValueError(
            f"credit.overlong_margin={settings.credit.overlong_margin}: it lies below the last budget, "
            f"{settings.rollout.trace_pad} tokens"
        )
    if settings.sampled_budgets and settings.episodes is not None:
        raise ValueError("budgets.sampled=True with episodes.rule: traces are cut at one or the other")
    if kind in NEEDS_START and not settings.credit.start:
        raise ValueError(
            f"credit.estimator.kind={kind!r} needs scores before any thinking: choose rollout.start=True, or 'mrt'"
        )
    if not inputs.is_pretrained(config):
        _check_warm_start(config, settings)
    _check_context("budgets.tokens", settings, budget_tokens(config.budgets), settings.context_pad)
    _check_context("evaluation.budgets", settings, tuple(config.evaluation.budgets), settings.prompt_pad)


def _check_warm_start(config, settings: Settings) -> None:
    warm = config.warm_start
    OptimizerConfig(**warm.optimizer.to_dict(), decay_steps=warm.steps)
    if warm.micro_tokens < 0:
        raise ValueError(f"warm_start.micro_tokens={warm.micro_tokens}: choose tokens of some rows, or 0 for all rows")
    context, longest = settings.model.max_position, data.demonstration_length(settings.task)
    if longest > context:
        raise ValueError(
            f"model.max_position={context}: demonstrations of {settings.task.name} have up to {longest} tokens; "
            f"choose at least {longest}"
        )


def _check_context(name: str, settings: Settings, budgets: tuple[int, ...], prompt_pad: int) -> None:
    try:
        BudgetSchedule.from_prior(budgets)
    except ValueError as error:
        raise ValueError(f"{name}={budgets}: {error}") from error
    around = prompt_pad + settings.answer_pad
    context = settings.model.max_position
    if around + budgets[-1] > context:
        raise ValueError(
            f"{name}={budgets}: prompt, prefix and answer ({around} tokens) and the last budget exceed "
            f"model.max_position={context}; choose a last budget of at most {context - around}"
        )
