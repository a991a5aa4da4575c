"""From a dataset to batches: order, decoding, views.

The order of the images and both views of each are a pure function of (seed, step): nothing is
shuffled by state, so a run continued at any step sees what the uninterrupted run would have seen,
and the number of replicas and workers changes nothing: of each global batch a worker prepares its
own rows. For arrays and files this holds image by image; for streams of TFRecord files, of which
every worker reads all records and decodes its own, as long as the shards and the STREAM_* constants
stay the same. (Where another library resizes files, some pixels differ by a level or two: see
`python_crops`.) Only tf.data service (`data_service`) gives the order up.
"""

import tensorflow as tf

from isd_tf.data import service
from isd_tf.data.datasets import ArrayDataset, Dataset, is_labelled, untuned
from isd_tf.data.decoding import REPLACED, Unreadable
from isd_tf.data.looks import GROUP, CentreCrop, RandomCrops, SizedCentreCrop, as_it_stands
from isd_tf.data.readers import READERS, Order, counted_in_training, in_own_order, mapped
from isd_tf.views import augment

# A batch of 256 pairs of 224x224 crops takes 77 MB, so few are kept ready.
PREFETCHED_BATCHES = 2
# What a batch calls the views that it has of each image.
VIEW_NAMES = {1: ("view",), 2: ("teacher_view", "student_view")}


