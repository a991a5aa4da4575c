"""The rules behind `auto`: queue, epochs and learning rate by the number of images and the batch.

docs/settings.md says what each rests on. Knows neither TensorFlow nor isd_tf.
"""

# ISD's and CompRess' on ImageNet's 1.28 million images.
LARGEST_QUEUE = 128_000
# ISD's epochs on ImageNet; and how often few images are seen, as far as was measured: more of it
# was better, from 300 images on.
FEWEST_EPOCHS, MOST_EPOCHS = 200, 1000
IMAGES_SEEN = 200_000
FEW_IMAGES = IMAGES_SEEN // FEWEST_EPOCHS
# Of the papers on ImageNet, at a batch of 256; ISD's is that of its ResNet-50, with a cosine.
LEARNING_RATES = {"isd": 0.05, "moco_v2": 0.03, "byol": 0.05, "msf": 0.05, "compress": 0.01}
PAPERS_BATCH = 256
# What was best on 3000 images, at two batches; and up to where that is believed.
SHORT_TRAININGS_FACTOR, SHORT_BELOW_IMAGES = 4, 100_000
# The paper scores its 200 epochs every ten.
SCORES = 20


def queue_size(images: int, batch_size: int) -> tuple[int, str]:
    """The largest power of two of at most half of the images; at least the batch, at most 128 000.

    Returns:
        The number of anchors, and the reason in words.
    """
    half = 2 ** (max(images // 2, 1).bit_length() - 1)
    if batch_size > half:
        return batch_size, f"the batch, as half of {images} images are fewer"
    if half > LARGEST_QUEUE:
        return LARGEST_QUEUE, f"the paper's, as half of {images} images are more"
    return half, f"the largest power of two of at most half of {images} images"


def epochs(images: int) -> tuple[int, str]:
    """The paper's 200; of fewer images more, until IMAGES_SEEN are seen or MOST_EPOCHS are over.

    Returns:
        The number of epochs, and the reason in words.
    """
    needed = -(-IMAGES_SEEN // images)
    if needed <= FEWEST_EPOCHS:
        return FEWEST_EPOCHS, "the paper's"
    if needed >= MOST_EPOCHS:
        return MOST_EPOCHS, f"the most for few images ({images})"
    return needed, f"so many that {IMAGES_SEEN} images are seen in all"


def learning_rate(method: str, batch_size: int, images: int) -> tuple[float, str]:
    """The paper's of a method, or with fewer images four times as much, by the batch.

    In proportion to the batch: Goyal et al., arXiv:1706.02677.

    Returns:
        The rate of the first epoch, and the reason in words.
    """
    papers = LEARNING_RATES[method]
    is_short = images < SHORT_BELOW_IMAGES
    factor = SHORT_TRAININGS_FACTOR if is_short else 1
    times = f"{factor} times " * is_short
    return (
        factor * papers * batch_size / PAPERS_BATCH,
        f"{times}the paper's {papers} at a batch of {PAPERS_BATCH}, in proportion to {batch_size}",
    )


def knn_every_epochs(epochs: int) -> int:
    """How often to score so many epochs: twenty times, if there are as many."""
    return max(1, epochs // SCORES)
