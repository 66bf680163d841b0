"""Where finished traces are cut: at budgets, on the devices, or where a rule says so, on the host."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tto_jax import sharding
from tto_jax.core import budgets
from tto_jax.core.budgets import BudgetSchedule
from tto_jax.core.types import Traces

Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]  # tokens i32[R,C], length i32[R] -> forks i32[R,S]


@dataclasses.dataclass(frozen=True)
class Cuts:
    """S cuts of a trace, and before them one at 0 where `start`: answers before any thinking."""

    schedule: BudgetSchedule  # on the devices
    start: bool = False
    rule: Rule | None = None  # in place of the budgets; sees the rows of its own process, none of them unfinished

    @property
    def size(self) -> int:
        """Forks of a trace."""
        return self.schedule.size + self.start

    def __call__(self, traces: Traces) -> jax.Array:
        """Forks i32[R, size], split as the traces' rows are."""
        if self.rule is None:
            return _at_budgets(traces.length, self.schedule, self.start)
        forks = self.rule(*sharding.local_rows((traces.tokens, traces.length)))
        return sharding.put_rows(np.pad(np.asarray(forks, np.int32), ((0, 0), (int(self.start), 0))))


@functools.partial(jax.jit, static_argnums=2)
def _at_budgets(length, schedule, start):
    forks = jnp.pad(budgets.forks_at_budgets(length, schedule), ((0, 0), (int(start), 0)))
    return sharding.constrain(forks, sharding.ROWS)
