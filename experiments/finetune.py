"""python experiments/finetune.py --encoder=runs/quickstart --dataset=photo_patches --workdir=a

makes a classifier of a pretrained encoder and some labelled images, scores and exports it.

First a linear classifier is fitted to the frozen encoder's features; then the whole network is
trained at a lower rate, from there on. The epoch that is best on a held-out part of the training
images is the result, the linear classifier included. The same command in the same workdir continues
where it was stopped.

Exit codes: 0; 1 for an error that a sentence explains; 130 and 143 when told to stop, by Ctrl-C and
by SIGTERM.
"""

import pathlib
import sys
from typing import NamedTuple

import finetune_settings
import program
from absl import flags
from program import say
from settings import FLAGS

if __name__ == "__main__":
    # Here already: --help and mistakes need not wait for TensorFlow.
    finetune_settings.explain()
    flags.adopt_module_key_flags(finetune_settings)
    program.begin(finetune_settings.read)

program.import_tensorflow()
import flagfiles  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import run_data  # noqa: E402
import tensorflow as tf  # noqa: E402
import workdirs  # noqa: E402
from absl import logging  # noqa: E402

import isd_tf  # noqa: E402
from isd_tf.data import subsets  # noqa: E402
from isd_tf.data.batches import evaluation_batches, finetuning_batches  # noqa: E402
from isd_tf.data.datasets import Dataset  # noqa: E402
from isd_tf.data.decoding import LEFT_OUT, REPLACED, Unreadable, explaining  # noqa: E402
from isd_tf.data.folders import shown  # noqa: E402
from isd_tf.evaluation import confusion, features  # noqa: E402
from isd_tf.finetuning import classifier as finetuning  # noqa: E402
from isd_tf.training import checkpoints as checkpointing  # noqa: E402
from isd_tf.training import distribution, metrics, monitoring  # noqa: E402

FLAG_FILE = "finetune.flags"


class Data(NamedTuple):
    """The labelled images."""

    fit: Dataset  # trained on
    held_out: Dataset  # the rest of the training images: the best epoch is chosen by them
    test: Dataset | None
    class_names: tuple[str, ...]
    weights: np.ndarray  # of the classes


def main():
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        tf.get_logger().setLevel("ERROR")
    strategy = choose_devices()
    data = load_data()
    encoder, image_size, initial = load_encoder(strategy)
    model = build_model(strategy, encoder, data)
    with workdirs.locked(FLAGS.workdir, strategy) as workdir:
        checkpoints = checkpointing.Checkpoints(
            workdir / "checkpoints", model, FLAGS.keep_checkpoints
        )
        begin_or_continue(workdir, checkpoints, data, initial)
        workdirs.note_versions(workdir, checkpoints, "finetune", data.fit)
        workdirs.name_left_out(workdir, data.fit, data.test)
        first_step = checkpoints.restore_newest()
        if first_step:
            say(f"Continuing {workdir} after step {first_step}.")
        run = Run(data, image_size, workdir, counters=[])
        try:
            with explaining(run.counters):
                if not first_step:
                    fit_head(run, model)
                train(run, model, checkpoints, first_step)
            model.return_to_best()
            finish(run, model)
        except KeyboardInterrupt:
            say(f"\nInterrupted. The same command continues after step {checkpoints.newest_step}.")
            sys.exit(130)  # As shells have it: 128 + SIGINT.


def finish(run, model):
    """Scores and exports: after a long training neither takes the other one along."""
    failures = []
    for what, chapter in (("The scoring", score), ("The export", export)):
        try:
            with explaining(run.counters):
                chapter(run, model)
        except Exception as error:
            failures.append(program.failure(what, error))
    if failures:
        raise ValueError(" ".join(failures))


class Run(NamedTuple):
    """What all chapters work on."""

    data: Data
    image_size: int
    workdir: pathlib.Path
    counters: list[Unreadable]  # of all that was read

    def counter(self, dataset: Dataset, fate: str = LEFT_OUT) -> Unreadable:
        """Counts the unreadable images of a dataset that is about to be read."""
        whole = getattr(dataset, "whole", None)
        self.counters.append(
            Unreadable(len(dataset), FLAGS.max_unreadable, fate, FLAGS.max_pixels, whole=whole)
        )
        return self.counters[-1]

    def batches(self, dataset: Dataset, counter: Unreadable | None = None) -> tf.data.Dataset:
        counter = counter or self.counter(dataset)
        return evaluation_batches(dataset, self.image_size, features.BATCH, counter)

    def features(self, encoder: keras.Model, dataset: Dataset) -> features.Features:
        # Kept, so that whoever is stopped while they are computed need not begin anew.
        cache, counter = self.workdir / "features", self.counter(dataset)
        return features.extract(encoder, dataset, self.image_size, counter, cache)


