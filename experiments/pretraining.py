"""The training itself: batches from any step on, and what watches, counts and saves."""

import random
import time
from collections.abc import Callable

import keras
import reporting
import run_data
import settings
import tensorflow as tf
import workdirs
from absl import logging
from evaluations import Run
from program import say
from settings import FLAGS

import isd_tf
from isd_tf.data.datasets import Dataset
from isd_tf.data.decoding import REPLACED, Unreadable
from isd_tf.evaluation import knn
from isd_tf.report import health
from isd_tf.training import checkpoints as checkpointing
from isd_tf.training import cluster, metrics, monitoring
from isd_tf.training.unreadable import CountUnreadable

# Where no epoch is scored.
EPOCHS_BETWEEN_PAGES = 10


def pretrain(run: Run, first_step: int) -> None:
    """Trains the model from after a step on, to the last epoch."""
    model, train, checkpoints, workdir = run.model, run.data.train, run.checkpoints, run.workdir
    unreadable = run.counter(train, REPLACED)
    if first_step >= run_data.all_steps(train):
        say("The pretraining is complete.")
        return
    strategy = checkpoints.strategy
    batches_from = stream(strategy, train, unreadable)
    start = time.monotonic()
    last_means = {}

    def record_epoch(epoch, logs):
        # Accuracies are the evaluation's to tell.
        scored = ("nn", "nn_rare")
        means = {name: float(value) for name, value in logs.items() if not name.endswith(scored)}
        means["pretrain_seconds_since_start"] = time.monotonic() - start
        last_means.update(means)
        means["unreadable_images"] = counting.count
        try:
            workdirs.record(workdir, means, checkpoints.step)
        except OSError as error:
            if FLAGS.if_checkpoint_fails == "stop":
                raise
            logging.error("The epoch's results cannot be written (%s).", error)

    counting = CountUnreadable(
        strategy, unreadable.met_before, unreadable.refusal, FLAGS.batch_size
    )
    stop = checkpointing.StopWhenTold(checkpoints)
    watching = [
        monitoring.EpochMeans(),
        monitoring.Throughput(FLAGS.batch_size),
        *_knn_callback(run, stop),
        monitoring.Progress(FLAGS.epochs),
        monitoring.TensorBoardLog(workdir / "logs", FLAGS.log_every_steps),
        metrics.MetricsLog(
            workdir / workdirs.METRICS, run_data.steps_per_epoch(train), FLAGS.log_every_steps
        ),
        *_page_callback(run, stop),
        keras.callbacks.LambdaCallback(on_epoch_end=record_epoch),
    ]
    checking = [monitoring.CheckReplicas(settings.batch_norm()[0])] if FLAGS.check_replicas else []
    checkpointing.fit_from_step(
        model,
        batches_from,
        first_step,
        run_data.steps_per_epoch(train),
        FLAGS.epochs,
        callbacks=[
            counting,
            checkpointing.StopAtNonFiniteLoss(checkpoints),
            *checking,
            *(watching if cluster.is_chief(strategy) else []),
            checkpointing.SaveCheckpoints(checkpoints, FLAGS.checkpoint_every_steps),
            stop,
        ],
        verbose=0,
    )
    if last_means.get("embedding_std", 1) < health.COLLAPSED_STD:
        logging.warning(
            "Nothing was learned: all images have nearly the same embedding (embedding_std %.2g, "
            "where about 1 is usual). Are they all alike, black for example? --stages=check looks "
            "at them. If they are not, try a lower --learning_rate or a higher --teacher_momentum.",
            last_means["embedding_std"],
        )


def stream(
    strategy: tf.distribute.Strategy, train: Dataset, unreadable: Unreadable
) -> Callable[[int], tf.distribute.DistributedDataset]:
    """Returns a function from a step to the batches from there on, on this worker's devices."""
    service = None
    if FLAGS.data_service:
        # The chief's number names the job: an earlier start's would hold batches of other steps.
        number = cluster.gather_from_workers(strategy, random.SystemRandom().getrandbits(60))[0]
        service = isd_tf.DataService(FLAGS.data_service, f"{number}")

    def batches_from(step):
        return strategy.distribute_datasets_from_function(
            lambda context: isd_tf.pretraining_batches(
                train,
                settings.views(),
                FLAGS.image_size,
                FLAGS.batch_size,
                FLAGS.seed,
                step,
                unreadable,
                context,
                service,
            )
        )

    return batches_from


def _knn_callback(run, stop):
    data, every = run.data, FLAGS.knn_every_epochs
    if not every or run_data.reason_not_to_score(data):
        return []
    bank, queries = run.batches(data.bank), run.batches(data.test)
    references = {}
    # What the page holds the student against; compress, as it is on the way to its teacher.
    if "report" in FLAGS.stages or FLAGS.method == "compress":
        references = {"raw_pixels": knn.raw_pixels, "untrained": run.encoder("untrained")}
    return [knn.EvaluateKNN(bank, queries, every, data.rare_labels, references, lambda: stop.told)]


def _page_callback(run, stop):
    if "report" not in FLAGS.stages:
        return []
    every = FLAGS.knn_every_epochs or EPOCHS_BETWEEN_PAGES
    return [reporting.Refresh(run, run_data.all_steps(run.data.train), every, lambda: stop.told)]
