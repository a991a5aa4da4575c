"""Pretrains an encoder by ISD, or a method it is compared with, scores it and exports it.

    python experiments/run.py --flagfile=quickstart.flags
    python experiments/run.py --flagfile=imagenet.flags --data_dir=PATH --workdir=runs/imagenet

Flag files are looked for in the working directory and then beside this file. The same command in
the same workdir continues where it was stopped. Several machines: the same command on each, with
TF_CONFIG in its environment; launch.py starts several workers on one.

Exit codes: 0; 1 for an error that a sentence explains; 75 when the workers have lost each other;
130 and 143 when told to stop, by Ctrl-C and by SIGTERM.
"""

import json
import os
import pathlib
import random
import sys
import time

import program
import settings
import settings_checks
from absl import flags
from program import say
from settings import FLAGS

if __name__ == "__main__":
    # Here already: --help and mistakes need not wait for TensorFlow.
    flags.adopt_module_key_flags(settings)
    program.begin(settings_checks.read)

program.import_tensorflow()
import auto  # noqa: E402
import evaluations  # noqa: E402
import flagfiles  # noqa: E402
import keras  # noqa: E402
import memory  # noqa: E402
import plan  # noqa: E402
import reporting  # noqa: E402
import run_data  # noqa: E402
import teachers  # noqa: E402
import tensorflow as tf  # noqa: E402
import workdirs  # noqa: E402
from absl import logging  # noqa: E402

import isd_tf  # noqa: E402
from isd_tf.data import check, subsets  # noqa: E402
from isd_tf.data.decoding import REPLACED, Unreadable, explaining  # noqa: E402
from isd_tf.evaluation import knn  # noqa: E402
from isd_tf.networks import backbones  # noqa: E402
from isd_tf.networks.heads import HEADS  # noqa: E402
from isd_tf.report import health  # noqa: E402
from isd_tf.training import checkpoints as checkpointing  # noqa: E402
from isd_tf.training import cluster, distribution, initial_weights, metrics, monitoring  # noqa: E402
from isd_tf.training.unreadable import CountUnreadable  # noqa: E402

# What a check says of its progress.
SECONDS_BETWEEN_REPORTS = 10
DATASET = "dataset.json"  # Of a workdir: which images it was begun with.
# Where no epoch is scored.
EPOCHS_BETWEEN_PAGES = 10
METHODS = {
    "isd": isd_tf.ISD,
    "moco_v2": isd_tf.MoCoV2,
    "byol": isd_tf.BYOL,
    "msf": isd_tf.MSF,
    "compress": isd_tf.CompRess,
}
EXPORTS = {
    "saved_model": "SavedModel",
    "keras_hub": "KerasHub preset",
    "torch": "PyTorch weights",
}


def main():
    if not FLAGS["verbosity"].present:
        # TensorFlow's notes on each save would bury what a run prints, and what it warns of is the
        # programmer's to know: that each encoder is traced once more, for example.
        logging.set_verbosity(logging.WARNING)
        tf.get_logger().setLevel("ERROR")
    if FLAGS.stages == ["check"]:
        check_images()
        return
    strategy = choose_devices()
    with cluster.noticing_lost_peers(strategy):
        data = load_data(strategy)
        train = data.train if data else None
        chosen = choose_settings(strategy, train)
        encoder, initial = build_encoder(strategy)
        model = build_model(strategy, encoder, steps_per_epoch(train))
        if FLAGS.stages == ["plan"]:
            show_plan(model, data, chosen)
            cluster.linger(strategy)
            return
        tell_settings(train, chosen)

        with workdirs.locked(FLAGS.workdir, strategy) as workdir:
            checkpoints = checkpointing.Checkpoints(
                workdir / "checkpoints",
                model,
                FLAGS.keep_checkpoints,
                FLAGS.keep_every_epochs * steps_per_epoch(train),
                continue_without=FLAGS.if_checkpoint_fails == "continue",
            )
            begin_or_continue(workdir, checkpoints, data, initial)
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


# ---------------------------------------------------------------------------------- chapters


def check_images():
    """Lists what is odd about the images, before any training."""
    train, test = load_splits()
    last = time.monotonic()

    def report(done, total):
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_REPORTS:
            last = time.monotonic()
            say(f"  {done} of {total} images read")

    with workdirs.locked(FLAGS.workdir, tf.distribute.get_strategy()) as workdir:
        workdirs.name_left_out(workdir, train, test)
        splits = {"train": train} | ({"test": test} if test else {})
        checked = check.check(splits, FLAGS.image_size, FLAGS.max_pixels, report)
        check.write_csv(checked, workdir / "check.csv")
        say(f"{check.summary(checked)}\nAll findings: {workdir / 'check.csv'}")


