"""What a recipe needs at the least, against what the machine has: refused before it is tried.

Tried, it would take minutes, or the system would end the process without a word.
"""

import os

import tensorflow as tf
from settings import FLAGS

from isd_tf.networks import encoders

FLOAT = 4  # bytes
VIEWS = 2
# Of every weight: the student's, the teacher's, its gradient and its momentum.
COPIES = 4


def require_for_networks(images: int) -> None:
    """Raises ValueError where weights, or the views of one step, cannot fit into the memory.

    Args:
        images: of a step that this machine trains on.
    """
    size = FLAGS.image_size
    step, what = images * size**2 * VIEWS * 3 * FLOAT, "--batch_size and --image_size"
    if FLAGS.encoder in encoders.ARCHITECTURES:
        _, stages, width, _ = encoders.ARCHITECTURES[FLAGS.encoder]
        width = FLAGS.width or width
        # A convolution of the last stage, 3x3.
        weights = COPIES * FLOAT * 9 * (width * 2 ** (len(stages) - 1)) ** 2
        _require(weights, f"the weights of --width={width}", "--width")
        # The stem's output, before and after its BatchNorm.
        side = size if size <= encoders.LARGEST_SMALL_IMAGE else size // 2
        step += images * side**2 * width * 2 * FLOAT
        what += " or --width"
    _require(step, f"{images} images of {size} x {size} pixels a step", what)


def require_for_queue(dimension: int) -> None:
    """Raises ValueError where the queue of embeddings of this length cannot fit into the memory."""
    if FLAGS.queue_size:
        needed = FLAGS.queue_size * dimension * FLOAT
        _require(needed, f"--queue_size={FLAGS.queue_size} of length {dimension}", "--queue_size")


def _require(needed, what, flags):
    there = available()
    if needed > there:
        raise ValueError(
            f"The memory does not suffice: {what} need at least {needed / 2**30:.0f} GiB. "
            f"Received: a machine with {there / 2**30:.0f} GiB. Lower {flags}."
        )


def available() -> int:
    """Bytes of memory of this machine; without limit where GPUs have their own.

    TensorFlow tells how much of a GPU's memory is in use, not how much there is: where it runs out,
    what is raised ends in a sentence.
    """
    if tf.config.list_physical_devices("GPU"):
        return 2**63
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
