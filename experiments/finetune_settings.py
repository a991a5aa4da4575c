"""The flags of finetune.py: those that it shares with run.py, and its own; and their checks.

Knows neither TensorFlow nor isd_tf, as settings.py, in which the shared ones stand.
"""

import os

import flagfiles
import settings
import settings_checks
from absl import flags

FLAGS = flags.FLAGS
CLASS_WEIGHTS = ("balanced", "none")
# What holds weights, and not the network that they are of.
WEIGHTS_ALONE = tuple(x for x in settings.WEIGHTS_SUFFIXES if x != ".keras")

# Of settings.py: what each means here, where that is not what it means there.
SHARED = {
    "dataset": None,
    "data_dir": None,
    "image_list": None,
    "train_split": "TFDS split or subfolder to train on.",
    "test_split": None,
    "max_unreadable": None,
    "max_pixels": None,
    "label_fraction": "Share of each class' labels to use, drawn by --seed.",
    "encoder": "What to begin with: the workdir of a pretraining; a Keras model, FILE.keras; or "
    f"weights alone ({', '.join(WEIGHTS_ALONE)}), with --architecture. To train from scratch, the "
    f"name of a network, whose weights are then random: {', '.join(settings.ARCHITECTURES)}, "
    "keras:NAME, keras_hub:PRESET.",
    "image_size": "Side of the views in pixels; unset: that of the pretraining.",
    "width": "Channels of the first stage, of weights alone and of networks from scratch.",
    "epochs": "Passes over the training images with the whole network, at most. 0: the encoder "
    "stays as it is. Unset: as many as make {steps} steps, but {least} to {most}.",
    "batch_size": "Images a step, over all replicas; unset: 32.",
    "learning_rate": "Of the whole network, in its first epoch; it falls by a cosine. Unset: "
    "{pretrained}, or from scratch {scratch}.",
    "weight_decay": "Of the whole network's SGD, on every trainable weight.",
    "seed": "Seed of the drawn labels, the held-out part, order, views and random weights.",
    "workdir": "Receives flags, checkpoints, logs, results, tables and SavedModel.",
    "strategy": "One device; all of this machine (mirrored); or whatever is there. Not several.",
    "logical_cpus": None,
    "deterministic": None,
    "checkpoint_every_steps": None,
    "keep_checkpoints": None,
    "log_every_steps": None,
}
BATCH_SIZE = 32
LEARNING_RATE, LEARNING_RATE_FROM_SCRATCH = 0.03, 0.05
STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 1000, 10, 100

flags.DEFINE_string(
    "architecture", None, "The network that an --encoder of weights alone is of: resnet50, ..."
)
flags.DEFINE_float(
    "held_out", 0.2, "Share of each class' training images that is kept to choose the epoch by."
)
flags.DEFINE_integer(
    "patience",
    None,
    "Epochs without a better one, after which training stops; unset: half of all.",
)
flags.DEFINE_enum(
    "class_weights",
    "balanced",
    CLASS_WEIGHTS,
    "balanced: every class counts the same in training and choice, an image N / (K n), at most 10 "
    "(N images, K classes, n of its own); none: every image counts the same.",
)
OWN = ("architecture", "held_out", "patience", "class_weights")

# As in settings.NOT_RECIPE.
NOT_RECIPE = (
    "data_dir image_list test_split max_unreadable max_pixels workdir strategy logical_cpus "
    "deterministic checkpoint_every_steps keep_checkpoints log_every_steps"
).split()
RANGES = {
    **{name: settings_checks.RANGES[name] for name in SHARED if name in settings_checks.RANGES},
    "epochs": (0, settings_checks.LARGEST),
    "weight_decay": (0, 1),
    "patience": (1, settings_checks.LARGEST),
}
REQUIRED = ("dataset", "encoder", "workdir")


def explain() -> None:
    """Makes --help tell of these flags alone, and what they mean here."""
    for name, text in SHARED.items():
        flags.declare_key_flag(name)
        if text:
            FLAGS[name].help = text.format(
                steps=STEPS,
                least=FEWEST_EPOCHS,
                most=MOST_EPOCHS,
                pretrained=LEARNING_RATE,
                scratch=LEARNING_RATE_FROM_SCRATCH,
            )


