"""Inside a `shard_map`: over which mesh axes arrays vary."""

from typing import Any

import jax


def vary_together(arrays: Any) -> Any:
    """The same tree, all of whose arrays vary over the axes that any of them does; elsewhere `arrays` as they are.

    A kernel's results and a loop's carry then have one type, and the sums of gradients over parts follow from it.
    """
    varying = lambda x: jax.typeof(x).manual_axis_type.varying  # noqa: E731
    axes = frozenset().union(*(varying(x) for x in jax.tree.leaves(arrays)))
    missing = lambda x: tuple(sorted(axes - varying(x)))  # noqa: E731
    return jax.tree.map(lambda x: jax.lax.pcast(x, missing(x), to="varying") if missing(x) else x, arrays)