# ---------------------------------------------------------------------------------- chapters


def choose_devices():
    if FLAGS.logical_cpus > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration()] * FLAGS.logical_cpus
        tf.config.set_logical_device_configuration(cpu, parts)
    if FLAGS.deterministic:
        tf.config.experimental.enable_op_determinism()
    strategy = distribution.choose_strategy(FLAGS.strategy)
    checkpointing.exit_when_told()
    replicas = strategy.num_replicas_in_sync
    if FLAGS.batch_size % replicas:
        raise ValueError(
            f"The replicas share the batch evenly. Received: --batch_size={FLAGS.batch_size} for "
            f"{replicas} replicas. Use a multiple of {replicas}, or --strategy=one."
        )
    return strategy


def load_data():
    train, test = isd_tf.datasets.load(
        FLAGS.dataset, FLAGS.train_split, FLAGS.test_split, FLAGS.data_dir, FLAGS.image_list
    )
    for dataset in (train, test):
        if dataset:
            say(isd_tf.datasets.describe(dataset))
    labels = check_labels(train, test)
    if FLAGS.label_fraction < 1:
        rows = subsets.rows_of_fraction(train, FLAGS.label_fraction, FLAGS.seed)
        train = subsets.take(train, rows, f"{100 * FLAGS.label_fraction:g}% of the labels")
        labels = labels[rows]
    if np.bincount(labels).max() < 2:
        raise ValueError(
            "The best epoch is chosen by images that are held out, so that some class needs two. "
            f"Received: one of each of the {len(labels)} classes of {train.name}. Use more labels."
        )
    fit_rows, held_out_rows = subsets.hold_out(labels, FLAGS.held_out, FLAGS.seed)
    if len(fit_rows) < FLAGS.batch_size:
        raise ValueError(
            f"A batch must fit into the images that are trained on. Received: --batch_size="
            f"{FLAGS.batch_size} for {len(fit_rows)} of the {len(labels)} images of {train.name}; "
            f"the other {len(held_out_rows)} are held out. Lower --batch_size or use more labels."
        )
    class_names = train.class_names or tuple(map(str, range(labels.max() + 1)))
    weights = np.ones(len(class_names))
    if FLAGS.class_weights == "balanced":
        weights = finetuning.class_weights(labels[fit_rows], len(class_names))
    data = Data(
        *subsets.divide(train, fit_rows, held_out_rows),
        test,
        class_names,
        weights,
    )
    say(
        f"{len(data.fit)} images to train on, {len(data.held_out)} held out to choose the epoch by."
        + (
            f" Class weights from {weights.min():.2g} to {weights.max():.2g}."
            if weights.min() < 0.99 * weights.max()
            else ""
        )
    )
    return data


def check_labels(train, test):
    """Returns the labels of the training images, if a classifier can be trained by them."""
    # The test images are asked about only where there are some: a list has none.
    reason = run_data.reason_not_to_score(run_data.Data(train, train, test or train))
    if reason:
        raise ValueError(f"No classifier can be trained and scored. {reason}")
    labels = subsets.labels_of(train)
    names = train.class_names or range(labels.max() + 1)
    missing = np.setdiff1d(np.arange(len(names)), labels)
    if len(missing):
        raise ValueError(
            f"Each of the {len(names)} classes of {train.name} needs a labelled image. Received: "
            f"{len(labels)} images, none of {len(missing)} classes, {shown(str(names[missing[0]]))}"
            " first. Add some, or use a source without these classes."
        )
    return labels


