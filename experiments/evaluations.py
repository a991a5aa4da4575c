"""What the evaluate stage of run.py does: the paper's scores and pictures, a function each.

docs/evaluation.md says which command gives which table or figure, and names every score.
"""

import functools
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import keras
import numpy as np
import program
import run_data
import tensorflow as tf
import workdirs
from program import say
from settings import FLAGS, numbers

import isd_tf
from isd_tf.data import subsets
from isd_tf.data.batches import evaluation_batches, probe_batches
from isd_tf.data.datasets import Dataset, RecordDataset, is_labelled
from isd_tf.data.decoding import LEFT_OUT, REPLACED, Unreadable, explaining
from isd_tf.data.folders import shown
from isd_tf.evaluation import clusters, features, knn, linear, neighbors, transfer, votes
from isd_tf.methods.student import Student
from isd_tf.report import figures
from isd_tf.training.checkpoints import Checkpoints

# Of the pictures: rows, and images beside each other.
QUERIES, NEIGHBORS = 8, 8
SHOWN_CLUSTERS, SHOWN_MEMBERS = 10, 12
# Of the probabilities in the picture of the queue. MSF has none, and is shown as ISD would see it.
TEMPERATURES = {
    "isd": lambda: FLAGS.teacher_temperature,
    "moco_v2": lambda: FLAGS.temperature,
    "compress": lambda: FLAGS.temperature,
    "msf": lambda: 0.02,
}
SCORED_ON_TEST = ("knn", "linear", "fast_linear", "weighted_knn", "few_shot_knn")
# Steps of SGD below which `linear` says that they are few. ImageNet's 1% of the labels take 2000.
FEW_STEPS = 1000


class Run(NamedTuple):
    """A run: what is trained, on what, and where it is kept."""

    model: Student
    data: run_data.Data
    views: tuple[str, ...]
    workdir: pathlib.Path
    checkpoints: Checkpoints
    counters: list[Unreadable]  # of all that was read

    @property
    def step(self) -> int:
        return self.checkpoints.step

    def explaining(self):
        """Explains errors by the unreadable images that are met inside."""
        self.counters.clear()
        return explaining(self.counters)

    def counter(self, dataset: Dataset, fate: str = LEFT_OUT) -> Unreadable:
        """Counts the unreadable images of a dataset that is about to be read."""
        whole = getattr(dataset, "whole", None)
        self.counters.append(
            Unreadable(len(dataset), FLAGS.max_unreadable, fate, FLAGS.max_pixels, whole=whole)
        )
        return self.counters[-1]

    def encoder(self, name: str) -> keras.Model:
        if name in ("untrained", "initial"):
            keras.utils.set_random_seed(FLAGS.seed)  # As when the student was built.
            encoder = isd_tf.build_encoder(FLAGS.encoder, FLAGS.image_size, FLAGS.width)
            if name == "initial":
                isd_tf.load_weights(encoder, self.workdir / workdirs.INITIAL_WEIGHTS)
            return encoder
        return self.model.encoders()[name]

    def batches(self, dataset: Dataset, counter: Unreadable | None = None):
        counter = counter or self.counter(dataset)
        return evaluation_batches(dataset, FLAGS.image_size, features.BATCH, counter)

    def features(self, encoder: keras.Model, dataset: Dataset) -> features.Features:
        return features.extract(
            encoder, dataset, FLAGS.image_size, self.counter(dataset), self.workdir / "features"
        )

    def record(self, scores: dict[str, float]) -> None:
        workdirs.record(self.workdir, scores, self.step)


def check_data(data: run_data.Data) -> None:
    """Raises ValueError, before the training, where an evaluation would fail on these images."""
    asked, rows = run_data.asked_images(data), numbers("query_images", int)
    if any(row >= len(asked) for row in rows):
        raise ValueError(
            f"--query_images must be rows of the {len(asked)} images of {asked.name}. Received: "
            f"{','.join(FLAGS.query_images)}."
        )
    if (FLAGS.clusters or 0) > len(data.bank):
        raise ValueError(
            f"--clusters must be at most the {len(data.bank)} images of {data.bank.name}. "
            f"Received: {FLAGS.clusters}."
        )
    protocols = {"linear", "fast_linear"} & set(FLAGS.evaluations)
    several = any(len(_settings(protocol)) > 1 for protocol in protocols)
    # Reading the labels of a stream takes a pass over all of its records.
    is_stream = isinstance(data.bank, RecordDataset) and not FLAGS.label_dataset
    if protocols and not is_stream and (_few_labels() or several and is_labelled(data.bank)):
        labelled, _ = _labelled_images(data.bank)
        if several and not isinstance(labelled, RecordDataset):
            subsets.hold_out(labelled.labels, linear.HELD_OUT_SHARE, FLAGS.seed)