def read(command_line: list[str]) -> None:
    """Reads a command line, the program's name first, and checks what it asks for.

    Raises:
        flags.Error: for a flag that does not exist, or a value that cannot be read.
        ValueError, OSError: naming what is wrong.
    """
    arguments = FLAGS(flagfiles.expand(command_line))[1:]
    if arguments:
        raise ValueError(f"Arguments must be flags. Received: {' '.join(arguments)}.")
    foreign = [x.name for x in settings.own_flags() if x.present and x.name not in SHARED]
    if foreign:
        raise ValueError(f"finetune.py has no --{', --'.join(foreign)}. Those are run.py's.")
    unset = [name for name in REQUIRED if FLAGS[name].value is None]
    if unset:
        raise ValueError(
            f"Finetuning needs --{', --'.join(unset)}, as in: python experiments/finetune.py "
            "--encoder=runs/quickstart --dataset=photo_patches --workdir=runs/finetuned"
        )
    automatic = [name for name in settings.AUTOMATIC if FLAGS[name].value == settings.AUTO]
    if automatic:
        raise ValueError(
            f"auto is run.py's. Received: --{automatic[0]}=auto. Leave it out: finetune.py then "
            "chooses by itself."
        )
    settings_checks.check_lines(own_flags())
    settings_checks.check_ranges(RANGES)
    settings_checks.check_label_fraction()
    if not 0 < FLAGS.held_out < 1:
        raise ValueError(
            f"--held_out must be greater than 0 and smaller than 1. Received: {FLAGS.held_out}."
        )
    if FLAGS.learning_rate is not None and not 0 < FLAGS.learning_rate < float("inf"):
        raise ValueError(
            f"--learning_rate must be positive and finite. Received: {FLAGS.learning_rate}."
        )
    if FLAGS.strategy == "multi_worker":
        raise ValueError(
            "Finetuning works on one machine. Received: --strategy=multi_worker. Use auto, one or "
            "mirrored."
        )
    if os.path.exists(os.path.join(FLAGS.workdir, "run.flags")):
        raise ValueError(
            f"--workdir must not be that of a pretraining. Received: {FLAGS.workdir}. Use another."
        )
    _check_encoder()
    if FLAGS.batch_size is None:
        FLAGS.batch_size = BATCH_SIZE
    if FLAGS.learning_rate is None:
        scratch = kind_of_encoder() == "scratch"
        FLAGS.learning_rate = LEARNING_RATE_FROM_SCRATCH if scratch else LEARNING_RATE


def kind_of_encoder() -> str:
    """What --encoder names: "run", "keras", "weights" or, for random weights, "scratch"."""
    name = FLAGS.encoder
    if name in settings.ARCHITECTURES or name.startswith(("keras:", "keras_hub:")):
        return "scratch"
    if os.path.isdir(name):
        return "run"
    if not os.path.exists(name):
        raise FileNotFoundError(
            "--encoder must be the workdir of a pretraining, a file, or the name of a network: "
            f"{', '.join(settings.ARCHITECTURES)}, keras:NAME, keras_hub:PRESET. Received: "
            f"{name}, which does not exist."
        )
    if name.endswith(settings.WEIGHTS_SUFFIXES):
        return "keras" if name.endswith(".keras") else "weights"
    raise ValueError(
        f"A file of --encoder must end in one of {', '.join(settings.WEIGHTS_SUFFIXES)}. Received: "
        f"{name}."
    )


def _check_encoder():
    kind = kind_of_encoder()
    if kind == "run" and not os.path.exists(os.path.join(FLAGS.encoder, "run.flags")):
        served = os.path.exists(os.path.join(FLAGS.encoder, "saved_model.pb"))
        raise ValueError(
            f"A folder of --encoder must be the workdir of a pretraining. Received: "
            f"{FLAGS.encoder}, which "
            + ("is a SavedModel: it can be served, not trained." if served else "has no run.flags.")
        )
    if kind == "run" and os.path.realpath(FLAGS.encoder) == os.path.realpath(FLAGS.workdir):
        raise ValueError("--workdir must not be that of the pretraining. Use another one.")
    if (kind == "weights") != (FLAGS.architecture is not None):
        raise ValueError(
            f"{FLAGS.encoder} holds weights alone. Say of which network: --architecture=resnet50."
            if kind == "weights"
            else f"--architecture is for an --encoder of weights alone "
            f"({', '.join(WEIGHTS_ALONE)}). Received: --encoder={FLAGS.encoder}, which says itself "
            "which network it is."
        )
    if kind in ("run", "keras") and FLAGS.width is not None:
        raise ValueError(f"{FLAGS.encoder} says itself how wide it is. Leave --width out.")
    if kind in ("weights", "scratch") and FLAGS.image_size is None:
        raise ValueError(
            f"--encoder={FLAGS.encoder} does not say for which images it is. Pass --image_size."
        )


def own_flags() -> list[flags.Flag]:
    """The flags of finetune.py."""
    return [FLAGS[name] for name in (*SHARED, *OWN)]


def recipe() -> list[flags.Flag]:
    """Those that must be the same in all calls in one workdir."""
    return [flag for flag in own_flags() if flag.name not in NOT_RECIPE]
