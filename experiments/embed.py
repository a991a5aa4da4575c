"""Embeds all images of a collection by an exported encoder, in forms that other programs read.

IMAGES is a folder, a list (a path a line, optionally a tab and a label) or tfds:NAME. MODEL is what
run.py has exported: a SavedModel, or the folder of its versions. OUT then holds

    embeddings.npy   float32 [N, D], rows of length 1: numpy.load(..., mmap_mode="r")
    paths.txt        what each row is of, a line a row
    shards/          the same in Parquet: path, embedding, width, height, label
    unreadable.csv   the images that were left out, and why
    not_read.txt     files of a folder that are taken for no images, if there are any

The same command continues after a kill where it was, and writes what it would have written without.
docs/find.md says more. search.py finds in what was embedded, embed_beam.py uses many machines.
"""

import argparse
import os
import sys
import time

import program
from program import say

EXAMPLE = "python experiments/embed.py --images=photos --model=runs/x/saved_model --out=embedded"
# Between lines where there is no terminal to write one line anew.
SECONDS_BETWEEN_REPORTS = 10


def main() -> None:
    program.prepare()
    parser = argparse.ArgumentParser(
        usage=EXAMPLE,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser)
    settings = parser.parse_args()
    with program.in_sentences():
        embed(settings)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, help="folder, list or tfds:NAME")
    parser.add_argument("--model", required=True, help="SavedModel, or the folder of its versions")
    parser.add_argument("--out", required=True, help="new folder, or one to continue")
    parser.add_argument("--split", default="train", help="of tfds:NAME; default train")
    parser.add_argument(
        "--data_dir", help="of tfds:NAME, TFDS' folder; of a list, what its paths are relative to"
    )


def embed(settings: argparse.Namespace) -> None:
    program.import_tensorflow()  # Here, as it takes seconds.
    import workdirs

    from isd_tf.data import datasets
    from isd_tf.serving import embed

    # Whoever reads it may do so from another folder.
    data_dir = settings.data_dir and os.path.abspath(os.path.expanduser(settings.data_dir))
    source = {"images": settings.images, "split": settings.split, "data_dir": data_dir}
    dataset = datasets.load_collection(**source)
    say(datasets.describe(dataset))
    encoder = embed.load_encoder(settings.model)
    say(
        f"{encoder.name}: views of {encoder.image_size} x {encoder.image_size} pixels to "
        f"{encoder.dimension} numbers."
    )
    collection = embed.begin(settings.out, encoder, dataset, source)
    with workdirs.lock(collection.folder, "--out"):
        collection.remove_unfinished()
        workdirs.name_left_out(collection.folder, dataset)
        missing = collection.missing
        rest = sum(len(collection.rows_of(number)) for number in missing)
        if missing and rest < len(dataset):
            say(f"Continuing {collection.folder}: {len(dataset) - rest} images are done.")
        with Progress(len(dataset), len(dataset) - rest) as progress:
            embed.embed_shards(encoder, dataset, collection, missing, progress)
        finish(collection, dataset)


def finish(collection, dataset) -> None:
    """Makes the whole of the shards, where it is not there yet, and says what it is."""
    if collection.is_complete:
        say(f"The embeddings in {collection.folder} are complete.")
        return
    skipped = collection.finish()
    if skipped:
        say(
            f"{skipped} images cannot be read, and are left out: {collection.folder}/unreadable.csv"
            " (they are not tried again; once they can be read, use another --out)"
        )
    say(f"Embeddings of {len(dataset) - skipped} images: {collection.folder}")


class Progress:
    """Says how many images are done, how many a second, and how long the rest will take."""

    def __init__(self, total: int, done_before: int):
        self.total, self.done_before = total, done_before
        self.start = self.last = time.monotonic()
        self.is_terminal = sys.stdout.isatty()
        self.line, self.is_shown = "", True

    def __enter__(self):
        return self

    def __call__(self, images: int, skipped: int) -> None:
        from isd_tf.training.monitoring import duration  # With it comes TensorFlow.

        now = time.monotonic()
        rate = images / (now - self.start)
        done = self.done_before + images
        left = (self.total - done) / rate
        self.is_shown = False
        self.line = (
            f"{done} of {self.total} images, {rate:.4g} images/s, {duration(left)} left"
            f"{f', {skipped} unreadable' * (skipped > 0)}"
        )
        if now - self.last > (0.2 if self.is_terminal else SECONDS_BETWEEN_REPORTS):
            self.last = now
            self._show("" if self.is_terminal else "\n")

    def _show(self, end):
        self.is_shown = True
        print(f"\r\033[K{self.line}" if self.is_terminal else f"  {self.line}", end=end, flush=True)

    def __exit__(self, *error):
        if self.line and (self.is_terminal or not self.is_shown):
            self._show("\n")


if __name__ == "__main__":
    main()