def evaluate(run: Run) -> list[str]:
    """Does all of --evaluations, and records each one's scores as soon as it has them.

    Returns:
        What went wrong, a sentence for each evaluation that failed: the others are done all the
        same, and so is what comes after a long training.
    """
    workdirs.remove_unfinished(run.workdir / "features")
    failures, compared = [], False
    for name in FLAGS.evaluations:
        try:
            reason = reason_not_to(name, run)
            if reason and "pretrain" in FLAGS.stages:
                say(f"Not evaluated: {name}. {reason}")
                continue
            if reason:
                raise ValueError(reason)
            if name in SCORED_ON_TEST and not compared:
                compared = True
                run.record(run_data.shared_images("", [run.data.bank], run.data.test))
            with run.explaining():
                EVALUATIONS[name](run)
        except Exception as error:  # Whatever it is, hours of training are worth more.
            failures.append(program.failure(f"The evaluation {name}", error))
    return failures


def reason_not_to(name: str, run: Run) -> str | None:
    """Why an evaluation cannot be done after this training, or None."""
    bank = run.data.bank
    if name in SCORED_ON_TEST:
        return run_data.reason_not_to_score(run.data)
    if name == "clusters" and not (FLAGS.clusters or is_labelled(bank)):
        return f"{bank.name} has no classes to take their number from. Pass --clusters."
    if name == "clusters" and not FLAGS.clusters and run_data.has_one_class(bank):
        return f"{bank.name} has one class: a single cluster is none. Pass --clusters."
    if name == "neighbors" and not hasattr(run.model, "queue"):
        return f"--method={FLAGS.method} has no queue."
    if name == "neighbors" and workdirs.used_data_service(run.workdir):
        return "The training's --data_service gave the images an order that cannot be repeated."
    if name == "neighbors" and run.step * FLAGS.batch_size < FLAGS.queue_size:
        return f"The queue is not full of images after {run.step} steps."
    if name == "curves":
        try:
            workdirs.read_curves(run.workdir)
        except FileNotFoundError as error:
            return str(error)
    return None


# --------------------------------------------------------------------- the paper's tables 1, 4, 5


def evaluate_knn(run: Run) -> None:
    bank, test, rare = run.data.bank, run.data.test, run.data.rare_labels
    names = ["untrained", *(["initial"] if FLAGS.initial_weights else []), "student", "teacher"]
    encoders = {name: run.encoder(name) for name in names}
    contestants = {"raw_pixels": knn.raw_pixels, **encoders}
    counters = run.counter(bank), run.counter(test)
    batches = map(run.batches, (bank, test), counters)
    scores = isd_tf.knn_accuracy(contestants, *batches, rare_labels=rare)
    among, asked = (counter.readable for counter in counters)
    say(f"\nNearest neighbours of {asked} images of {test.name} among {among}:")
    columns = {"1nn": "1-NN", "20nn": "20-NN", "1nn_rare": "1-NN rare", "20nn_rare": "20-NN rare"}
    columns = {key: title for key, title in columns.items() if f"student_{key}" in scores}
    if "20nn" not in columns:
        say("20-NN needs 20 images to search, and is left out.")
    if rare and "1nn_rare" not in columns:
        say(f"{test.name} has no images of the rare classes.")
    say(" " * 20 + "".join(f"{title:>12}" for title in columns.values()))
    for name in contestants:
        values = [scores[f"{name}_{column}"] for column in columns]
        say(f"{name.replace('_', ' '):20}" + "".join(f"{value:>12.1%}" for value in values))
    say("")
    run.record(scores)


def evaluate_linear(run: Run) -> None:
    def train(encoder, dataset, settings):
        counter = run.counter(dataset, REPLACED)

        def views_of_epoch(epoch):
            return probe_batches(
                dataset, FLAGS.image_size, linear.BATCH, FLAGS.seed, epoch, counter
            )

        def report_epoch(epoch, losses):
            if epoch % 5 == 4:
                of_several = f", the lowest of {len(losses)} settings" if len(losses) > 1 else ""
                say(
                    f"  linear: epoch {epoch + 1} of {FLAGS.linear_epochs}, mean cross-entropy "
                    f"{np.fmin.reduce(losses):.4f}{of_several}"
                )

        return linear.train(
            encoder,
            views_of_epoch,
            run.features(encoder, dataset),
            settings,
            FLAGS.seed,
            FLAGS.linear_epochs,
            report_epoch,
        )

    _score_linear(run, "linear", train)