def choose_devices():
    if FLAGS.logical_cpus > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration()] * FLAGS.logical_cpus
        tf.config.set_logical_device_configuration(cpu, parts)
    keras.config.set_dtype_policy(FLAGS.precision)
    if FLAGS.deterministic:
        tf.config.experimental.enable_op_determinism()
    tf_config = os.environ.get("TF_CONFIG", "")
    takes_steps = {"pretrain", "plan"} & set(FLAGS.stages)
    training = takes_steps or cluster.parse_tf_config(tf_config)
    strategy = distribution.choose_strategy(
        FLAGS.strategy if training else "one", tf_config, FLAGS.cluster_timeout
    )
    checkpointing.exit_when_told()
    with cluster.noticing_lost_peers(strategy):
        # First of all: different flags would part the workers' ways.
        shared = [f for f in settings.own_flags() if f.name not in settings.MACHINES_OWN]
        cluster.require_same(strategy, {f"--{flag.name}": str(flag.value) for flag in shared})
    workers, replicas = cluster.number_of_workers(strategy), strategy.num_replicas_in_sync
    synchronized, groups = settings.batch_norm()
    if FLAGS.batch_size % (replicas * groups):
        raise ValueError(
            "The replicas, and their groups, share the batch evenly. Received: "
            f"--batch_size={FLAGS.batch_size} for {replicas} replica{'s' * (replicas > 1)}"
            + (f" of {groups} groups" if groups > 1 else "")
            + f". Use a multiple of {replicas * groups}, or another --strategy or --batch_norm."
        )
    # Synchronised, BatchNorm sees all replicas' images.
    alike = FLAGS.batch_size // (1 if synchronized else replicas * groups)
    if alike == 1 and training:
        raise ValueError(
            "BatchNorm needs two images at least: of one, every feature becomes 0, and nothing is "
            f"learned. Received: --batch_size={FLAGS.batch_size} for {replicas} "
            f"replica{'s' * (replicas > 1)} with --batch_norm={FLAGS.batch_norm}. Use a larger "
            "batch, or fewer replicas or groups."
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
    moves = "teacher_momentum" in settings.METHODS[FLAGS.method]  # Or else sees no batch.
    if FLAGS.batch_norm == "shuffled" and replicas == 1 and training and moves:
        say(
            "On one device there is nothing to shuffle: BatchNorm sees the whole batch. "
            "--batch_norm=groups:N takes statistics of N parts, as N devices would."
        )
    if index > 0:
        sys.stdout = open(
            os.devnull, "w", errors="replace"
        )  # The chief speaks for all; errors go to stderr.
    return strategy


def load_data(strategy):
    if FLAGS.stages == ["export"]:
        return None
    # The chief first: what TFDS prepares on a shared disk, it prepares once.
    for turn in (True, False):
        with cluster.failing_together(strategy):
            if cluster.is_chief(strategy) == turn:
                train, test = load_splits()
                data = unbalanced(train, test) or run_data.Data(train, train, test)
                if data.train is not train:
                    say(isd_tf.datasets.describe(data.train))
    train = data.train
    cluster.require_same(strategy, {"images": json.dumps(fingerprint(train))})
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
    return data


def choose_settings(strategy, train):
    """Puts a number in the place of every `auto`, and returns sentences that say why.

    In a workdir with checkpoints it is the number that the run was begun with.
    """
    images, chosen = len(train) if train else 0, []
    rules = {
        "queue_size": lambda: auto.queue_size(images, FLAGS.batch_size),
        "epochs": lambda: auto.epochs(images),
        "learning_rate": lambda: auto.learning_rate(FLAGS.method, FLAGS.batch_size, images),
    }
    for name in [name for name in settings.AUTOMATIC if FLAGS[name].value == settings.AUTO]:
        if name == "queue_size" and name not in settings.METHODS[FLAGS.method]:
            FLAGS.queue_size = None
            continue
        begun_with = None
        with cluster.failing_together(strategy):
            if settings.is_begun():
                begun_with = workdirs.flag(pathlib.Path(FLAGS.workdir), name)
            elif not train:
                raise ValueError(f"{FLAGS.workdir} holds no checkpoint. Add pretrain to --stages.")
        if begun_with:
            value, reason = FLAGS[name].parser.parse(begun_with), "as the run was begun"
        else:
            value, reason = rules[name]()
        if name == "epochs" and FLAGS["knn_every_epochs"].using_default_value:
            FLAGS.knn_every_epochs = auto.knn_every_epochs(value)
            reason += f"; --knn_every_epochs={FLAGS.knn_every_epochs}"
        FLAGS[name].value = value
        chosen.append(f"--{name}={value:g}: {reason}.")
    settings_checks.check_queue()
    return chosen


def tell_settings(train, chosen):
    """Says what `auto` has become, and what is to be expected of so few images."""
    for sentence in chosen:
        say(sentence)
    if not train or "pretrain" not in FLAGS.stages:
        return
    if chosen and (few := plan.few_images_warning(len(train))):
        say(few)
    if large := plan.queue_warning(len(train)):
        logging.warning(large)


def load_splits():
    train, test = isd_tf.datasets.load(
        FLAGS.dataset, FLAGS.train_split, FLAGS.test_split, FLAGS.data_dir, FLAGS.image_list
    )
    for dataset in (train, test):
        if dataset:
            say(isd_tf.datasets.describe(dataset))
    return train, test


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
    return run_data.Data(*draw)


def fingerprint(train):
    return {"images": len(train), "digest": isd_tf.datasets.fingerprint(train)} if train else {}


def steps_per_epoch(train):
    return len(train) // FLAGS.batch_size if train else 1


def all_steps(train):
    return FLAGS.epochs * steps_per_epoch(train)


def build_encoder(strategy):
    """Builds the encoder, and loads a new run's initial weights before there is a teacher."""
    memory.require_for_networks(FLAGS.batch_size // cluster.number_of_workers(strategy))
    keras.utils.set_random_seed(FLAGS.seed)
    source = None if settings.is_begun() else FLAGS.initial_weights
    published = source == settings.PUBLISHED
    with cluster.failing_together(strategy), strategy.scope():
        encoder = isd_tf.build_encoder(
            FLAGS.encoder, FLAGS.image_size, FLAGS.width, *settings.batch_norm(), published
        )
        if backbones.is_foreign(FLAGS.encoder):
            say(backbones.describe(FLAGS.encoder))
        if source is None:
            return encoder, None
        if published:
            initial = initial_weights.published(encoder, FLAGS.encoder)
        else:
            initial = isd_tf.load_weights(
                encoder, source, FLAGS.initial_weights_encoder, FLAGS.initial_weights_step
            )
    cluster.require_same(strategy, {"--initial_weights": initial.sha256})
    say(f"Initial weights: {initial.sentence()}")
    return encoder, initial


def build_model(strategy, encoder, steps_per_epoch):
    synchronized, groups = settings.batch_norm()
    with strategy.scope():
        own = {name: FLAGS[name].value for name in settings.METHODS[FLAGS.method]}
        if FLAGS.method == "compress":
            teacher = teachers.load()
            memory.require_for_queue(teacher.output_shape[-1])
            model = isd_tf.CompRess(encoder, teacher, seed=FLAGS.seed, **own)
        else:
            heads = HEADS[FLAGS.heads](encoder.output_shape[-1], synchronized, groups)
            memory.require_for_queue((heads[0] or encoder).output_shape[-1])
            model = METHODS[FLAGS.method](
                encoder,
                *heads,
                shuffle_batch_norm=not synchronized,
                seed=FLAGS.seed,
                **own,
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


def show_plan(model, data, chosen):
    """Says what the run would take. Nothing is written, so that the run begins as without it."""
    train, workdir = data.train, pathlib.Path(FLAGS.workdir)
    if settings.is_begun():
        with cluster.failing_together(model.distribute_strategy):
            require_same_run(workdir, train)
    unreadable = Unreadable(len(train), FLAGS.max_unreadable, REPLACED, FLAGS.max_pixels)
    with explaining([unreadable]):
        batches_from = pretraining_stream(model.distribute_strategy, train, unreadable)
        say(plan.show(model, data, chosen, batches_from(0)))


def begin_or_continue(workdir, checkpoints, data, initial):
    """Leaves the recipe in a new workdir; in one with checkpoints, compares it."""
    teacher = None
    if FLAGS.method == "compress":  # Its teacher is in no checkpoint.
        teacher = teachers.record(checkpoints.model.encoders()["teacher"])
        cluster.require_same(checkpoints.strategy, {"teacher": json.dumps(teacher)})
    with cluster.failing_together(checkpoints.strategy):
        if not cluster.is_chief(checkpoints.strategy):
            return
        train = data.train if data else None
        if data:
            workdirs.name_left_out(workdir, data.bank, data.test)
        if not checkpoints.exist:
            (workdir / workdirs.METRICS).unlink(missing_ok=True)  # Of a run that saved nothing.
            flagfiles.write(workdir / "run.flags", settings.own_flags())
            (workdir / DATASET).write_text(json.dumps(fingerprint(train)) + "\n")
            if train:
                workdirs.keep_images(workdir, train)
            if initial:
                workdirs.keep_initial_weights(workdir, initial, checkpoints.model.student_encoder)
            if teacher:
                workdirs.write_json(workdir / workdirs.TEACHER, teacher)
        else:
            require_same_run(workdir, train)
            if teacher:
                workdirs.require_same_teacher(workdir, teacher, FLAGS.teacher)
        stages = ",".join(FLAGS.stages)
        trained_on = train if "pretrain" in FLAGS.stages else None
        workdirs.note_versions(workdir, checkpoints, stages, trained_on, bool(FLAGS.data_service))


def require_same_run(workdir, train):
    """Raises ValueError where a workdir was begun with another recipe, weights or images."""
    flagfiles.require_same(workdir / "run.flags", settings.recipe())
    workdirs.require_same_initial_weights(workdir)
    record, now = workdir / DATASET, fingerprint(train)
    before = workdirs.read_json(record) if record.exists() else now
    if train and before != now:
        same_number = before["images"] == len(train)
        raise ValueError(
            f"The workdir {workdir} was begun with other images: {before['images']} then, "
            f"{len(train)} of {train.name} now"
            + (workdirs.say_other_image(workdir, train) if same_number else "")
            + ". Restore them to continue it, or use another --workdir."
        )


def run_stages(model, checkpoints, first_step, data, workdir):
    run = evaluations.Run(model, data, settings.views(), workdir, checkpoints, counters=[])
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
                failures += export(run)
            try:
                say(f"Results: {workdirs.record(workdir, {}, run.step)}")
            except OSError as error:
                failures.append(program.failure("Writing the results", error))
            if "report" in FLAGS.stages:
                failures += report(run)
            if failures:
                raise ValueError(" ".join(failures))


def pretrain(run, first_step):
    model, train, checkpoints, workdir = run.model, run.data.train, run.checkpoints, run.workdir
    unreadable = run.counter(train, REPLACED)
    if first_step >= all_steps(train):
        say("The pretraining is complete.")
        return
    strategy = checkpoints.strategy
    batches_from = pretraining_stream(strategy, train, unreadable)
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
        *knn_callback(run, stop),
        monitoring.Progress(FLAGS.epochs),
        monitoring.TensorBoardLog(workdir / "logs", FLAGS.log_every_steps),
        metrics.MetricsLog(
            workdir / workdirs.METRICS, steps_per_epoch(train), FLAGS.log_every_steps
        ),
        *page_callback(run, stop),
        keras.callbacks.LambdaCallback(on_epoch_end=record_epoch),
    ]
    checking = [monitoring.CheckReplicas(settings.batch_norm()[0])] if FLAGS.check_replicas else []
    checkpointing.fit_from_step(
        model,
        batches_from,
        first_step,
        steps_per_epoch(train),
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


def pretraining_stream(strategy, train, unreadable):
    """Returns a function from a step to the batches from there on."""
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


def knn_callback(run, stop):
    data, every = run.data, FLAGS.knn_every_epochs
    if not every or run_data.reason_not_to_score(data):
        return []
    bank, queries = run.batches(data.bank), run.batches(data.test)
    references = {}
    # What the page holds the student against; compress, as it is on the way to its teacher.
    if "report" in FLAGS.stages or FLAGS.method == "compress":
        references = {"raw_pixels": knn.raw_pixels, "untrained": run.encoder("untrained")}
    return [knn.EvaluateKNN(bank, queries, every, data.rare_labels, references, lambda: stop.told)]


def page_callback(run, stop):
    if "report" not in FLAGS.stages:
        return []
    every = FLAGS.knn_every_epochs or EPOCHS_BETWEEN_PAGES
    return [reporting.Refresh(run, all_steps(run.data.train), every, lambda: stop.told)]


def export(run):
    """Exports the encoder; returns what went wrong, as evaluations.evaluate does."""
    failures = []
    for name in FLAGS.export_format:
        folder = run.workdir / name
        workdirs.remove_unfinished(folder)
        try:
            path = export_as(name, run, folder)
        except Exception as error:
            failures.append(program.failure(f"The export as {EXPORTS[name]}", error))
            continue
        say(f"{EXPORTS[name]} of the {FLAGS.export_encoder}: {path}")
    return failures


def report(run):
    """Writes the page; returns what went wrong, as evaluations.evaluate does."""
    try:
        say(f"Page to look at: {reporting.write(run, all_steps(run.data.train))}")
    except Exception as error:
        return [program.failure("The report", error)]
    return []


def export_as(name, run, folder):
    encoder = run.encoder(FLAGS.export_encoder)
    if name == "keras_hub":
        return isd_tf.export_keras_hub(encoder, FLAGS.image_size, folder)
    if name == "torch":
        return isd_tf.export_torch(encoder, folder)
    about = {"exported": FLAGS.export_encoder} | workdirs.about(run.workdir)
    return isd_tf.export_encoder(
        encoder, FLAGS.image_size, folder, max_pixels=FLAGS.max_pixels, about=about
    )


if __name__ == "__main__":
    program.run(main)
