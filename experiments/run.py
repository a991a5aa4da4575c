"""Pretrains an encoder by ISD, or a method it is compared with, scores it and exports it.

    python experiments/run.py --flagfile=quickstart.flags
    python experiments/run.py --flagfile=imagenet.flags --data_dir=PATH --workdir=runs/imagenet

Flag files are looked for in the working directory and then beside this file. The same command in
the same workdir continues where it was stopped. Several machines: the same command on each, with
TF_CONFIG in its environment; launch.py starts several workers on one.

Exit codes: 0; 1 for an error that a sentence explains; 75 when the workers have lost each other;
130 and 143 when told to stop, by Ctrl-C and by SIGTERM.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import random
import sys
import time

# Before TensorFlow is imported: it leaves oneDNN off on CPUs without AVX-512, at half the speed.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import evaluations  # noqa: E402
import flagfiles  # noqa: E402
import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
import workdirs  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from evaluations import say  # noqa: E402

import isd_tf  # noqa: E402
from isd_tf.data import subsets  # noqa: E402
from isd_tf.data.batches import check_views  # noqa: E402
from isd_tf.data.decoding import explaining  # noqa: E402
from isd_tf.evaluation import knn  # noqa: E402
from isd_tf.networks import encoders  # noqa: E402
from isd_tf.networks.heads import HEADS  # noqa: E402
from isd_tf.training import checkpoints as checkpointing  # noqa: E402
from isd_tf.training import cluster, distribution, monitoring  # noqa: E402

FLAGS = flags.FLAGS
STAGES = ("pretrain", "evaluate", "export")

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
flags.DEFINE_string(
    "data_service",
    None,
    "host:port of a tf.data service's dispatcher, whose workers then prepare the views. Gives the "
    "exact order of the images up, and tolerates no unreadable one.",
)
flags.DEFINE_integer("image_size", None, "Side of the views in pixels.")
flags.DEFINE_string(
    "unbalanced",
    None,
    "LARGE,RARE,IMAGES: pretrain on all images of as many large classes and on few of each rare "
    "one, such as 8,30,100; or a list of the paper's study, such as D1.txt. The bank and the test "
    "images are all those of these classes.",
)
flags.DEFINE_integer("unbalanced_seed", 0, "Draw of the classes of --unbalanced and their images.")

# Views
flags.DEFINE_string("views", None, "Views of teacher/student: weak/strong, strong/strong, ...")

# Networks
flags.DEFINE_string("encoder", None, f"One of {', '.join(encoders.ARCHITECTURES)}.")
flags.DEFINE_integer("width", None, "Channels of the encoder's first stage; unset: its usual ones.")
flags.DEFINE_enum(
    "heads",
    None,
    list(HEADS),
    "isd: a predictor on the student's side; isd_plus (and BYOL): a projector on both sides as "
    "well; moco_v2: a projector only.",
)
flags.DEFINE_string(
    "batch_norm",
    "shuffled",
    "shuffled: each replica has statistics of its own, and the teacher's images are shuffled over "
    "all; groups:N: each replica has N, as N devices would; synchronized: one for all replicas.",
)
flags.DEFINE_enum(
    "precision",
    "float32",
    ["float32", "mixed_bfloat16", "mixed_float16"],
    "Of the networks. Embeddings, similarities, divergence and queue are float32 in all.",
)

# Method
METHODS = {  # Class, and the flags that are its settings.
    "isd": (
        isd_tf.ISD,
        ("queue_size", "teacher_temperature", "student_temperature", "teacher_momentum"),
    ),
    "moco_v2": (isd_tf.MoCoV2, ("queue_size", "temperature", "teacher_momentum")),
    "byol": (isd_tf.BYOL, ("teacher_momentum",)),
}
flags.DEFINE_enum("method", "isd", list(METHODS), "What the student learns from the teacher.")
flags.DEFINE_integer("queue_size", None, "Anchors in the queue.")
flags.DEFINE_float("teacher_temperature", None, "Divides the teacher's similarities.")
flags.DEFINE_float("student_temperature", None, "Divides the student's similarities.")
flags.DEFINE_float("temperature", 0.2, "With moco_v2: divides all similarities.")
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
flags.DEFINE_enum(
    "strategy",
    "auto",
    distribution.STRATEGIES,
    "One device; all of this machine; all of the machines in TF_CONFIG; or whatever is there.",
)
flags.DEFINE_integer("cluster_timeout", 600, "Seconds that a worker waits for the others.")
flags.DEFINE_integer("logical_cpus", 1, "Parts to split the CPU into, to try --strategy=mirrored.")
flags.DEFINE_integer(
    "steps_per_execution", 1, "Steps a call into TensorFlow; must divide the steps of an epoch."
)
flags.DEFINE_bool("compile", False, "Whether XLA compiles the networks.")
flags.DEFINE_bool(
    "deterministic", False, "Whether GPUs must use deterministic operations only, which are slower."
)
flags.DEFINE_bool(
    "check_replicas", False, "Whether every step compares all replicas' weights and queues. Slow."
)
flags.DEFINE_integer(
    "checkpoint_every_steps", 1000, "Steps between checkpoints; 0: at the end of epochs only."
)
flags.DEFINE_integer("keep_checkpoints", 2, "How many of the newest checkpoints to keep.")
flags.DEFINE_integer(
    "keep_every_epochs", 0, "Epochs between checkpoints that are kept besides these. 0: none."
)
flags.DEFINE_enum(
    "if_checkpoint_fails",
    "stop",
    ["stop", "continue"],
    "When a checkpoint cannot be written, on a full disk for example.",
)
flags.DEFINE_integer("log_every_steps", 10, "Steps between values in TensorBoard's log.")
flags.DEFINE_integer("knn_every_epochs", 10, "Epochs between kNN evaluations. 0: never.")
flags.DEFINE_enum("export_encoder", "student", ["student", "teacher"], "Which encoder to export.")

# What may change between two calls in one workdir; every other flag is the recipe. Which images are
# trained on, dataset.json knows.
NOT_RECIPE = (
    "unbalanced unbalanced_seed data_dir image_list test_split max_unreadable data_service "
    "workdir stages strategy cluster_timeout logical_cpus steps_per_execution compile "
    "deterministic check_replicas checkpoint_every_steps keep_checkpoints keep_every_epochs "
    "if_checkpoint_fails log_every_steps knn_every_epochs export_encoder"
).split()
# What may differ between the workers of a cluster.
MACHINES_OWN = "data_dir image_list workdir cluster_timeout".split()
LARGE = 2**63
RANGES = {  # Of those that no class of the package checks.
    "epochs": (1, LARGE),
    "batch_size": (1, LARGE),
    "queue_size": (1, LARGE),
    "seed": (0, 2**31),
    "unbalanced_seed": (0, 2**31),
    "drop_factor": (0, 1),
    "max_unreadable": (0, 1),
    "logical_cpus": (1, 1024),
    "cluster_timeout": (1, LARGE),
    "steps_per_execution": (1, LARGE),
    "keep_every_epochs": (0, LARGE),
    "checkpoint_every_steps": (0, LARGE),
    "keep_checkpoints": (1, LARGE),
    "log_every_steps": (1, LARGE),
    "knn_every_epochs": (0, LARGE),
}
REQUIRED = "dataset image_size views encoder heads epochs batch_size learning_rate workdir".split()


def main(argv):
    if not FLAGS["verbosity"].present:
        # TensorFlow's notes on each save would bury what a run prints.
        logging.set_verbosity(logging.WARNING)
        tf.get_logger().setLevel("WARNING")
    check_flags(argv)
    strategy = choose_devices()
    with cluster.noticing_lost_peers(strategy):
        data = load_data(strategy)
        train = data.train if data else None
        model = build_model(strategy, steps_per_epoch(train))

        with workdirs.locked(FLAGS.workdir, strategy) as workdir:
            checkpoints = checkpointing.Checkpoints(
                workdir / "checkpoints",
                model,
                FLAGS.keep_checkpoints,
                FLAGS.keep_every_epochs * steps_per_epoch(train),
                continue_without=FLAGS.if_checkpoint_fails == "continue",
            )
            begin_or_continue(workdir, checkpoints, train)
            first_step = checkpoints.restore_newest()
            if first_step:
                say(f"Continuing {workdir} after step {first_step}.")

            try:
                run_stages(model, checkpoints, first_step, data, workdir)
            except KeyboardInterrupt:
                step = checkpoints.newest_step
                say(
                    f"\nInterrupted. The same command continues after step {step}."
                    if step
                    else "\nInterrupted before the first checkpoint: the same command starts anew."
                )
                sys.exit(130)  # As shells have it: 128 + SIGINT.
            cluster.linger(strategy)


def run_stages(model, checkpoints, first_step, data, workdir):
    run = evaluations.Run(model, data, views(), workdir, checkpoints, counters=[])
    with explaining(run.counters):
        if "pretrain" in FLAGS.stages:
            pretrain(run, first_step)
        elif not first_step:
            raise ValueError(
                f"{workdir} holds no checkpoint to evaluate or export. Add pretrain to --stages."
            )
        with cluster.failing_together(checkpoints.strategy):
            if not cluster.is_chief(checkpoints.strategy):
                return  # Once the chief has done the rest.
            failures = evaluations.evaluate(run) if "evaluate" in FLAGS.stages else []
            if "export" in FLAGS.stages:
                encoder = getattr(model, f"{FLAGS.export_encoder}_encoder")
                path = isd_tf.export_encoder(encoder, FLAGS.image_size, workdir / "saved_model")
                say(f"SavedModel of the {FLAGS.export_encoder}: {path}")
            say(f"Results: {workdirs.record(workdir, {}, run.step)}")
            if failures:
                raise ValueError(" ".join(failures))


# ---------------------------------------------------------------------------------- chapters


def check_flags(argv):
    if argv[1:]:
        raise ValueError(f"Arguments must be flags. Received: {' '.join(argv[1:])}.")
    _, settings = METHODS[FLAGS.method]
    unset = [name for name in (*REQUIRED, *settings) if FLAGS[name].value is None]
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
    every = dict.fromkeys(name for _, names in METHODS.values() for name in names)
    unused = [name for name in every if FLAGS[name].present and name not in settings]
    if unused:
        say(f"Of no effect with --method={FLAGS.method}: --{', --'.join(unused)}.")
    for name, (low, high) in RANGES.items():
        if FLAGS[name].value is None:
            continue
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
    if "queue_size" in settings and FLAGS.queue_size < FLAGS.batch_size:
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
    check_views(views())
    batch_norm()
    evaluations.check_flags()


def own_flags():
    """The flags of this program, which its modules define."""
    return [
        f for name in (__name__, evaluations.__name__) for f in FLAGS.get_flags_for_module(name)
    ]


def recipe():
    """Those that must be the same in all calls in one workdir."""
    asking = {flag.name for flag in FLAGS.get_flags_for_module(evaluations.__name__)}
    return [flag for flag in own_flags() if flag.name not in asking.union(NOT_RECIPE)]


def views():
    return tuple(FLAGS.views.split("/"))


def batch_norm():
    """Whether BatchNorm is synchronised, and the groups of a replica's batch."""
    kind, _, groups = FLAGS.batch_norm.partition(":")
    if kind == "groups" and groups.isdigit() and int(groups) > 0:
        return False, int(groups)
    if FLAGS.batch_norm not in ("shuffled", "synchronized"):
        raise ValueError(
            "--batch_norm must be shuffled, synchronized, or groups:N, such as groups:8. Received: "
            f"{FLAGS.batch_norm}."
        )
    return kind == "synchronized", 1


