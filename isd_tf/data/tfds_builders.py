"""Finds a TFDS builder by its name, and prepares its files where they are not yet."""

import difflib
import os
import pathlib
import re
from typing import TYPE_CHECKING

from absl import logging

if TYPE_CHECKING:
    # It takes seconds to import, and is imported where one of its datasets is asked for.
    import tensorflow_datasets as tfds

DEBIAN_FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")


def prepared_builder(
    name: str, data_dir: str | None, other_names: tuple[str, ...]
) -> "tfds.core.DatasetBuilder":
    """Returns the builder of a dataset, and prepares its files if they are not there.

    Args:
        name: as TFDS takes it, such as "cifar10".
        data_dir: TFDS' folder; None: its own.
        other_names: that are no dataset of TFDS and could be meant.

    Raises:
        ValueError: for a name that TFDS does not know or cannot open.
        FileNotFoundError: where the files are not prepared and cannot be.
    """
    import tensorflow_datasets as tfds

    names = [*other_names, *tfds.list_builders(with_community_datasets=False)]
    # As people write them: CIFAR-10, Fashion MNIST.
    plain = re.sub(r"[^a-z0-9_]", "", re.sub(r"[ -]+(?=[a-z])", "_", name.lower()))
    close = difflib.get_close_matches(plain, names, n=5)
    suggestion = f" Did you mean {', '.join(close)}?" if close else ""
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"Unknown dataset. Received: {name!r}.{suggestion}"
            f" Known are {', '.join(other_names)} and the {len(names) - len(other_names)} names of "
            f"TensorFlow Datasets, from {names[len(other_names)]} to {names[-1]}."
        ) from None
    except Exception as error:  # Whatever versions, configurations and namespaces raise.
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ValueError(
            f"TensorFlow Datasets cannot open this dataset ({reason}). Received: {name!r}."
            f"{suggestion}"
        ) from error
    if not _is_prepared(builder):
        _prepare(builder, data_dir)
        builder = tfds.builder(name, data_dir=data_dir)
    return builder


def _is_prepared(builder):
    return bool(builder.info.splits) and all(
        os.path.exists(path) for split in builder.info.splits.values() for path in split.filepaths
    )


def _prepare(builder, data_dir):
    if builder.name == "fashion_mnist" and DEBIAN_FASHION_MNIST.is_dir():
        logging.info("Preparing fashion_mnist from Debian's package at %s.", DEBIAN_FASHION_MNIST)
        import tensorflow_datasets as tfds

        with tfds.core.registered.skip_registration():
            # The class name is the folder's name, so that the official builder finds the files.
            local = type(type(builder).__name__, (_LocalFashionMNIST, type(builder)), {})
        local(data_dir=data_dir).download_and_prepare()
        return
    logging.info("Preparing %s by TensorFlow Datasets in %s.", builder.name, builder.data_dir)
    try:
        builder.download_and_prepare()
    except Exception as error:  # Whatever its downloads, extractors and checks raise.
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise FileNotFoundError(
            f"The dataset {builder.name} is not prepared in {builder.data_dir}, and TensorFlow "
            f"Datasets could not prepare it ({reason}). Prepare it where its files are to be had "
            f"(`tfds build {builder.name}` says how) and pass TFDS' folder as --data_dir (of "
            "--transfer and --label_dataset: --tfds_data_dir); or use a folder with train/ and "
            "val/ inside: --dataset=folder --data_dir=PATH."
        ) from error


class _LocalFashionMNIST:
    """Mixed into TFDS' builder: reads the four files of Debian's dataset-fashion-mnist.

    TFDS rejects their checksums, as Debian compressed the same bytes again.
    """

    def _split_generators(self, dl_manager):
        def split(prefix, count):
            images = DEBIAN_FASHION_MNIST / f"{prefix}-images-idx3-ubyte.gz"
            labels = DEBIAN_FASHION_MNIST / f"{prefix}-labels-idx1-ubyte.gz"
            return self._generate_examples(
                count, dl_manager.extract(images), dl_manager.extract(labels)
            )

        return {"train": split("train", 60_000), "test": split("t10k", 10_000)}