def evaluate_fast_linear(run: Run) -> None:
    def fit(encoder, dataset, settings):
        features_ = run.features(encoder, dataset)
        # The reference's decay stands beside a mean over the images, L-BFGS' L2 beside their sum.
        count = len(features_.labels)
        return linear.fit(features_, [setting.weight_decay * count for setting in settings])

    _score_linear(run, "fast_linear", fit)


def _few_labels():
    return FLAGS.label_fraction < 1 or FLAGS.label_dataset


def _settings(protocol):
    """The settings that a protocol tries."""
    usual = linear.FEW_LABELS_WEIGHT_DECAYS if _few_labels() else [linear.WEIGHT_DECAY]
    decays = numbers("linear_weight_decays", float) or usual
    if protocol == "fast_linear":
        return [linear.Setting(decay, None) for decay in decays]
    usual = linear.FEW_LABELS_LEARNING_RATES if _few_labels() else [linear.LEARNING_RATE]
    rates = numbers("linear_learning_rates", float) or usual
    return [linear.Setting(decay, rate) for rate in rates for decay in decays]


def _score_linear(run, protocol, classifiers_of):
    """Chooses a setting, trains it on all labelled images, and scores it on the test images.

    `classifiers_of` takes an encoder, labelled images and settings.
    """
    labelled, suffix = _labelled_images(run.data.bank)
    for name in FLAGS.evaluated_encoders:
        encoder = run.encoder(name)
        of_encoder = functools.partial(classifiers_of, encoder)
        features_of = functools.partial(run.features, encoder)
        choice = linear.choose(_settings(protocol), labelled, of_encoder, features_of, FLAGS.seed)
        classifiers = of_encoder(labelled, [choice.chosen])
        known, test = features_of(labelled).labels, features_of(run.data.test)
        prefix = f"{name}_{protocol}{suffix}"
        # Among five classes the right one is always among the first five.
        ranks = (1, 5) if len(np.unique(known)) > 5 else (1,)
        accuracies = {k: float(linear.top_k_accuracy(classifiers, test, k)[0]) for k in ranks}
        say(
            f"{protocol.replace('_', ' ')} on {len(known)} images of {labelled.name}, {name}: "
            + ", ".join(f"top-{k} {accuracy:.1%}" for k, accuracy in accuracies.items())
        )
        steps = FLAGS.linear_epochs * math.ceil(len(known) / linear.BATCH)
        if protocol == "linear" and steps < FEW_STEPS:
            say(
                f"  These were {steps} steps of SGD, few for a classifier that begins at random. "
                "fast_linear is at the minimum whatever the number of images; --linear_epochs and "
                "--linear_learning_rates change this protocol."
            )
        scores = {f"{prefix}_top{k}": accuracy for k, accuracy in accuracies.items()}
        chosen = _hyper_parameters(choice.chosen)
        tried = [
            _hyper_parameters(setting) | {"held_out_top1": accuracy}
            for setting, accuracy in choice.accuracies.items()
        ]
        if protocol == "linear":
            chosen["epochs"] = FLAGS.linear_epochs
        search = {"scores": scores, "chosen": chosen, "tried": tried, "step": run.step}
        search["training_images"] = len(known)
        _record_search(run, prefix, search)
        run.record(scores | {f"{prefix}_{key}": value for key, value in chosen.items()})


def _hyper_parameters(setting):
    return {name: value for name, value in setting._asdict().items() if value is not None}


def _labelled_images(bank):
    """The images whose labels a linear classifier may use, and what they add to a score's name."""
    if FLAGS.label_dataset:
        labelled, _ = isd_tf.datasets.load(FLAGS.label_dataset, data_dir=FLAGS.tfds_data_dir)
        if labelled.class_names != bank.class_names:
            raise ValueError(
                f"--label_dataset must have the classes of {bank.name}. Received: {labelled.name}, "
                f"with {len(labelled.class_names)} classes, not the same {len(bank.class_names)}."
            )
        return labelled, "_" + FLAGS.label_dataset.replace("/", "_")
    if FLAGS.label_fraction == 1:
        return bank, ""
    rows = subsets.rows_of_fraction(bank, FLAGS.label_fraction, FLAGS.seed)
    share = f"{100 * FLAGS.label_fraction:g}"
    return subsets.take(bank, rows, f"{share}% of the labels"), f"_{share}pct"