def steps_per_epoch(train):
    return len(train) // FLAGS.batch_size if train else 1


def choose_devices():
    if FLAGS.logical_cpus > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration()] * FLAGS.logical_cpus
        tf.config.set_logical_device_configuration(cpu, parts)
    keras.config.set_dtype_policy(FLAGS.precision)
    if FLAGS.deterministic:
        tf.config.experimental.enable_op_determinism()
    tf_config = os.environ.get("TF_CONFIG", "")
    training = "pretrain" in FLAGS.stages or cluster.parse_tf_config(tf_config)
    strategy = distribution.choose_strategy(
        FLAGS.strategy if training else "one", tf_config, FLAGS.cluster_timeout
    )
    checkpointing.exit_when_told()
    with cluster.noticing_lost_peers(strategy):
        # First of all: different flags would part the workers' ways.
        settings = {f"--{f.name}": str(f.value) for f in own_flags() if f.name not in MACHINES_OWN}
        cluster.require_same(strategy, settings)
    workers, replicas = cluster.number_of_workers(strategy), strategy.num_replicas_in_sync
    _, groups = batch_norm()
    if FLAGS.batch_size % (replicas * groups):
        raise ValueError(
            "The replicas, and their groups, share the batch evenly. Received: "
            f"--batch_size={FLAGS.batch_size} for {replicas} replica{'s' * (replicas > 1)}"
            + (f" of {groups} groups" if groups > 1 else "")
            + f". Use a multiple of {replicas * groups}, or another --strategy or --batch_norm."
        )
    if workers > 1 and FLAGS.logical_cpus > 1:
        raise ValueError(
            "A worker of a cluster trains on its GPUs or on its whole CPU. Received: "
            f"--logical_cpus={FLAGS.logical_cpus}, which is for --strategy=mirrored."
        )
    if FLAGS.precision == "mixed_bfloat16" and not distribution.bfloat16_is_native():
        logging.warning(
            "These devices emulate bfloat16, many times slower than float32. --precision=float32 "
            "is the faster one here."
        )
    here = replicas // workers
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    index = cluster.worker_index(strategy)
    who = f"Worker {index} of {workers}{' (the chief)' * (index == 0)}: " if workers > 1 else ""
    say(
        f"{who}{here} {kind} replica{'s' * (here > 1)}"
        + (f", {replicas} in all" if workers > 1 else "")
        + f": global batch {FLAGS.batch_size}, replica batch {FLAGS.batch_size // replicas}."
    )
    if index > 0:
        sys.stdout = open(os.devnull, "w")  # The chief speaks for all; errors go to stderr.
    return strategy


