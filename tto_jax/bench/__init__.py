"""The measurements: `python -m tto_jax.bench TARGET`, see `page`. Nothing is imported here before it is needed: the
number of threads is set before jax starts, and a peer's process holds no jax.
"""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """The page."""
    from tto_jax.bench import page

    page.main(argv)
