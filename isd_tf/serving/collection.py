"""The embeddings of a collection on disk, in forms that other programs read.

    embeddings.json   of which images, by which model
    shards/           Parquet files: path, embedding, width, height, label
    embeddings.npy    all embeddings, float32 [N, D]
    paths.txt         what each row is of, a line a row
    unreadable.csv    what could not be read, and why

A shard is of a fixed part of the images, and appears complete; the rest is made of the shards. So
whatever ends the work, what is there is right, and what is missing is known.
"""

import contextlib
import csv
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from isd_tf.data.folders import shown

ABOUT, SHARDS, ARRAY = "embeddings.json", "shards", "embeddings.npy"
KNOWN = {"images", "model", "count", "dimension", "shard_images"}  # In ABOUT.
PATHS, UNREADABLE = "paths.txt", "unreadable.csv"
# Images of a shard: what is lost at most, beside the one that is being written, by a kill.
SHARD_IMAGES = 4096
# Readers of Parquet pass over names that begin with this one's first character.
UNFINISHED = "_unfinished-"
# Beside what JSON escapes: what ends a line for Python or moves a cursor, and no UTF-8.
ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def escape(name: str) -> str:
    r"""Writes any name as one line of UTF-8: the inside of a JSON string.

    Ordinary names stay as they are. A line end becomes \n, a backslash \\, a quote \", and a byte
    that is no UTF-8 \udcXX, as Python has it in names of files (`os.fsencode` gives the byte back).
    """
    text = json.dumps(name, ensure_ascii=False)[1:-1]
    return ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def unescape(line: str) -> str:
    """Returns the name that `escape` has written."""
    return json.loads(f'"{line}"')


class Skipped(NamedTuple):
    """An image that could not be read."""

    row: int  # counted from 0 in the list of all images
    name: str
    reason: str


class Shard(NamedTuple):
    """The embeddings of a part of the images, in the order of the list."""

    names: Sequence[str]
    embeddings: np.ndarray  # float32 [n, D], unit rows
    sizes: np.ndarray  # int32 [n, 2], width and height
    labels: Sequence[str | None]
    skipped: Sequence[Skipped]


