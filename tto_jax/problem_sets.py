"""Sets of problems with known answers: stored as a tensorflow-datasets set, opened by index.

TensorFlow is not needed (records are array_record files, read as a data source), and nothing is downloaded.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from tto_jax.problem_files import Contents, Record
from tto_jax.tasks.problem import Problem

_READ_AT_ONCE = 1024  # records, where all are read
_NAME, _VERSION, _SPLIT = "problem_set", "1.0.0", "problems"


def write_set(contents: Contents, out: str | os.PathLike, *, name: str = "", overwrite: bool = False) -> "ProblemSet":
    """Stores `contents` as the folder `out`, in their order, and opens it.

    The folder is written beside its place and renamed at the end: a killed writer leaves nothing that opens.

    Args:
      contents: as `read_files` returns them.
      out: a folder on a local file system, which must not exist, or be empty, or hold a set if `overwrite`.
      name: what the set is called in reports; empty: the folder's name.
      overwrite: replace the set that is there.

    Raises:
      FileExistsError: `out` holds a set and `overwrite` is not given, or it holds something else.
      ValueError: `out` is no local path.
    """
    out = _local(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if _stored_name(out) != _NAME:
            raise FileExistsError(f"{out} holds something that is no problem set: choose another --out")
        if not overwrite:
            raise FileExistsError(f"{out} holds a problem set: choose another --out, or replace it with --overwrite")
    metadata = {
        "name": name or out.name,
        "fingerprint": contents.fingerprint(),
        "files": list(contents.files),
        "skipped": list(contents.skipped),
        "duplicates": contents.duplicates,
    }
    temporary = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with _quiet():
            builder = _builder_class()(contents.records, metadata, temporary)
            builder.download_and_prepare()
        _publish(builder.data_path, out, aside=temporary / "replaced")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_set(out)


def _publish(new: os.PathLike, out: Path, aside: Path) -> None:
    """Renames `new` to `out`; what was there goes aside, and comes back if that fails."""
    if out.exists():
        out.rename(aside)
    try:
        os.rename(new, out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise


@functools.cache
def _builder_class():
    """The builder. Made late: the import takes half a second, which pages without problem sets need not wait for."""
    import numpy as np
    import tensorflow_datasets as tfds

    class Info(tfds.core.DatasetInfo):
        def initialize_from_bucket(self):
            """Nothing is looked up elsewhere."""

    class ProblemSetBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = _NAME
        VERSION = tfds.core.Version(_VERSION)
        code_path = None  # no README or checksums lie beside the code (to look for them takes a package more)

        def __init__(self, records: Sequence[Record], metadata: dict, data_dir: Path):
            self._records, self._metadata = records, metadata
            super().__init__(data_dir=data_dir, file_format="array_record")

        def _info(self):
            features = {
                "id": np.uint32,
                "question": tfds.features.Text(),
                "answers": tfds.features.Sequence(tfds.features.Text()),
                "file": tfds.features.Text(),
                "line": np.int64,
            }
            return Info(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                metadata=tfds.core.MetadataDict(self._metadata),
                disable_shuffling=True,  # record i is problem i: evaluation goes in the order of the files
            )

        def _split_generators(self, _):
            return {_SPLIT: self._generate_examples()}

        def _generate_examples(self):
            for index, record in enumerate(self._records):
                problem = record.problem
                example = {"id": problem.id, "question": problem.prompt, "answers": list(problem.answers)}
                yield index, example | {"file": record.file, "line": record.line}

    return ProblemSetBuilder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and sentences (of downloads that do not happen) of tensorflow-datasets."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


@dataclasses.dataclass(frozen=True)
class ProblemSet(Sequence[Problem]):
    """A prepared set: problems by index, in the order of the files they came from, read when they are asked for.

    Pickles as its path. Use `open_set` to make one.
    """

    path: str  # absolute
    name: str
    fingerprint: str  # of the content: equal for equal ids, questions and answers in equal order
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        return self.__getitems__([index])[0]

    def __iter__(self) -> Iterator[Problem]:
        for start in range(0, self.size, _READ_AT_ONCE):
            yield from self.__getitems__(range(start, min(start + _READ_AT_ONCE, self.size)))

    def __getitems__(self, indices: Sequence[int]) -> list[Problem]:
        """Several at once, which is several times faster than one by one."""
        return [
            Problem(int(row["id"]), row["question"].decode(), tuple(answer.decode() for answer in row["answers"]))
            for row in self._rows(indices)
        ]

    def where(self, index: int) -> str:
        """`FILE:LINE` that a problem came from, FILE as it was given when the set was prepared."""
        row = self._rows([index])[0]
        return f"{row['file'].decode()}:{row['line']}"

    def __reduce__(self):
        return open_set, (self.path,)

    @functools.cached_property
    def _source(self):
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self.path).as_data_source(_SPLIT)

    def _rows(self, indices: Sequence[int]) -> list[dict]:
        for index in indices:
            if not 0 <= index < self.size:
                raise IndexError(f"index {index} must be in 0..{self.size - 1}")
        try:
            return self._source.__getitems__(list(indices))
        except Exception as error:  # of several kinds, by what is wrong with the file
            raise ValueError(f"{self.path} is damaged: {error}. {_PREPARE}") from error


_PREPARE = "Make it with `python -m tto_jax.prepare_data --files=FILE,FILE --out=FOLDER` (and --overwrite)"


def open_set(path: str | os.PathLike) -> ProblemSet:
    """The set in a folder that `python -m tto_jax.prepare_data` wrote.

    Raises FileNotFoundError if nothing is there, and ValueError if it is something else or damaged (the first and the
    last record are read; every record carries a checksum that is checked when it is read).
    """
    path = _local(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no problem set {path}. {_PREPARE}")
    if _stored_name(path) != _NAME:
        raise ValueError(f"{path} is not a prepared problem set. {_PREPARE}")
    import tensorflow_datasets as tfds

    try:
        info = tfds.builder_from_directory(path).info
        size, metadata = info.splits[_SPLIT].num_examples, info.metadata
        name, fingerprint = metadata["name"], metadata["fingerprint"]
    except Exception as error:  # of several kinds, by what is wrong with the files
        raise ValueError(f"{path} is damaged: {error!r}. {_PREPARE}") from error
    if str(info.version) != _VERSION:
        raise ValueError(f"{path} is a problem set of version {info.version}, not {_VERSION}. {_PREPARE}")
    found = ProblemSet(str(path), name, fingerprint, size)
    found.__getitems__([0, size - 1])
    return found


def _local(path: str | os.PathLike) -> Path:
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(f"{text}: a problem set lies on a local file system; copy it there")
    return Path(os.path.abspath(os.path.expanduser(text)))


def _stored_name(path: Path) -> str | None:
    """The name of the builder that wrote the folder, or None if none did."""
    try:
        return json.loads((path / "dataset_info.json").read_bytes()).get("name")
    except (OSError, ValueError, AttributeError):
        return None