def pretraining_batches(
    dataset: Dataset,
    views: tuple[str, ...],
    image_size: int,
    global_batch_size: int,
    seed: int,
    first_step: int = 0,
    unreadable: Unreadable | None = None,
    input_context: tf.distribute.InputContext | None = None,
    data_service: service.DataService | None = None,
) -> tf.data.Dataset:
    """Makes the endless stream of batches from `first_step` on.

    An epoch is a permutation of the images by (seed, epoch), its remainder dropped. Every image is
    decoded once and seen through the teacher's and the student's recipe, or one for both.

    Args:
        dataset: what to read.
        views: recipes of the teacher and of the student, each of `augment.RECIPES`; or a single
            one, of a view that both see.
        image_size: side S of the views in pixels.
        global_batch_size: B, over all replicas.
        seed: of order and views.
        first_step: step, counted from 0, of the first batch.
        unreadable: counts images that cannot be read; by default none is tolerated.
        input_context: as `distribute_datasets_from_function` of a strategy hands it over; by
            default there is one worker with one replica.
        data_service: where other machines prepare the batches, first come first served.

    Returns:
        Dicts of "teacher_view" and "student_view", or of "view", and, if the dataset has labels, of
        "label", int64 [b]. A view is the host's half of one: under its recipe's name uint8 crops
        [b, S, S, 3] and their seeds, int64 [b, 2]. The model does the rest; `augment.finish` does
        it by hand. One global batch is one element for each replica of this worker in turn, b = B /
        replicas.

    Raises:
        ValueError: for an unknown recipe, a batch larger than the dataset, or one that the replicas
            cannot share evenly.
        OSError: when the data service cannot be reached, or still has no worker after a minute.
    """
    check_views(views)
    if not 1 <= global_batch_size <= len(dataset):
        raise ValueError(
            f"A batch must have at least 1 image and at most the dataset's {len(dataset)}. "
            f"Received: global_batch_size={global_batch_size}. Lower --batch_size."
        )
    context = input_context or tf.distribute.InputContext()
    if global_batch_size % context.num_replicas_in_sync:
        raise ValueError(
            f"{context.num_replicas_in_sync} replicas cannot share a batch of {global_batch_size} "
            f"evenly. Use a multiple of {context.num_replicas_in_sync} as --batch_size."
        )
    replicas_here = context.num_replicas_in_sync // context.num_input_pipelines
    unreadable = unreadable or Unreadable(len(dataset), 0.0, REPLACED)
    order = Order(len(dataset), global_batch_size, seed, first_step)
    if data_service:
        service.require_workers(data_service.address)
        dataset = service.with_whole_paths(dataset)
    else:
        order = order._replace(
            workers=context.num_input_pipelines, worker=context.input_pipeline_id
        )
    look = RandomCrops(
        image_size,
        tuple(augment.RECIPES[recipe].area for recipe in views),
        _view_seeds(views, seed),
        in_service=data_service is not None,
    )
    seen = READERS[type(dataset)](dataset, order, look, unreadable)
    batches = seen.rebatch(global_batch_size // context.num_replicas_in_sync, drop_remainder=True)

    # [b], [b], [b], for each view [b, S, S, 3], [b]
    def by_name(places, failures, readable, cut, labels):
        batch = {"label": labels} if is_labelled(dataset) else {}
        parts = zip(VIEW_NAMES[len(views)], views, cut, look.seeds(places), strict=True)
        batch |= {name: {recipe: (crop, seeds)} for name, recipe, crop, seeds in parts}
        return places, failures, readable, batch

    batches = batches.map(as_it_stands(by_name))
    options = tf.data.Options()
    options.deterministic = True
    # Parallel over images: threads inside an operation would wait for each other.
    options.threading.max_intra_op_parallelism = 1
    batches = batches.with_options(options)
    if data_service:
        # Every trainer takes from the same job, whose batches the service's workers make. Where a
        # service knows the name it goes on with that job, whatever dataset it is handed now.
        batches = batches.apply(
            tf.data.experimental.service.distribute(
                tf.data.experimental.service.ShardingPolicy.DYNAMIC,
                f"grpc://{data_service.address}",
                job_name=f"{data_service.job} from {first_step}",
            )
        )
        # They come in no order: what could not be read counts from the beginning on.
        batches = batches.map(as_it_stands(lambda places, *rest: (tf.zeros_like(places), *rest)))
        others_count = context.num_input_pipelines > 1
        batches = counted_in_training(batches, unreadable, others_count)
    batches = batches.map(as_it_stands(lambda *parts: parts[-1]))
    return _kept_ready(batches, PREFETCHED_BATCHES * replicas_here)


def evaluation_batches(
    dataset: Dataset, image_size: int, batch_size: int, unreadable: Unreadable | None = None
) -> tf.data.Dataset:
    """Makes the batches of one pass over a dataset in its own order.

    Args:
        dataset: what to read.
        image_size: side S of the views in pixels.
        batch_size: images in a batch; the last may have fewer.
        unreadable: counts images that cannot be read, which are left out.

    Returns:
        Pairs of float32 [b, S, S, 3], evaluation views, and int64 [b], labels (-1: unknown).
    """
    batches = numbered_batches(dataset, image_size, batch_size, unreadable)
    return batches.map(as_it_stands(lambda rows, views, labels: (views, labels)))


def numbered_batches(
    dataset: Dataset, image_size: int, batch_size: int, unreadable: Unreadable | None = None
) -> tf.data.Dataset:
    """Makes `evaluation_batches`, and before each one's views says which images they are of.

    Returns:
        Triples of int64 [b], places in the dataset, and the views and labels.
    """
    seen = in_own_order(dataset, CentreCrop(image_size), unreadable, batch_size)

    def finish(places, crops, labels):  # [b], one of [b, S, S, 3], [b]
        return places, augment.normalize(augment.to_unit_range(crops[0])), labels

    batches = mapped(seen.rebatch(batch_size), finish)
    if isinstance(dataset, ArrayDataset):
        # All can be read. Where the number of batches is unknown, Keras warns at the last one.
        count = -(-len(dataset) // batch_size)
        batches = batches.apply(tf.data.experimental.assert_cardinality(count))
    return _kept_ready(batches)


def sized_batches(
    dataset: Dataset, image_size: int, batch_size: int, unreadable: Unreadable | None = None
) -> tf.data.Dataset:
    """Makes `numbered_batches` of fixed places of the dataset, and says how large images are.

    Batch i has places i * batch_size to (i + 1) * batch_size, and fewer images, or none, where
    some cannot be read: what an image shares its batch with depends on no image of another one.

    Args:
        dataset, image_size, unreadable: as in `numbered_batches`.
        batch_size: places of a batch, a multiple of GROUP; the last may have fewer.

    Returns:
        Tuples of places [b], views and labels, and int32 [b, 2], width and height of the upright
        images.

    Raises:
        ValueError: for another batch size.
    """
    if batch_size < 1 or batch_size % GROUP:
        raise ValueError(f"batch_size must be a multiple of {GROUP}. Received: {batch_size}.")
    seen = in_own_order(dataset, SizedCentreCrop(image_size), unreadable, batch_size)
    if not isinstance(dataset, ArrayDataset):
        # Groups of as many places, of as many images as could be read.
        seen = mapped(
            seen.ragged_batch(batch_size // GROUP),
            lambda *parts: tf.nest.map_structure(lambda part: part.merge_dims(0, 1), parts),
        )

    def finish(places, crops_and_sizes, labels):
        crops, sizes = crops_and_sizes
        return places, augment.normalize(augment.to_unit_range(crops)), labels, sizes

    return _kept_ready(mapped(seen, finish))


def numbered_views(
    dataset: Dataset,
    views: tuple[str, ...],
    image_size: int,
    seed: int,
    unreadable: Unreadable | None = None,
) -> tf.data.Dataset:
    """Draws the views of each image of a dataset in its own order, by its number.

    Args:
        dataset: few images.
        views, image_size, seed: as in `pretraining_batches`.
        unreadable: counts images that cannot be read, which are left out.

    Returns:
        Tuples of the views, the teacher's and the student's or one, each as `pretraining_batches`
        has them with b = 1, and of the label, int64 [1] (-1: unknown).
    """
    areas = tuple(augment.RECIPES[recipe].area for recipe in views)
    look = RandomCrops(image_size, areas, _view_seeds(views, seed))

    def finish(places, crops, labels):
        parts = zip(views, crops, look.seeds(places), strict=True)
        return *({recipe: (crop, seeds)} for recipe, crop, seeds in parts), labels

    return untuned(mapped(in_own_order(dataset, look, unreadable, 1).rebatch(1), finish))


def probe_batches(
    dataset: Dataset,
    image_size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    unreadable: Unreadable | None = None,
) -> tf.data.Dataset:
    """Makes the batches of one epoch for a linear classifier: one random view an image.

    Args:
        dataset: what to read.
        image_size: side S of the views in pixels.
        batch_size: images in a batch; the last of the epoch has what remains.
        seed: of order and views, together with the epoch.
        epoch: counted from 0.
        unreadable: counts images that cannot be read, which the next ones replace.

    Returns:
        Pairs of float32 [b, S, S, 3], views of the recipe "crop", and int64 [b], labels.
    """
    order = Order(len(dataset), min(batch_size, len(dataset)), seed, keep_remainder=True)
    first_step = epoch * order.steps_per_epoch
    order = order._replace(first_step=first_step, last_step=first_step + order.steps_per_epoch)
    return _labelled_views(dataset, image_size, order, unreadable)


def finetuning_batches(
    dataset: Dataset,
    image_size: int,
    global_batch_size: int,
    seed: int,
    first_step: int = 0,
    unreadable: Unreadable | None = None,
) -> tf.data.Dataset:
    """Makes the endless stream of labelled batches from `first_step` on: one random view an image.

    An epoch is a permutation of the images by (seed, epoch), its remainder dropped.

    Args:
        dataset: what to read; labelled.
        image_size: side S of the views in pixels.
        global_batch_size: B, over all replicas.
        seed: of order and views.
        first_step: step, counted from 0, of the first batch.
        unreadable: counts images that cannot be read, which the next ones replace.

    Returns:
        Pairs of float32 [B, S, S, 3], views of the recipe "crop", and int64 [B], labels.

    Raises:
        ValueError: for a batch larger than the dataset.
    """
    if not 1 <= global_batch_size <= len(dataset):
        raise ValueError(
            f"A batch must have at least 1 image and at most the dataset's {len(dataset)}. "
            f"Received: global_batch_size={global_batch_size}. Lower --batch_size."
        )
    order = Order(len(dataset), global_batch_size, seed, first_step)
    return _labelled_views(dataset, image_size, order, unreadable)


def _labelled_views(dataset, image_size, order, unreadable):
    unreadable = unreadable or Unreadable(len(dataset), 0.0, REPLACED)
    recipe = augment.RECIPES["crop"]
    look = RandomCrops(image_size, (recipe.area,), (order.seed,))
    seen = READERS[type(dataset)](dataset, order, look, unreadable)

    # [b], [b], [b], one of [b, S, S, 3], [b]
    def finish(places, failures, readable, crops, labels):
        return recipe.finish(crops[0], look.seeds(places)[0]), labels

    # Of whole batches alone, the number of images is known before they are there.
    whole = not order.keep_remainder
    views = mapped(seen.rebatch(order.global_batch_size, drop_remainder=whole), finish)
    return _kept_ready(views)


def _kept_ready(batches, count=PREFETCHED_BATCHES):
    return untuned(batches).prefetch(count)


def check_views(views: tuple[str, ...]) -> None:
    """Raises ValueError unless `views` names two recipes, or one."""
    if len(views) not in VIEW_NAMES or not set(views) <= set(augment.RECIPES):
        raise ValueError(
            f"Unknown views. Expected two of {', '.join(augment.RECIPES)}, the teacher's and then "
            "the student's, such as weak/strong, or one that both see. Received: "
            f"{'/'.join(views)}."
        )


def _view_seeds(views, seed):
    """A seed for each view, of its own in every run."""
    return tuple(2 * seed + i for i in range(len(views)))
