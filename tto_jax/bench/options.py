"""What a target is asked for beside its shape."""

import dataclasses
from collections.abc import Sequence
from types import ModuleType

import jax


@dataclasses.dataclass(frozen=True)
class Options:
    """Of one run of the page; a target names the ones it takes in `TAKES`."""

    hf: str | None = None  # a checkpoint directory instead of the shape's model
    peer: str | None = None  # another library, measured in the same run
    implementation: tuple[str, ...] = ()  # of a kernel; empty: the default and the reference
    attention: str | None = None  # implementation of `tree_attention` in an update; None: the platform's
    logprobs: str | None = None  # of `token_logprobs`
    only: tuple[str, ...] = ()  # sides to measure; empty: all


def implementations(kernel: ModuleType, options: Options, reference: bool) -> tuple[str, ...]:
    """Names to measure: those asked for, or the platform's and, where it fits (`reference`), the specification."""
    names = options.implementation
    if not names:
        best = kernel.choose(jax.default_backend())
        names = tuple(dict.fromkeys((best, "reference") if reference else (best,)))
    for name in names:
        if name not in kernel.IMPLEMENTATIONS:
            raise ValueError(f"--implementation={name!r} is unknown: choose of {tuple(kernel.IMPLEMENTATIONS)}")
    return names


def chosen(sides: Sequence, options: Options) -> list:
    """The sides that were asked for. Raises ValueError for a name that none has."""
    names = [side.name for side in sides]
    if unknown := [name for name in options.only if name not in names]:
        raise ValueError(f"--only={','.join(unknown)} is unknown: choose of {tuple(names)}")
    return [side for side in sides if not options.only or side.name in options.only]