# ------------------------------------------------------------------------------ the paper's table 2


def evaluate_transfer(run: Run) -> None:
    accuracies, left_out = {name: [] for name in FLAGS.evaluated_encoders}, {}
    for encoder_name in accuracies:
        workdirs.forget(run.workdir, f"{encoder_name}_transfer_")
    workdirs.forget(run.workdir, "transfer_")
    for name in FLAGS.transfer:
        task = transfer.task_of(name)
        say(f"Transfer to {name} ({task.source}).")
        try:
            with run.explaining():
                splits = transfer.load(task, FLAGS.tfds_data_dir, FLAGS.seed)
                prefix = f"transfer_{transfer.score_name(name)}_"
                known = [splits.training, splits.validation]
                shared = run_data.shared_images(prefix, known, splits.test)
                of_encoders = [
                    _transfer_to(run, encoder_name, name, task.metric, splits)
                    for encoder_name in accuracies
                ]
        # No other OSError: a full disk is no reason to leave a dataset out.
        except (ValueError, FileNotFoundError, PermissionError, tf.errors.OpError) as error:
            left_out[name] = program.sentence(error)
            say(
                f"  Left out: {left_out[name]}\n  (Here --tfds_data_dir names TFDS' folder, and "
                "folder:PATH among --transfer a folder.)"
            )
            continue
        for of_one, (accuracy, found) in zip(accuracies.values(), of_encoders, strict=True):
            of_one.append(accuracy)
            run.record(found)
        run.record(shared)
    if len(left_out) == len(FLAGS.transfer):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"None of the datasets could be had and scored. {reasons}")
    for encoder_name, of_one in accuracies.items():
        mean = float(np.mean(of_one))
        say(
            f"  {encoder_name}: mean {mean:.1%} over {len(of_one)} of {len(FLAGS.transfer)} "
            f"datasets{', without ' * bool(left_out)}{', '.join(left_out)}."
        )
        prefix = f"{encoder_name}_transfer"
        counts = {f"{prefix}_datasets": len(of_one), f"{prefix}_left_out": len(left_out)}
        run.record({f"{prefix}_mean": mean} | counts)


def _transfer_to(run, encoder_name, name, metric, splits):
    """The accuracy on one dataset, and its figures: from their file, if it is about the same."""
    encoder = run.encoder(encoder_name)
    prefix = f"{encoder_name}_transfer_{transfer.score_name(name)}"
    key = [features.key(encoder, split, FLAGS.image_size) for split in splits]
    search = _read_search(run, prefix)
    if search.get("key") != key:
        score = transfer.evaluate(splits, functools.partial(run.features, encoder), metric)
        search = {
            "key": key,
            "scores": {f"{prefix}_{metric}": score.accuracy},
            "chosen": {"l2": score.l2},
            "tried": [{"l2": l2, "validation": value} for l2, value in score.validation.items()],
            "step": run.step,
        }
        _record_search(run, prefix, search)
    (accuracy,) = search["scores"].values()
    say(f"  {encoder_name}, {name}: {accuracy:.1%} ({metric.replace('_', ' ')})")
    return accuracy, search["scores"] | {f"{prefix}_l2": search["chosen"]["l2"]}


def _record_search(run, name, search):
    """Keeps what was tried beside what came of it."""
    path = run.workdir / "searches" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    workdirs.write_json(path, search)


def _read_search(run, name):
    path = run.workdir / "searches" / f"{name}.json"
    return workdirs.read_json(path) if path.exists() else {}


# ------------------------------------------------------------------------ scores of other papers


def evaluate_weighted_knn(run: Run) -> None:
    for name in FLAGS.evaluated_encoders:
        scores = votes.weighted_accuracy(*_bank_and_test(run, name))
        say(f"Votes by exp(cosine / T), {name}:")
        for title, accuracy in scores.items():
            _, neighbors_, temperature, top = title.split("_")
            say(f"  {neighbors_[:-2]:>4}-NN, T = {temperature[1:]}, {top}: {accuracy:.1%}")
        run.record({f"{name}_{title}": accuracy for title, accuracy in scores.items()})


