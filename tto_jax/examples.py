"""Examples of supervised fine-tuning, as tokens: which of them are learned, and how they are packed into rows."""

import dataclasses
import hashlib
from collections.abc import Iterable

import grain
import numpy as np

from tto_jax.core import token_tree
from tto_jax.core.types import TokenTree


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokens of examples that fit into a row."""

    tokens: tuple[np.ndarray, ...]  # i32[T] each
    trained: tuple[np.ndarray, ...]  # bool[T] each, never the first token
    dropped: int  # longer than a row
    fingerprint: str  # 16 hexadecimal digits of all tokens in order

    @property
    def num_tokens(self) -> int:
        """Of all examples together."""
        return sum(len(row) for row in self.tokens)


def collect(found: Iterable[tuple[np.ndarray, np.ndarray]], row_length: int) -> Examples:
    """Examples of (tokens i32[T], trained bool[T]); those longer than a row are dropped and counted.

    Raises ValueError if nothing fits.
    """
    found = list(found)
    kept = [(tokens, trained) for tokens, trained in found if len(tokens) <= row_length]
    if not kept:
        raise ValueError(f"row_length={row_length}: none of the {len(found)} examples fits, choose a longer row")
    digest = hashlib.sha256()
    for row, mask in kept:
        digest.update(np.int64(row.size).tobytes() + row.tobytes() + mask.tobytes())
    tokens, trained = zip(*kept)
    return Examples(tokens, trained, len(found) - len(kept), digest.hexdigest()[:16])


def training_rows(
    examples: Examples, rows: int, row_length: int, seed: int, epochs: int | None = None
) -> grain.DatasetIterator[TokenTree]:
    """Batches of packed rows; every epoch is shuffled anew, no example is cut. The state is a few numbers.

    Endless, unless `epochs` says how often every example comes; then the last batch is filled with empty rows.
    """
    return iter(_packed(grain.MapDataset.source(_Source(examples)).shuffle(seed).repeat(epochs), rows, row_length))


def evaluation_rows(examples: Examples, rows: int, row_length: int) -> list[TokenTree]:
    """Every example once, packed; the last batch is filled with empty rows."""
    return list(_packed(grain.MapDataset.source(_Source(examples)), rows, row_length))


@dataclasses.dataclass(frozen=True)
class _Source:
    """What grain reads from."""

    examples: Examples

    def __len__(self) -> int:
        return len(self.examples.tokens)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": self.examples.tokens[index], "trained": self.examples.trained[index]}


def _packed(order, rows, row_length):
    """First fit, into as many open rows as a batch has."""
    one_at_a_time = order.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    lengths = {"tokens": row_length, "trained": row_length}
    packed = grain.experimental.FirstFitPackIterDataset(
        one_at_a_time, length_struct=lengths, num_packing_bins=rows, shuffle_bins=False
    )
    return packed.batch(rows).map(lambda batch: _filled(_tree(batch), rows))


def _tree(batch) -> TokenTree:
    """An example is a tree of one trunk; grain numbers those of a row from 1, and calls padding 0."""
    tree = batch["tokens_segment_ids"] - 1
    return token_tree.packed(batch["tokens"], tree, batch["tokens_positions"], batch["trained"] & (tree >= 0))


def _filled(batch: TokenTree, rows: int) -> TokenTree:
    """A batch of so many rows, the last ones empty."""
    missing = rows - len(batch.tokens)
    if not missing:
        return batch
    empty = token_tree.packed(*(np.zeros((missing, batch.tokens.shape[1]), x) for x in (int, int, int, bool)))
    empty = dataclasses.replace(empty, tree=empty.tree - 1)
    join = lambda a, b: np.concatenate([a, np.asarray(b, a.dtype)])  # noqa: E731
    return TokenTree(*(join(getattr(batch, f.name), getattr(empty, f.name)) for f in dataclasses.fields(batch)))
