"""Pretrains an encoder by ISD, scores it and exports it.

    python experiments/run.py --flagfile=quickstart.flags
    python experiments/run.py --flagfile=imagenet.flags --data_dir=PATH --workdir=runs/imagenet

Flag files are looked for in the working directory and then beside this file. The same command in
the same workdir continues where it was stopped.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time

# Before TensorFlow is imported: it leaves oneDNN off on CPUs without AVX-512, at half the speed.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import flagfiles  # noqa: E402
import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
from absl import app, flags, logging  # noqa: E402

import isd_tf  # noqa: E402
from isd_tf import checkpoints as checkpointing  # noqa: E402
from isd_tf import distribution, encoders, monitoring  # noqa: E402
from isd_tf.decoding import Unreadable, explaining  # noqa: E402
from isd_tf.evaluation import knn  # noqa: E402

FLAGS = flags.FLAGS
STAGES = ("pretrain", "evaluate", "export")
EVALUATION_BATCH = 256

# Data
flags.DEFINE_string("dataset", None, "photo_patches, folder, list, or a TFDS name.")
flags.DEFINE_string(
    "data_dir", None, "The folder of images; or where a list's paths begin; or TFDS' data_dir."
)
flags.DEFINE_string("image_list", None, "The text file of --dataset=list: one image a line.")
flags.DEFINE_string("train_split", "train", "TFDS split or subfolder to pretrain on.")
flags.DEFINE_string(
    "test_split", None, "TFDS split or subfolder to test on; unset: test, validation or val."
)
flags.DEFINE_float("max_unreadable", 0.01, "Largest share of the images that may be unreadable.")
flags.DEFINE_integer("image_size", None, "Side of the views in pixels.")

# Views
flags.DEFINE_string("views", None, "Views of teacher/student: weak/strong, strong/strong, ...")

# Networks
flags.DEFINE_string("encoder", None, f"One of {', '.join(encoders.ARCHITECTURES)}.")
flags.DEFINE_integer("width", None, "Channels of the encoder's first stage; unset: its usual ones.")
flags.DEFINE_enum(
    "heads", None, list(encoders.HEADS), "ISD has a predictor, ISD+ a projector as well."
)
flags.DEFINE_enum(
    "batch_norm",
    "shuffled",
    ["shuffled", "synchronized"],
    "Statistics of each replica, the teacher's images shuffled; or of all replicas together.",
)

# Method
flags.DEFINE_integer("queue_size", None, "Anchors in the queue.")
flags.DEFINE_float("teacher_temperature", None, "Divides the teacher's similarities.")
flags.DEFINE_float("student_temperature", None, "Divides the student's similarities.")
flags.DEFINE_float("teacher_momentum", None, "Share of its past that the teacher keeps each step.")

# Optimization
flags.DEFINE_integer("epochs", None, "Passes over the training images.")
flags.DEFINE_integer("batch_size", None, "Global batch size, over all replicas.")
flags.DEFINE_float("learning_rate", None, "Learning rate of the first epoch.")
flags.DEFINE_enum(
    "learning_rate_schedule",
    "cosine",
    ["cosine", "drops"],
    "How the learning rate falls, epoch by epoch.",
)
flags.DEFINE_list("drop_epochs", [], "With drops: epochs, counted from 1, that begin with one.")
flags.DEFINE_float("drop_factor", 0.2, "With drops: factor of each.")
flags.DEFINE_float("sgd_momentum", 0.9, "Momentum of the student's SGD.")
flags.DEFINE_float(
    "weight_decay", 1e-4, "Weight decay of the student's SGD, on every trainable weight."
)
flags.DEFINE_integer("seed", 0, "Seed of initial weights, order, views and permutations.")

# Run
flags.DEFINE_string("workdir", None, "Receives flags, checkpoints, logs, results and SavedModel.")
flags.DEFINE_list("stages", list(STAGES), f"What to do, of {', '.join(STAGES)}.")
flags.DEFINE_enum("strategy", "auto", ["auto", "one", "mirrored"], "Devices to train on.")
flags.DEFINE_integer("logical_cpus", 1, "Parts to split the CPU into, to try --strategy=mirrored.")
flags.DEFINE_integer(
    "checkpoint_every_steps", 1000, "Steps between checkpoints; 0: at the end of epochs only."
)
flags.DEFINE_integer("keep_checkpoints", 2, "How many of the newest checkpoints to keep.")
flags.DEFINE_integer("log_every_steps", 10, "Steps between values in TensorBoard's log.")
flags.DEFINE_integer("knn_every_epochs", 10, "Epochs between kNN evaluations. 0: never.")
flags.DEFINE_enum("export_encoder", "student", ["student", "teacher"], "Which encoder to export.")

# What may change between two calls in one workdir; every other flag is the recipe.
NOT_RECIPE = (
    "data_dir image_list test_split max_unreadable workdir stages strategy logical_cpus "
    "checkpoint_every_steps keep_checkpoints log_every_steps knn_every_epochs export_encoder"
).split()
LARGE = 2**63
RANGES = {  # Of those that no class of the package checks.
    "epochs": (1, LARGE),
    "batch_size": (1, LARGE),
    "queue_size": (1, LARGE),
    "seed": (0, 2**31),
    "drop_factor": (0, 1),
    "max_unreadable": (0, 1),
    "logical_cpus": (1, 1024),
    "checkpoint_every_steps": (0, LARGE),
    "keep_checkpoints": (1, LARGE),
    "log_every_steps": (1, LARGE),
    "knn_every_epochs": (0, LARGE),
}
REQUIRED = (
    "dataset image_size views encoder heads queue_size teacher_temperature student_temperature "
    "teacher_momentum epochs batch_size learning_rate workdir".split()
)


def main(argv):
    if not FLAGS["verbosity"].present:
        # TensorFlow's notes on each save would bury what a run prints.
        logging.set_verbosity(logging.WARNING)
        tf.get_logger().setLevel("WARNING")
    check_flags(argv)
    keras.utils.set_random_seed(FLAGS.seed)
    strategy = choose_devices()
    train, test = load_data()
    steps_per_epoch = len(train) // FLAGS.batch_size if train else 1
    model = build_model(strategy, steps_per_epoch)

    with locked_workdir() as workdir:
        checkpoints = checkpointing.Checkpoints(
            workdir / "checkpoints", model, FLAGS.keep_checkpoints
        )
        begin_or_continue(workdir, checkpoints, train)
        first_step = checkpoints.restore_newest()
        if first_step:
            say(f"Continuing {workdir} after step {first_step}.")

        try:
            run_stages(model, checkpoints, first_step, train, test, workdir)
        except KeyboardInterrupt:
            step = checkpoints.newest_step
            say(
                f"\nInterrupted. The same command continues after step {step}."
                if step
                else "\nInterrupted before the first checkpoint: the same command starts anew."
            )
            sys.exit(130)  # As shells have it: 128 + SIGINT.
        say(f"Results: {record(workdir, {'step': checkpoints.step})}")


def run_stages(model, checkpoints, first_step, train, test, workdir):
    unreadable = [Unreadable(len(data), FLAGS.max_unreadable) for data in (train, test) if data]
    with explaining(*unreadable):
        if "pretrain" in FLAGS.stages:
            pretrain(model, checkpoints, first_step, train, test, unreadable, workdir)
        elif not first_step:
            raise ValueError(
                f"{workdir} holds no checkpoint to evaluate or export. Add pretrain to --stages."
            )
        if "evaluate" in FLAGS.stages:
            evaluate(model, train, test, unreadable, workdir)
    if "export" in FLAGS.stages:
        encoder = getattr(model, f"{FLAGS.export_encoder}_encoder")
        path = isd_tf.export_encoder(encoder, FLAGS.image_size, workdir / "saved_model")
        say(f"SavedModel of the {FLAGS.export_encoder}: {path}")


# ---------------------------------------------------------------------------------- chapters


def check_flags(argv):
    if argv[1:]:
        raise ValueError(f"Arguments must be flags. Received: {' '.join(argv[1:])}.")
    unset = [name for name in REQUIRED if FLAGS[name].value is None]
    if unset:
        raise ValueError(
            f"A recipe must set --{', --'.join(unset)}. Start from one of experiments/*.flags: "
            "python experiments/run.py --flagfile=quickstart.flags"
        )
    unknown = [stage for stage in FLAGS.stages if stage not in STAGES]
    if unknown or not FLAGS.stages:
        raise ValueError(
            f"Unknown stages. Expected some of {', '.join(STAGES)}. "
            f"Received: --stages={','.join(FLAGS.stages)}."
        )
    for name, (low, high) in RANGES.items():
        if not low <= FLAGS[name].value <= high:
            raise ValueError(
                f"--{name} must be at least {low:g}"
                + (f" and at most {high:g}" if high < LARGE else "")
                + f". Received: {FLAGS[name].value}."
            )
    if not 0 < FLAGS.learning_rate < float("inf"):
        raise ValueError(
            f"--learning_rate must be positive and finite. Received: {FLAGS.learning_rate}."
        )
    if FLAGS.queue_size < FLAGS.batch_size:
        raise ValueError(
            f"queue_size must be at least the global batch size ({FLAGS.batch_size}). "
            f"Received: --queue_size={FLAGS.queue_size}. Raise it or lower --batch_size."
        )
    if FLAGS.learning_rate_schedule == "drops":
        bad = [epoch for epoch in FLAGS.drop_epochs if not epoch.isdigit()]
        if bad or not FLAGS.drop_epochs:
            raise ValueError(
                "--learning_rate_schedule=drops needs epochs, such as --drop_epochs=141,181. "
                f"Received: --drop_epochs={','.join(FLAGS.drop_epochs)}."
            )
    isd_tf.input_pipeline.check_views(views())


def views():
    return tuple(FLAGS.views.split("/"))


def choose_devices():
    if FLAGS.logical_cpus > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration()] * FLAGS.logical_cpus
        tf.config.set_logical_device_configuration(cpu, parts)
    if "pretrain" not in FLAGS.stages:
        return distribution.choose_strategy("one")
    strategy = distribution.choose_strategy(FLAGS.strategy)
    replicas = strategy.num_replicas_in_sync
    if FLAGS.batch_size % replicas:
        raise ValueError(
            f"The replicas share the batch evenly. Received: --batch_size={FLAGS.batch_size} for "
            f"{replicas} replicas. Use a multiple of {replicas}, or --strategy=one."
        )
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    say(
        f"{replicas} {kind} replica{'s' * (replicas > 1)}: global batch {FLAGS.batch_size}, "
        f"replica batch {FLAGS.batch_size // replicas}."
    )
    return strategy


def load_data():
    if FLAGS.stages == ["export"]:
        return None, None
    train, test = isd_tf.datasets.load(
        FLAGS.dataset, FLAGS.train_split, FLAGS.test_split, FLAGS.data_dir, FLAGS.image_list
    )
    labelled = isd_tf.datasets.is_labelled(train)
    classes = f"{len(train.class_names)} classes" if labelled else "no labels"
    say(f"{train.name}: {len(train)} images, {classes}.")
    if FLAGS.batch_size > len(train):
        raise ValueError(
            f"A batch must fit into the dataset. Received: --batch_size={FLAGS.batch_size} for "
            f"{len(train)} images of {train.name}. Lower --batch_size, and --queue_size with it."
        )
    if FLAGS.queue_size > len(train):
        logging.warning(
            "The queue (%d) is larger than the dataset (%d images): images will meet older keys "
            "of themselves among their anchors.",
            FLAGS.queue_size,
            len(train),
        )
    return train, test


@contextlib.contextmanager
def locked_workdir():
    """Makes the workdir, and keeps other processes out of it."""
    workdir = pathlib.Path(FLAGS.workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "w")
    except OSError as error:
        raise OSError(
            f"--workdir must be a folder that can be written. Received: {FLAGS.workdir} ({error})."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"Another process is at work in {workdir}. Wait for it, or use another --workdir."
            ) from None
        yield workdir


def begin_or_continue(workdir, checkpoints, train):
    """Leaves the recipe in a new workdir; in one with checkpoints, compares it."""
    mine = FLAGS.get_flags_for_module(__name__)
    data = workdir / "dataset.json"
    fingerprint = (
        {"images": len(train), "digest": isd_tf.datasets.fingerprint(train)} if train else {}
    )
    if not checkpoints.exist:
        flagfiles.write(workdir / "run.flags", mine)
        data.write_text(json.dumps(fingerprint) + "\n")
    else:
        recipe = [flag for flag in mine if flag.name not in NOT_RECIPE]
        flagfiles.require_same(workdir / "run.flags", recipe)
        before = json.loads(data.read_text()) if data.exists() else fingerprint
        if train and before != fingerprint:
            raise ValueError(
                f"The workdir {workdir} was begun with other images: {before['images']} then, "
                f"{len(train)} of {train.name} now"
                + (", the same number but not the same" if before["images"] == len(train) else "")
                + ". Restore them to continue it, or use another --workdir."
            )
    packages = "tensorflow keras keras-cv tensorflow-datasets numpy scikit-image".split()
    versions = {name: importlib.metadata.version(name) for name in packages}
    versions |= {"isd_tf": isd_tf.__version__, "python": platform.python_version()}
    (workdir / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def build_model(strategy, steps_per_epoch):
    synchronized = FLAGS.batch_norm == "synchronized"
    with strategy.scope():
        encoder = isd_tf.build_encoder(FLAGS.encoder, FLAGS.image_size, FLAGS.width, synchronized)
        model = isd_tf.ISD(
            encoder,
            *encoders.HEADS[FLAGS.heads](encoder.output_shape[-1], synchronized),
            queue_size=FLAGS.queue_size,
            teacher_temperature=FLAGS.teacher_temperature,
            student_temperature=FLAGS.student_temperature,
            teacher_momentum=FLAGS.teacher_momentum,
            shuffle_batch_norm=not synchronized,
            seed=FLAGS.seed,
        )
        if FLAGS.learning_rate_schedule == "cosine":
            rate = isd_tf.CosineByEpoch(FLAGS.learning_rate, FLAGS.epochs, steps_per_epoch)
        else:
            rate = isd_tf.DropsByEpoch(
                FLAGS.learning_rate, FLAGS.drop_epochs, FLAGS.drop_factor, steps_per_epoch
            )
        model.compile(isd_tf.TorchSGD(rate, FLAGS.sgd_momentum, FLAGS.weight_decay))
    return model


def pretrain(model, checkpoints, first_step, train, test, unreadable, workdir):
    steps_per_epoch = len(train) // FLAGS.batch_size
    if first_step >= FLAGS.epochs * steps_per_epoch:
        say("The pretraining is complete.")
        return

    def batches_from(step):
        return isd_tf.pretraining_batches(
            train,
            views(),
            FLAGS.image_size,
            FLAGS.batch_size,
            FLAGS.seed,
            step,
            unreadable[0],
        )

    history = keras.callbacks.History()
    callbacks = [
        monitoring.EpochMeans(),
        monitoring.Throughput(FLAGS.batch_size),
        checkpointing.StopAtNonFiniteLoss(checkpoints),
        *knn_callback(train, test, unreadable),
        monitoring.Progress(FLAGS.epochs),
        checkpointing.SaveCheckpoints(checkpoints, FLAGS.checkpoint_every_steps),
        monitoring.TensorBoardLog(workdir / "logs", FLAGS.log_every_steps),
        history,
    ]
    start = time.monotonic()
    checkpointing.fit_from_step(
        model,
        batches_from,
        first_step,
        steps_per_epoch,
        FLAGS.epochs,
        callbacks=callbacks,
        verbose=0,
    )
    # The last epoch's; accuracies are the evaluation's to tell.
    results = {
        name: float(values[-1])
        for name, values in history.history.items()
        if not name.endswith("nn")
    }
    results["pretrain_seconds_since_start"] = time.monotonic() - start
    results["unreadable_images"] = len(unreadable[0].names)
    record(workdir, results | {"step": checkpoints.step})


def knn_callback(train, test, unreadable):
    if not FLAGS.knn_every_epochs or reason_not_to_score(train, test):
        return []
    bank, queries = evaluation_data(train, test, unreadable)
    return [knn.EvaluateKNN(bank, queries, FLAGS.knn_every_epochs)]


def evaluate(model, train, test, unreadable, workdir):
    reason = reason_not_to_score(train, test)
    if reason:
        if FLAGS.stages == ["evaluate"]:
            raise ValueError(f"The evaluation needs labelled images: {reason}")
        say(f"Not evaluated: {reason}")
        return
    keras.utils.set_random_seed(FLAGS.seed)  # As when the student was built.
    contestants = {
        "raw_pixels": knn.raw_pixels,
        "untrained": isd_tf.build_encoder(FLAGS.encoder, FLAGS.image_size, FLAGS.width),
        "student": model.student_encoder,
        "teacher": model.teacher_encoder,
    }
    scores = isd_tf.knn_accuracy(contestants, *evaluation_data(train, test, unreadable))
    say(f"\nNearest neighbours of {len(test)} images of {test.name} among {len(train)}:")
    say(f"{'':20}{'1-NN':>8}{'20-NN':>8}")
    for name in contestants:
        one, twenty = scores[f"{name}_1nn"], scores[f"{name}_20nn"]
        say(f"{name.replace('_', ' '):20}{one:>8.1%}{twenty:>8.1%}")
    say("")
    record(workdir, scores)


def reason_not_to_score(train, test):
    """Why kNN cannot be scored on these data, or None."""
    for split in (train, test):
        if split and not isd_tf.datasets.is_labelled(split):
            return f"{split.name} has no labels."
    if test is None:
        return f"{train.name} has no test split. Name one by --test_split."
    if len(train) < 20:
        return f"20-NN needs at least 20 images, and {train.name} has {len(train)}."
    return None


def evaluation_data(train, test, unreadable):
    return [
        isd_tf.evaluation_batches(split, FLAGS.image_size, EVALUATION_BATCH, counter)
        for split, counter in zip((train, test), unreadable, strict=True)
    ]


def record(workdir, results):
    """Adds figures to results.json, and returns its path."""
    path = workdir / "results.json"
    if path.exists():
        results = json.loads(path.read_text()) | results
    unfinished = workdir / "results.json.unfinished"
    unfinished.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    os.replace(unfinished, path)
    return path


def say(text):
    print(text, flush=True)


def readable_errors(argv):
    """Ends errors in one sentence, and with --verbosity=1 in a stack trace as well."""
    try:
        main(argv)
    except (ValueError, OSError, FloatingPointError) as error:
        if FLAGS.verbosity >= 1:
            raise
        sys.exit(f"run.py: {error}\n(--verbosity=1 shows where this was found.)")


if __name__ == "__main__":
    try:
        arguments = flagfiles.expand(sys.argv)
    except (ValueError, OSError) as error:
        sys.exit(f"run.py: {error}")
    app.run(readable_errors, argv=arguments)