def evaluate_few_shot_knn(run: Run) -> None:
    for name in FLAGS.evaluated_encoders:
        scores = votes.few_shot_accuracy(*_bank_and_test(run, name), seed=FLAGS.seed)
        for shots, score in scores.items():
            say(
                f"1-NN among {shots} images a class, {name}: {score.mean:.1%} "
                f"(deviation of {votes.DRAWS} draws: {score.std:.1%})"
            )
            run.record({f"{name}_{shots}shot_{key}": x for key, x in score._asdict().items()})


def _bank_and_test(run, encoder_name):
    encoder = run.encoder(encoder_name)
    return run.features(encoder, run.data.bank), run.features(encoder, run.data.test)


# --------------------------------------------------------------------------- the paper's figures


def evaluate_clusters(run: Run) -> None:
    bank = run.data.bank
    for name in FLAGS.evaluated_encoders:
        count = FLAGS.clusters or len(np.unique(subsets.labels_of(bank)))
        features_ = run.features(run.encoder(name), bank)
        found = clusters.cluster(features_, count, FLAGS.seed)
        scores = {f"{name}_clusters_{key}": value for key, value in found.scores.items()}
        values = ", ".join(f"{key} {value:.3f}" for key, value in found.scores.items())
        values = values or "without classes to compare with"
        say(f"{count} clusters of {len(found.assignments)} images of {bank.name}, {name}: {values}")
        run.record(scores | {f"{name}_clusters": count})
        members = clusters.draw_members(
            found.assignments, SHOWN_CLUSTERS, SHOWN_MEMBERS, FLAGS.seed
        )
        path = run.workdir / "figures" / f"clusters_{name}.png"
        shown_rows = [features_.rows[of_cluster] for of_cluster in members]
        figures.draw_clusters(views_of_rows(run, bank, shown_rows), path)
        say(f"Members of clusters: {path}")


def views_of_rows(
    run: Run, dataset: Dataset, rows_of_groups: Sequence[np.ndarray]
) -> list[list[np.ndarray]]:
    """The evaluation views at rows of a dataset, which can be read, in groups as these."""
    rows = np.unique(np.concatenate(rows_of_groups))
    found = np.concatenate([v for v, _ in run.batches(subsets.take(dataset, rows, "shown"))])
    views = dict(zip(rows, found, strict=True))
    return [[views[row] for row in group] for group in rows_of_groups]


def evaluate_neighbors(run: Run) -> None:
    asked = run_data.asked_images(run.data)
    rows = numbers("query_images", int)
    if not rows:
        rows = np.random.RandomState(FLAGS.seed).permutation(len(asked))[:QUERIES]
    rows = np.unique(rows)
    path = run.workdir / "figures" / "neighbors.png"
    found = find_neighbors(run, rows, NEIGHBORS)
    figures.draw_neighbors(found, path, list(map(shown, asked.class_names)))
    say(f"Neighbours in the queue of --query_images={','.join(map(str, rows))}: {path}")


def find_neighbors(run: Run, rows: np.ndarray, count: int) -> neighbors.QueueNeighbors:
    """Finds the `count` anchors of the queue that are nearest to each of some asked images."""
    return neighbors.find(
        run.model,
        TEMPERATURES[FLAGS.method](),
        subsets.take(run_data.asked_images(run.data), rows, "queries"),
        run.data.train,
        run.views,
        FLAGS.image_size,
        FLAGS.batch_size,
        FLAGS.seed,
        count,
        run.counter(run.data.train, REPLACED),
    )


def evaluate_curves(run: Run) -> None:
    curves = {
        shown(str(workdir)): workdirs.read_curves(pathlib.Path(workdir))
        for workdir in (run.workdir, *FLAGS.compare_with)
    }
    path = run.workdir / "figures" / "student_teacher.png"
    figures.draw_curves(curves, path)
    say(f"Student against teacher: {path}")


EVALUATIONS = {
    "knn": evaluate_knn,
    "linear": evaluate_linear,
    "fast_linear": evaluate_fast_linear,
    "weighted_knn": evaluate_weighted_knn,
    "few_shot_knn": evaluate_few_shot_knn,
    "transfer": evaluate_transfer,
    "clusters": evaluate_clusters,
    "neighbors": evaluate_neighbors,
    "curves": evaluate_curves,
}