@dataclasses.dataclass(frozen=True)
class Collection:
    """A folder of embeddings.

    Attributes:
        folder: where it is.
        about: what `embeddings.json` says: "images" and "model", what they are of and by, each
            with a "sha256"; "count" of the images, "dimension" D, "shard_images".
    """

    folder: pathlib.Path
    about: dict

    @classmethod
    def begin(cls, folder: str | os.PathLike, about: dict) -> "Collection":
        """Makes the folder, or finds in it what was begun.

        Raises:
            FileExistsError: when it holds something else, or embeddings of other images or by
                another model.
            OSError: when it cannot be written.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / ABOUT).exists():
            others = sorted(p.name for p in folder.iterdir() if not _is_passing(p.name))
            if others:
                raise FileExistsError(
                    f"The output folder must be empty, or hold embeddings. Received: "
                    f"{shown(str(folder))}, which holds {', '.join(map(shown, others[:3]))}"
                    f"{' and more' * (len(others) > 3)}. Use another --out."
                )
            with appearing_whole(folder / ABOUT) as unfinished:
                unfinished.write_text(json.dumps(about, indent=2) + "\n")
        begun = cls._read(folder)
        for key, what in (("model", "by another model"), ("images", "of other images")):
            if begun.about[key]["sha256"] != about[key]["sha256"]:
                raise FileExistsError(
                    f"{shown(str(folder))} holds embeddings {what}: {_told(begun.about[key])}. "
                    f"Received: {_told(about[key])}. Use another --out."
                )
        (folder / SHARDS).mkdir(exist_ok=True)
        return begun

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "Collection":
        """Opens a folder whose embeddings are complete.

        Raises:
            FileNotFoundError: when there are none, or not all.
        """
        folder = pathlib.Path(folder)
        if not (folder / ABOUT).exists():
            raise FileNotFoundError(
                f"Expected a folder that embed.py has written. Received: {shown(str(folder))}, "
                f"which {'has no ' + ABOUT if folder.is_dir() else 'does not exist'}."
            )
        found = cls._read(folder)
        if not found.is_complete:
            raise FileNotFoundError(
                f"The embeddings in {shown(str(folder))} are not complete: {len(found.missing)} of "
                f"{found.shards} shards are missing. The same call of embed.py as before continues."
            )
        return found

    @classmethod
    def _read(cls, folder):
        try:
            about = json.loads((folder / ABOUT).read_text())
        except ValueError as error:
            raise ValueError(f"{folder / ABOUT} is damaged: {error}.") from None
        if not isinstance(about, dict) or not KNOWN <= about.keys():
            raise FileExistsError(
                f"Expected an {ABOUT} that embed.py has written. Received: another program's, in "
                f"{shown(str(folder))}. Use another folder."
            )
        return cls(folder, about)

    @property
    def shards(self) -> int:
        """How many shards there are once all are written."""
        return -(-self.about["count"] // self.about["shard_images"])

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are not written yet."""
        return [number for number in range(self.shards) if not self.shard_path(number).exists()]

    @property
    def is_complete(self) -> bool:
        return (self.folder / ARRAY).exists()

    def shard_path(self, number: int) -> pathlib.Path:
        return self.folder / SHARDS / f"part-{number:05d}-of-{self.shards:05d}.parquet"

    def rows_of(self, number: int) -> range:
        """Which images a shard is of."""
        size = self.about["shard_images"]
        return range(self.about["count"])[number * size : (number + 1) * size]

    def remove_unfinished(self) -> None:
        """Removes what a process that was killed has left half-way; no other may be at work."""
        for place in (self.folder, self.folder / SHARDS):
            for leftover in place.glob(f"{UNFINISHED}*"):
                leftover.unlink()

    def write_shard(self, number: int, shard: Shard) -> None:
        """Writes a shard, with what was skipped in its metadata, so that both appear at once."""
        values = pa.array(np.ascontiguousarray(shard.embeddings, np.float32).reshape(-1))
        columns = {
            "path": pa.array(map(escape, shard.names), pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(values, self.about["dimension"]),
            "width": pa.array(shard.sizes[:, 0], pa.int32()),
            "height": pa.array(shard.sizes[:, 1], pa.int32()),
            "label": pa.array(shard.labels, pa.string()),
        }
        skipped = json.dumps([(row, escape(name), reason) for row, name, reason in shard.skipped])
        table = pa.table(columns).replace_schema_metadata({"unreadable": skipped})
        with appearing_whole(self.shard_path(number)) as unfinished:
            # Nothing repeats among the numbers of embeddings.
            pq.write_table(table, unfinished, use_dictionary=["label"])

    def finish(self) -> int:
        """Makes of all shards the one array, the names, and the list of what was skipped.

        Returns:
            How many images were skipped.

        Raises:
            ValueError: when no image could be read, or a shard is damaged.
        """
        paths = [self.shard_path(number) for number in range(self.shards)]
        count, skipped = 0, []
        for path in paths:
            with self._undamaged(path):
                metadata = pq.read_metadata(path)
                count += metadata.num_rows
                skipped += map(tuple, json.loads(metadata.metadata[b"unreadable"]))
        with appearing_whole(self.folder / UNREADABLE) as unfinished:
            with open(unfinished, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("row", "path", "reason"), *skipped])
        if not count:
            for path in paths:
                path.unlink()
            raise ValueError(
                f"None of the {self.about['count']} images of {self.about['images']['name']} can "
                f"be read. {self.folder / UNREADABLE} says of each why. Once they can, the same "
                "call reads them."
            )
        with appearing_whole(self.folder / PATHS) as unfinished:
            with open(unfinished, "w", encoding="utf-8", newline="") as file:
                for path in paths:
                    names = self._columns(path, ["path"])["path"].to_pylist()
                    file.writelines(f"{name}\n" for name in names)
        # Last: where it is, all is.
        with appearing_whole(self.folder / ARRAY) as unfinished, open(unfinished, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False}
            shape = (count, self.about["dimension"])
            np.lib.format.write_array_header_1_0(file, header | {"shape": shape})
            for path in paths:
                column = self._columns(path, ["embedding"])["embedding"]
                for chunk in column.chunks:
                    file.write(chunk.flatten().to_numpy().astype("<f4", copy=False).tobytes())
        return len(skipped)

    def embeddings(self) -> np.ndarray:
        """float32 [N, D], unit rows, read as they are needed."""
        with self._undamaged(self.folder / ARRAY):
            return np.load(self.folder / ARRAY, mmap_mode="r")

    def names(self) -> list[str]:
        """What each row is of."""
        with open(self.folder / PATHS, encoding="utf-8", newline="\n") as file:
            return [unescape(line.removesuffix("\n")) for line in file]

    def known(self) -> pa.Table:
        """What is known of each row beside its embedding: path, width, height, label."""
        columns = ["path", "width", "height", "label"]
        parts = [self._columns(self.shard_path(i), columns) for i in range(self.shards)]
        return pa.concat_tables(parts)

    def _columns(self, path, names):
        with self._undamaged(path):
            return pq.read_table(path, columns=names).replace_schema_metadata()

    @contextlib.contextmanager
    def _undamaged(self, path):
        try:
            yield
        except (ValueError, EOFError, OSError) as error:
            if getattr(error, "errno", None):  # Of the system, which says itself what it is.
                raise
            both = f"it and {ARRAY}" if path.name != ARRAY else "it"
            raise ValueError(
                f"{shown(str(path))} is damaged: {str(error).splitlines()[0]}. Remove {both}: the "
                "same call of embed.py as before makes anew what is missing."
            ) from error


def _is_passing(name):
    return name.startswith((".", UNFINISHED))


def _told(what):
    return f"{shown(what['name'])} (digest {what['sha256'][:12]})"


@contextlib.contextmanager
def appearing_whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path beside another, to which it is renamed once all is on the disk."""
    unfinished = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)  # What is left of it fills the disk.