def load_data(strategy):
    if FLAGS.stages == ["export"]:
        return None
    # The chief first: what TFDS prepares on a shared disk, it prepares once.
    for turn in (True, False):
        with cluster.failing_together(strategy):
            if cluster.is_chief(strategy) == turn:
                train, test = isd_tf.datasets.load(
                    FLAGS.dataset,
                    FLAGS.train_split,
                    FLAGS.test_split,
                    FLAGS.data_dir,
                    FLAGS.image_list,
                )
                data = unbalanced(train, test) or evaluations.Data(train, train, test)
    train = data.train
    cluster.require_same(strategy, {"images": json.dumps(fingerprint(train))})
    labelled = isd_tf.datasets.is_labelled(train)
    classes = f"{len(train.class_names)} classes" if labelled else "no labels"
    say(f"{train.name}: {len(train)} images, {classes}.")
    evaluations.check_data(data)
    if FLAGS.batch_size > len(train):
        raise ValueError(
            f"A batch must fit into the dataset. Received: --batch_size={FLAGS.batch_size} for "
            f"{len(train)} images of {train.name}. Lower --batch_size, and --queue_size with it."
        )
    if steps_per_epoch(train) % FLAGS.steps_per_execution:
        steps = steps_per_epoch(train)
        fitting = [str(n) for n in range(1, min(steps, 100) + 1) if steps % n == 0]
        raise ValueError(
            f"--steps_per_execution must divide the {steps} steps of an epoch. Received: "
            f"{FLAGS.steps_per_execution}. Use one of {', '.join(fitting)}."
        )
    if "queue_size" in METHODS[FLAGS.method][1] and FLAGS.queue_size > len(train):
        logging.warning(
            "The queue (%d) is larger than the dataset (%d images): images will meet older keys "
            "of themselves among their anchors.",
            FLAGS.queue_size,
            len(train),
        )
    return data


