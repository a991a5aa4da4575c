"""Pretrains an encoder by ISD, or a method it is compared with, scores it and exports it.

    python experiments/run.py --flagfile=quickstart.flags
    python experiments/run.py --flagfile=imagenet.flags --data_dir=PATH --workdir=runs/imagenet

Flag files are looked for in the working directory and then beside this file. The same command in
the same workdir continues where it was stopped. Several machines: the same command on each, with
TF_CONFIG in its environment; launch.py starts several workers on one.

Exit codes: 0; 1 for an error that a sentence explains; 75 when the workers have lost each other;
130 and 143 when told to stop, by Ctrl-C and by SIGTERM.
"""

import pathlib
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
import beginning  # noqa: E402
import devices  # noqa: E402
import evaluations  # noqa: E402
import keras  # noqa: E402
import memory  # noqa: E402
import plan  # noqa: E402
import pretraining  # noqa: E402
import reporting  # noqa: E402
import run_data  # noqa: E402
import teachers  # noqa: E402
import tensorflow as tf  # noqa: E402
import workdirs  # noqa: E402
from absl import logging  # noqa: E402

import isd_tf  # noqa: E402
from isd_tf.data import check  # noqa: E402
from isd_tf.data.decoding import REPLACED, Unreadable, explaining  # noqa: E402
from isd_tf.networks import backbones  # noqa: E402
from isd_tf.networks.heads import HEADS  # noqa: E402
from isd_tf.training import checkpoints as checkpointing  # noqa: E402
from isd_tf.training import cluster, initial_weights  # noqa: E402

# What a check says of its progress.
SECONDS_BETWEEN_REPORTS = 10
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
    strategy = devices.choose()
    with cluster.noticing_lost_peers(strategy):
        data = load_data(strategy)
        train = data.train if data else None
        chosen = choose_settings(strategy, train)
        encoder, initial = build_encoder(strategy)
        model = build_model(strategy, encoder, run_data.steps_per_epoch(train))
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
                FLAGS.keep_every_epochs * run_data.steps_per_epoch(train),
                continue_without=FLAGS.if_checkpoint_fails == "continue",
            )
            beginning.begin_or_continue(workdir, checkpoints, data, initial)
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
    train, test = run_data.load_splits()
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


def load_data(strategy):
    if FLAGS.stages == ["export"]:
        return None
    data = run_data.load(strategy)
    evaluations.check_data(data)
    if FLAGS.batch_size > len(data.train):
        raise ValueError(
            f"A batch must fit into the dataset. Received: --batch_size={FLAGS.batch_size} for "
            f"{len(data.train)} images of {data.train.name}. Lower --batch_size, and --queue_size "
            "with it."
        )
    steps = run_data.steps_per_epoch(data.train)
    if steps % FLAGS.steps_per_execution:
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
            beginning.require_same_run(workdir, train)
    unreadable = Unreadable(len(train), FLAGS.max_unreadable, REPLACED, FLAGS.max_pixels)
    with explaining([unreadable]):
        batches_from = pretraining.stream(model.distribute_strategy, train, unreadable)
        say(plan.show(model, data, chosen, batches_from(0)))


def run_stages(model, checkpoints, first_step, data, workdir):
    run = evaluations.Run(model, data, settings.views(), workdir, checkpoints, counters=[])
    with explaining(run.counters):
        if "pretrain" in FLAGS.stages:
            pretraining.pretrain(run, first_step)
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
        say(f"Page to look at: {reporting.write(run, run_data.all_steps(run.data.train))}")
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