def load_encoder(strategy):
    """Returns the encoder, the size of its images, and where its weights are from, if from a file.

    Random weights there are only where --encoder is the name of a network.
    """
    kind, source, size = finetune_settings.kind_of_encoder(), FLAGS.encoder, FLAGS.image_size
    synchronized = strategy.num_replicas_in_sync > 1
    name, width = {"weights": FLAGS.architecture}.get(kind, source), FLAGS.width
    if kind == "run":
        name, trained_size, width = (
            workdirs.flag(pathlib.Path(source), flag) for flag in ("encoder", "image_size", "width")
        )
        size, width = size or int(trained_size), width and int(width)
    elif kind == "keras" and size is None:
        size = keras.saving.load_model(source, compile=False).input_shape[1]
        if size is None:
            raise ValueError(f"{source} does not say for which images it is. Pass --image_size.")
    keras.utils.set_random_seed(FLAGS.seed)
    with strategy.scope():
        encoder = isd_tf.build_encoder(name, size, width, synchronized)
        if kind in ("run", "weights"):
            initial = isd_tf.load_weights(encoder, source)
            say(f"Encoder {name}: {initial.sentence()}")
            return encoder, size, initial._asdict() | {"loaded": initial.loaded._asdict()}
    if kind == "keras":
        say(f"Encoder {name}, with the weights in the file.")
        return encoder, size, {"path": source}
    say(f"Encoder {name}, from scratch: its weights are random, as --encoder names a network.")
    return encoder, size, {}


def epochs_and_steps(data):
    """The epochs of the whole network, at most, and the steps of each."""
    steps = len(data.fit) // FLAGS.batch_size
    usual = np.clip(
        round(finetune_settings.STEPS / steps),
        finetune_settings.FEWEST_EPOCHS,
        finetune_settings.MOST_EPOCHS,
    )
    return int(usual) if FLAGS.epochs is None else FLAGS.epochs, steps


def build_model(strategy, encoder, data):
    epochs, steps = epochs_and_steps(data)
    with strategy.scope():
        model = finetuning.Classifier(
            encoder, len(data.class_names), strategy.num_replicas_in_sync > 1
        )
        # The pretraining's optimizer. Its decay holds for all weights, as there.
        rate = isd_tf.CosineByEpoch(FLAGS.learning_rate, max(epochs, 1), steps)
        model.compile(isd_tf.TorchSGD(rate, coupled_weight_decay=FLAGS.weight_decay))
    return model


def begin_or_continue(workdir, checkpoints, data, initial):
    """Leaves the recipe in a new workdir; in one with checkpoints, compares it."""
    record = workdir / "dataset.json"
    now = {
        "images": len(data.fit) + len(data.held_out),
        "digests": [isd_tf.datasets.fingerprint(part) for part in (data.fit, data.held_out)],
    }
    # Without an epoch of the whole network there are results, and no checkpoint.
    if checkpoints.exist or (workdir / "results.json").exists():
        flagfiles.require_same(workdir / FLAG_FILE, finetune_settings.recipe())
        if record.exists() and workdirs.read_json(record) != now:
            raise ValueError(
                f"The workdir {workdir} was begun with other images than these {now['images']}. "
                "Restore them to continue it, or use another --workdir."
            )
        return
    flagfiles.write(workdir / FLAG_FILE, finetune_settings.own_flags(), "finetune.py")
    workdirs.write_json(record, now)
    if initial:
        workdirs.write_json(workdir / "initial_weights.json", initial)


# Of linear.json: what does not depend on the test images.
OF_TRAINING = ("weight_decay", "held_out_accuracy", "held_out_loss")


def fit_head(run, model):
    """The first phase: the encoder is frozen, and its features are computed once."""
    of_fit, of_held_out = (
        run.features(model.encoder, part) for part in (run.data.fit, run.data.held_out)
    )
    decay = finetuning.fit_head(model, of_fit, of_held_out, run.data.weights)
    accuracy, loss = model.best_score
    say(
        f"Frozen encoder, linear classifier: held_out_accuracy {accuracy:.4g}, held_out_loss "
        f"{loss:.4g} (weight decay {decay:g})"
    )
    linear = {"weight_decay": decay, "held_out_accuracy": accuracy, "held_out_loss": loss}
    if run.data.test:
        linear["test_images"] = isd_tf.datasets.fingerprint(run.data.test)
        linear |= scores(*finetuning.logits_function(model)(run.batches(run.data.test)))
    workdirs.write_json(run.workdir / "linear.json", linear)