def unbalanced(train, test):
    if not FLAGS.unbalanced:
        return None
    numbers = FLAGS.unbalanced.split(",")
    if all(number.strip().isdigit() for number in numbers) and len(numbers) == 3:
        draw = subsets.unbalance(train, test, *map(int, numbers), FLAGS.unbalanced_seed)
    elif len(numbers) == 1:
        draw = subsets.unbalance_by_list(train, test, FLAGS.unbalanced)
    else:
        raise ValueError(
            "--unbalanced must be LARGE,RARE,IMAGES, such as 8,30,100, or a list's path. Received: "
            f"{FLAGS.unbalanced}."
        )
    return evaluations.Data(*draw)


def fingerprint(train):
    return {"images": len(train), "digest": isd_tf.datasets.fingerprint(train)} if train else {}


def begin_or_continue(workdir, checkpoints, train):
    """Leaves the recipe in a new workdir; in one with checkpoints, compares it."""
    with cluster.failing_together(checkpoints.strategy):
        if not cluster.is_chief(checkpoints.strategy):
            return
        data = workdir / "dataset.json"
        now = fingerprint(train)
        if not checkpoints.exist:
            flagfiles.write(workdir / "run.flags", own_flags())
            data.write_text(json.dumps(now) + "\n")
        else:
            flagfiles.require_same(workdir / "run.flags", recipe())
            before = json.loads(data.read_text()) if data.exists() else now
            if train and before != now:
                same_number = before["images"] == len(train)
                raise ValueError(
                    f"The workdir {workdir} was begun with other images: {before['images']} then, "
                    f"{len(train)} of {train.name} now"
                    + (", the same number but not the same" if same_number else "")
                    + ". Restore them to continue it, or use another --workdir."
                )
        packages = "tensorflow keras keras-cv tensorflow-datasets numpy scikit-image scikit-learn"
        packages = packages.split()
        versions = {name: importlib.metadata.version(name) for name in packages}
        versions |= {"isd_tf": isd_tf.__version__, "python": platform.python_version()}
        (workdir / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def build_model(strategy, steps_per_epoch):
    synchronized, groups = batch_norm()
    keras.utils.set_random_seed(FLAGS.seed)
    with strategy.scope():
        encoder = isd_tf.build_encoder(
            FLAGS.encoder, FLAGS.image_size, FLAGS.width, synchronized, groups
        )
        method, settings = METHODS[FLAGS.method]
        model = method(
            encoder,
            *HEADS[FLAGS.heads](encoder.output_shape[-1], synchronized, groups),
            shuffle_batch_norm=not synchronized,
            seed=FLAGS.seed,
            **{name: FLAGS[name].value for name in settings},
        )
        if FLAGS.learning_rate_schedule == "cosine":
            rate = isd_tf.CosineByEpoch(FLAGS.learning_rate, FLAGS.epochs, steps_per_epoch)
        else:
            rate = isd_tf.DropsByEpoch(
                FLAGS.learning_rate, FLAGS.drop_epochs, FLAGS.drop_factor, steps_per_epoch
            )
        model.compile(
            isd_tf.TorchSGD(rate, FLAGS.sgd_momentum, FLAGS.weight_decay),
            jit_compile=FLAGS.compile,
            steps_per_execution=FLAGS.steps_per_execution,
        )
    return model


def pretrain(run, first_step):
    model, train, checkpoints, workdir = run.model, run.data.train, run.checkpoints, run.workdir
    unreadable = run.counter(train)
    if first_step >= FLAGS.epochs * steps_per_epoch(train):
        say("The pretraining is complete.")
        return
    strategy, service = checkpoints.strategy, None
    if FLAGS.data_service:
        # The chief's number names the job: an earlier start's would hold batches of other steps.
        number = cluster.gather_from_workers(strategy, random.SystemRandom().getrandbits(60))[0]
        service = isd_tf.DataService(FLAGS.data_service, f"{number}")

    def batches_from(step):
        return strategy.distribute_datasets_from_function(
            lambda context: isd_tf.pretraining_batches(
                train,
                views(),
                FLAGS.image_size,
                FLAGS.batch_size,
                FLAGS.seed,
                step,
                unreadable,
                context,
                service,
            )
        )

    start = time.monotonic()

    def record_epoch(epoch, logs):
        # Accuracies are the evaluation's to tell.
        scored = ("nn", "nn_rare")
        means = {name: float(value) for name, value in logs.items() if not name.endswith(scored)}
        means["pretrain_seconds_since_start"] = time.monotonic() - start
        means["unreadable_images"] = len(unreadable.names)  # That the chief has met.
        try:
            workdirs.record(workdir, means, checkpoints.step)
        except OSError as error:
            if FLAGS.if_checkpoint_fails == "stop":
                raise
            logging.error("The epoch's results cannot be written (%s).", error)

    stop = checkpointing.StopWhenTold(checkpoints)
    watching = [
        monitoring.EpochMeans(),
        monitoring.Throughput(FLAGS.batch_size),
        *knn_callback(run, stop),
        monitoring.Progress(FLAGS.epochs),
        monitoring.TensorBoardLog(workdir / "logs", FLAGS.log_every_steps),
        keras.callbacks.LambdaCallback(on_epoch_end=record_epoch),
    ]
    checking = [monitoring.CheckReplicas(batch_norm()[0])] if FLAGS.check_replicas else []
    checkpointing.fit_from_step(
        model,
        batches_from,
        first_step,
        steps_per_epoch(train),
        FLAGS.epochs,
        callbacks=[
            checkpointing.StopAtNonFiniteLoss(checkpoints),
            *checking,
            *(watching if cluster.is_chief(strategy) else []),
            checkpointing.SaveCheckpoints(checkpoints, FLAGS.checkpoint_every_steps),
            stop,
        ],
        verbose=0,
    )


def knn_callback(run, stop):
    data, every = run.data, FLAGS.knn_every_epochs
    if not every or evaluations.reason_not_to_score(data, 20):
        return []
    bank, queries = run.batches(data.bank), run.batches(data.test)
    return [knn.EvaluateKNN(bank, queries, every, data.rare_labels, lambda: stop.told)]


def readable_errors(argv):
    """Ends errors in one sentence, and with --verbosity=1 in a stack trace as well."""
    try:
        main(argv)
    except (ValueError, OSError, FloatingPointError, cluster.WorkerError) as error:
        if FLAGS.verbosity >= 1:
            raise
        print(
            f"run.py: {error}\n(--verbosity=1 shows where this was found.)",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(os.EX_TEMPFAIL if isinstance(error, cluster.PeersError) else 1)


if __name__ == "__main__":
    try:
        arguments = flagfiles.expand(sys.argv)
    except (ValueError, OSError) as error:
        sys.exit(f"run.py: {error}")
    app.run(readable_errors, argv=arguments)