def train(run, model, checkpoints, first_step):
    """The second phase: the whole network, at a rate that changes what it has learned little."""
    data, workdir = run.data, run.workdir
    epochs, steps = epochs_and_steps(data)
    patience = FLAGS.patience or max(epochs // 2, 1)
    done = first_step // steps
    if done >= epochs or model.epochs_since_best(done) >= patience:
        return
    unreadable, left_out = run.counter(data.fit, REPLACED), run.counter(data.held_out)
    logits_of = finetuning.logits_function(model)

    def batches_from(step):
        return finetuning_batches(
            data.fit, run.image_size, FLAGS.batch_size, FLAGS.seed, step, unreadable
        )

    def held_out_score():
        return finetuning.score_of(*logits_of(run.batches(data.held_out, left_out)), data.weights)

    checkpointing.fit_from_step(
        model,
        batches_from,
        first_step,
        steps,
        epochs,
        class_weight=dict(enumerate(data.weights)),
        callbacks=[
            checkpointing.StopAtNonFiniteLoss(checkpoints),
            monitoring.Throughput(FLAGS.batch_size),
            finetuning.KeepBest(held_out_score, patience),
            monitoring.Progress(epochs),
            monitoring.TensorBoardLog(workdir / "logs", FLAGS.log_every_steps),
            metrics.MetricsLog(workdir / workdirs.METRICS, steps, FLAGS.log_every_steps),
            checkpointing.SaveCheckpoints(checkpoints, FLAGS.checkpoint_every_steps),
            checkpointing.StopWhenTold(checkpoints),
        ],
        verbose=0,
    )


def scores(logits, labels):
    """The accuracies of logits [N, K], by the names that results.json gives them."""
    classes = logits.shape[1]
    matrix = confusion.confusion_matrix(labels, logits.argmax(axis=1), classes)
    # Among five classes the right one is always among the first five.
    ranks = (1, 5) if classes > 5 else (1,)
    return {f"top{k}": confusion.top_k_accuracy(logits, labels, k) for k in ranks} | {
        "mean_per_class": float(np.nanmean(confusion.per_class(matrix)["recall"]))
    }


def score(run, model):
    """Scores the best epoch on the test images, and writes what it takes for what."""
    data, workdir = run.data, run.workdir
    asked = data.test or data.held_out
    logits, labels = finetuning.logits_function(model)(run.batches(asked))
    linear = workdirs.read_json(workdir / "linear.json")
    asked_then = linear.pop("test_images", None)
    if asked_then != (isd_tf.datasets.fingerprint(data.test) if data.test else None):
        say("The linear classifier was scored on other test images, or on none: left out.")
        linear = {name: value for name, value in linear.items() if name in OF_TRAINING}
    matrix = confusion.confusion_matrix(labels, logits.argmax(axis=1), len(data.class_names))
    confusion.write_confusion_csv(matrix, data.class_names, workdir / "confusion.csv")
    confusion.write_per_class_csv(matrix, data.class_names, workdir / "per_class.csv")
    accuracy, loss = model.best_score
    results = {
        "best_epoch": int(model.best_epoch.numpy()),
        "held_out_accuracy": accuracy,
        "held_out_loss": loss,
        "training_images": len(data.fit),
        "held_out_images": len(data.held_out),
    } | {f"linear_{name}": value for name, value in linear.items()}
    if data.test:
        results |= run_data.shared_images("", [data.fit], data.test) | scores(logits, labels)
        rows = {"frozen, linear": linear} if "top1" in linear else {}
        rows["finetuned"] = results
        say(f"\nOn the {len(labels)} images of {asked.name}:")
        columns = [name for name in ("top1", "top5", "mean_per_class") if name in results]
        say(" " * 20 + "".join(f"{name.replace('_', ' '):>16}" for name in columns))
        for title, row in rows.items():
            say(f"{title:20}" + "".join(f"{row[name]:>16.1%}" for name in columns))
        say(f"(Of epoch {results['best_epoch']}, the best on the held-out images; 0 is linear.)\n")
    else:
        say(
            f"There are no test images. The tables are about the {len(labels)} held-out ones, by "
            "which the epoch was chosen: a little too good."
        )
    path = workdirs.record(workdir, results, int(model.step.numpy()))
    say(f"By class: {workdir / 'per_class.csv'}, {workdir / 'confusion.csv'}\nResults: {path}")


def export(run, model):
    folder = run.workdir / "saved_model"
    workdirs.remove_unfinished(folder)
    path = isd_tf.export_encoder(
        model.encoder,
        run.image_size,
        folder,
        model.head,
        run.data.class_names,
        FLAGS.max_pixels,
        about=workdirs.about(run.workdir, FLAG_FILE),
    )
    say(f"SavedModel with the signature classify: {path}")


if __name__ == "__main__":
    program.run(main)
