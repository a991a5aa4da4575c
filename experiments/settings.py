"""The settings of a run: its flags, and what some of them mean.

Knows neither TensorFlow nor isd_tf, whose import takes seconds: `--help` and mistakes are answered
before. So the names that the package knows stand here once more; settings_test.py holds them to it.
What a command line may not say, settings_checks.py knows.
"""

import glob
import os
import re

from absl import flags

FLAGS = flags.FLAGS
STAGES = ("check", "plan", "pretrain", "evaluate", "export", "report")
ALONE = ("check", "plan")  # Each is a call of its own, before the training.
AUTO = "auto"  # The value of a number that is to be found for the images, of these flags:
AUTOMATIC = ("queue_size", "epochs", "learning_rate")
VIEWS = ("strong", "weak", "crop")
ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "tiny_resnet")
APPLICATIONS = (  # Of keras.applications, as --encoder=keras:NAME.
    "ResNet50 ResNet101 ResNet152 VGG16 VGG19 ResNet50V2 ResNet101V2 ResNet152V2 Xception "
    "InceptionV3 InceptionResNetV2 NASNetMobile NASNetLarge "
    "MobileNet MobileNetV2 MobileNetV3Small MobileNetV3Large DenseNet121 DenseNet169 DenseNet201 "
    "EfficientNetB0 EfficientNetB1 EfficientNetB2 EfficientNetB3 "
    "EfficientNetB4 EfficientNetB5 EfficientNetB6 EfficientNetB7 "
    "EfficientNetV2B0 EfficientNetV2B1 EfficientNetV2B2 EfficientNetV2B3 "
    "EfficientNetV2S EfficientNetV2M EfficientNetV2L "
    "ConvNeXtTiny ConvNeXtSmall ConvNeXtBase ConvNeXtLarge ConvNeXtXLarge"
).split()
LIBRARIES = ("keras:", "keras_hub:")  # How the names of their encoders begin.
PUBLISHED = "published"  # Weights that such a library offers.
HEADS = ("isd", "isd_plus", "moco_v2")
METHODS = {  # And the flags that are their settings.
    "isd": ("queue_size", "teacher_temperature", "student_temperature", "teacher_momentum"),
    "moco_v2": ("queue_size", "temperature", "teacher_momentum"),
    "byol": ("teacher_momentum",),
    "msf": ("queue_size", "neighbors", "teacher_momentum"),
    "compress": ("queue_size", "temperature"),
}
# Of compress alone: the given teacher.
TEACHER = ("teacher", "teacher_weights", "teacher_encoder", "teacher_image_size")
RANDOM = "random"
STRATEGIES = ("auto", "one", "mirrored", "multi_worker")
EVALUATIONS = (
    "knn",
    "linear",
    "fast_linear",
    "weighted_knn",
    "few_shot_knn",
    "transfer",
    "clusters",
    "neighbors",
    "curves",
)
ENCODERS = ("student", "teacher", "untrained", "initial")
PICKLES = (".pth", ".pt", ".pth.tar")
WEIGHTS_SUFFIXES = (".keras", ".weights.h5", ".safetensors", *PICKLES)
EXPORT_FORMATS = ("saved_model", "keras_hub", "torch")
KERAS_HUB_ENCODERS = ("resnet18", "resnet34", "resnet50")
KERAS_HUB_WIDTH = 64
LARGEST_SMALL_IMAGE = 64
LINEAR_EPOCHS = 40
MAX_PIXELS = 178_956_970
FEW_LABELS_LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FEW_LABELS_WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)
TRANSFER = {  # The paper's tasks, and what TFDS calls them.
    "food101": "food101",
    "cifar10": "cifar10",
    "cifar100": "cifar100",
    "sun397": "sun397/standard-part1-120k",
    "cars196": "cars196",
    "dtd": "dtd",
    "pets": "oxford_iiit_pet",
    "caltech101": "caltech101",
    "flowers102": "oxford_flowers102",
}


class _OrAuto(flags.ArgumentParser):
    """Reads a number, or the word auto: what experiments/auto.py then finds for the images."""

    def parse(self, argument):
        if argument == AUTO:
            return AUTO
        try:
            return super().parse(argument)
        except ValueError:
            raise ValueError(f"expected {self.syntactic_help}, or {AUTO}") from None


class IntegerOrAuto(_OrAuto, flags.IntegerParser):
    pass


class FloatOrAuto(_OrAuto, flags.FloatParser):
    pass


def _define_number_or_auto(parser, name, text):
    flags.DEFINE(parser, name, None, text, serializer=flags.ArgumentSerializer())


# Data
flags.DEFINE_string("dataset", None, "photo_patches, folder, list, or a TFDS name.")
flags.DEFINE_string(
    "data_dir", None, "The folder of images; or where a list's paths begin; or TFDS' data_dir."
)
flags.DEFINE_string("image_list", None, "The text file of --dataset=list: one image a line.")
flags.DEFINE_string("train_split", "train", "TFDS split or subfolder to pretrain on.")
flags.DEFINE_string(
    "test_split", None, "TFDS split or subfolder to test on; unset: test, validation, val or alike."
)
flags.DEFINE_float("max_unreadable", 0.01, "Largest share of the images that may be unreadable.")
flags.DEFINE_integer(
    "max_pixels", MAX_PIXELS, "Width times height beyond which an image counts as unreadable."
)
flags.DEFINE_string(
    "data_service",
    None,
    "host:port of a tf.data service's dispatcher, whose workers then prepare the views. Gives the "
    "exact order of the images up.",
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
flags.DEFINE_string(
    "views",
    None,
    "Views of teacher/student: weak/strong, strong/strong, ...; with compress also one that both "
    "see, such as crop.",
)

# Networks
flags.DEFINE_string(
    "encoder",
    None,
    f"One of {', '.join(ARCHITECTURES)}; keras:NAME, an image classifier of keras.applications "
    "without its head; keras_hub:PRESET, a backbone of KerasHub by name or folder; or FILE.keras, "
    "a Keras model from normalised images to one feature vector, which begins with its weights.",
)
flags.DEFINE_integer(
    "width",
    None,
    f"Channels of the first stage of {', '.join(ARCHITECTURES)}; unset: its usual ones.",
)
flags.DEFINE_string(
    "initial_weights",
    None,
    "Whose weights a new run's encoder begins with, all of them: the workdir of another run, a "
    f"Keras model or weights, or PyTorch's weights ({', '.join(WEIGHTS_SUFFIXES)}); or published: "
    "what the library of a keras: or keras_hub: encoder publishes for it. Unset: random.",
)
flags.DEFINE_enum(
    "initial_weights_encoder",
    "student",
    ["student", "teacher"],
    "Which of two encoders that a run, a model or a checkpoint holds.",
)
flags.DEFINE_integer(
    "initial_weights_step", None, "Which step of another run's checkpoints; unset: the newest."
)
flags.DEFINE_enum(
    "heads",
    None,
    HEADS,
    "isd: a predictor on the student's side; isd_plus (and BYOL): a projector on both sides as "
    "well; moco_v2: a projector only.",
)
flags.DEFINE_string(
    "batch_norm",
    "shuffled",
    "shuffled: each replica has statistics of its own, and the teacher's images are shuffled over "
    "all; groups:N: each replica has N, as N devices would; synchronized: one for all replicas. "
    "Also of foreign encoders, where their BatchNorm is not inside of other layers.",
)
flags.DEFINE_enum(
    "precision",
    "float32",
    ["float32", "mixed_bfloat16", "mixed_float16"],
    "Of the networks. Embeddings, similarities, divergence and queue are float32 in all.",
)

# Method
flags.DEFINE_enum("method", "isd", list(METHODS), "What the student learns from the teacher.")
_define_number_or_auto(
    IntegerOrAuto(),
    "queue_size",
    "Anchors in the queue. auto: a quarter to a half of the training images, a power of two.",
)
flags.DEFINE_float("teacher_temperature", None, "Divides the teacher's similarities.")
flags.DEFINE_float("student_temperature", None, "Divides the student's similarities.")
flags.DEFINE_float("temperature", 0.2, "With moco_v2 and compress: divides all similarities.")
flags.DEFINE_integer("neighbors", None, "With msf: nearest anchors that an image is moved to.")
flags.DEFINE_float("teacher_momentum", None, "Share of its past that the teacher keeps each step.")

# A given teacher: --method=compress
flags.DEFINE_string(
    "teacher",
    None,
    "The workdir of another run, a .keras file, a SavedModel with the signature `encode`; or the "
    "name of an encoder, with --teacher_weights.",
)
flags.DEFINE_string(
    "teacher_weights",
    None,
    "Of an encoder that --teacher names: the file or workdir with its weights; or published, for "
    "those that keras:NAME and keras_hub:PRESET come with; or random.",
)
flags.DEFINE_enum(
    "teacher_encoder",
    "student",
    ["student", "teacher"],
    "Which of two encoders that a run or a file of the --teacher holds.",
)
flags.DEFINE_integer(
    "teacher_image_size", None, "Side of the images that the teacher sees; unset: its own."
)

# Optimization
_define_number_or_auto(
    IntegerOrAuto(), "epochs", "Passes over the training images. auto: the fewer images, the more."
)
flags.DEFINE_integer("batch_size", None, "Global batch size, over all replicas.")
_define_number_or_auto(
    FloatOrAuto(),
    "learning_rate",
    "Learning rate of the first epoch. auto: by the batch; docs/settings.md has the rules.",
)
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
flags.DEFINE_list(
    "stages",
    ["pretrain", "evaluate", "export", "report"],
    "What to do: some of pretrain, evaluate, export, report, which writes report.html; or check, "
    "which reads every image and lists what is odd; or plan, which says what a run would take, by "
    "a few steps that leave nothing.",
)
flags.DEFINE_enum(
    "strategy",
    "auto",
    STRATEGIES,
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
flags.DEFINE_list(
    "export_format",
    ["saved_model"],
    "Some of saved_model, for TF Serving; keras_hub, a preset for KerasHub's ImageClassifier; "
    "torch, a torchvision state dict as .safetensors.",
)

# Evaluations
flags.DEFINE_list(
    "evaluations",
    ["knn"],
    f"What the evaluate stage does, of {', '.join(EVALUATIONS)}.",
)
flags.DEFINE_list(
    "evaluated_encoders",
    ["student"],
    "Which encoders linear, fast_linear, weighted_knn, few_shot_knn, transfer and clusters score, "
    f"of {', '.join(ENCODERS)}.",
)
flags.DEFINE_float(
    "label_fraction", 1.0, "Share of each class' labels that linear and fast_linear may use."
)
flags.DEFINE_string(
    "label_dataset",
    None,
    "TFDS name of the labelled images that linear and fast_linear are trained on instead of the "
    "training images: imagenet2012_subset/1pct or imagenet2012_subset/10pct.",
)
flags.DEFINE_list(
    "linear_learning_rates",
    [],
    "Of linear. Several are tried on held-out training images. Unset: 0.01, or with few labels "
    f"{', '.join(map(str, FEW_LABELS_LEARNING_RATES))}.",
)
flags.DEFINE_list(
    "linear_weight_decays",
    [],
    "Of linear and fast_linear, as the learning rates. Unset: 0.0001, or with few labels "
    f"{', '.join(map(str, FEW_LABELS_WEIGHT_DECAYS))}.",
)
flags.DEFINE_integer("linear_epochs", LINEAR_EPOCHS, "Passes of linear.")
flags.DEFINE_list(
    "transfer",
    list(TRANSFER),
    "Datasets to transfer to: the paper's nine by these names, TFDS names, folder:PATH.",
)
flags.DEFINE_string(
    "tfds_data_dir", None, "TFDS' folder of label_dataset and transfer; unset: its usual one."
)
flags.DEFINE_integer("clusters", None, "Number of clusters; unset: as many as classes.")
flags.DEFINE_list(
    "query_images", [], "Rows of the test images whose neighbors are drawn; unset: 8 random ones."
)
flags.DEFINE_list("compare_with", [], "Other workdirs that curves shows in the same picture.")

# What may change between two calls in one workdir; every other flag is the recipe. Which images are
# trained on, dataset.json knows, and teacher.json which teacher teaches.
NOT_RECIPE = (
    "unbalanced unbalanced_seed data_dir image_list test_split max_unreadable max_pixels "
    "teacher teacher_weights teacher_encoder "
    "data_service workdir stages strategy cluster_timeout logical_cpus steps_per_execution compile "
    "deterministic check_replicas checkpoint_every_steps keep_checkpoints keep_every_epochs "
    "if_checkpoint_fails log_every_steps knn_every_epochs export_encoder export_format "
    "evaluations evaluated_encoders label_fraction label_dataset linear_learning_rates "
    "linear_weight_decays linear_epochs transfer tfds_data_dir clusters query_images compare_with"
).split()
# What may differ between the workers of a cluster.
MACHINES_OWN = "data_dir image_list workdir cluster_timeout teacher teacher_weights".split()


def is_begun() -> bool:
    """Whether the workdir has checkpoints to continue from, damaged ones included."""
    folder = os.path.join(glob.escape(FLAGS.workdir), "checkpoints")
    return any(glob.glob(os.path.join(folder, f"{kind}-*")) for kind in ("step", "damaged"))


def own_flags() -> list[flags.Flag]:
    """The flags that are defined here."""
    return FLAGS.get_flags_for_module(__name__)


def recipe() -> list[flags.Flag]:
    """Those that must be the same in all calls in one workdir."""
    return [flag for flag in own_flags() if flag.name not in NOT_RECIPE]


def views() -> tuple[str, ...]:
    """The recipes of the teacher's view and of the student's, or of one that both see."""
    names = tuple(FLAGS.views.split("/"))
    numbers_of_views = (1, 2) if FLAGS.method == "compress" else (2,)
    if len(names) not in numbers_of_views or not set(names) <= set(VIEWS):
        one = ", or with --method=compress one that both see, such as crop"
        raise ValueError(
            f"Unknown views. Expected two of {', '.join(VIEWS)}, the teacher's and then the "
            f"student's, such as weak/strong{one}. Received: --views={FLAGS.views}."
        )
    return names


def teacher_kind() -> str:
    """What --teacher names: "workdir", "saved_model", "keras_file" or "encoder".

    Raises:
        ValueError, FileNotFoundError: when it is none of these.
    """
    path = FLAGS.teacher
    if os.path.exists(os.path.join(path, "run.flags")):
        return "workdir"
    folder = glob.escape(path)
    if glob.glob(f"{folder}/saved_model.pb") or glob.glob(f"{folder}/[0-9]*/saved_model.pb"):
        return "saved_model"
    if path.endswith(".keras") and os.path.isfile(path):
        return "keras_file"
    if path in ARCHITECTURES or path.startswith(("keras:", "keras_hub:")):
        return "encoder"
    kind = FileNotFoundError if not os.path.exists(path) else ValueError
    raise kind(
        "--teacher must be the workdir of a run, a .keras file, a SavedModel, or the name of an "
        f"encoder: {', '.join(ARCHITECTURES)}, keras:NAME or keras_hub:PRESET. Received: {path}."
    )


def batch_norm() -> tuple[bool, int]:
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


def unbalanced_numbers() -> tuple[int, int, int] | None:
    """LARGE, RARE and IMAGES of --unbalanced; None where it is not set or names a list.

    Raises:
        ValueError: when it is neither.
    """
    parts = (FLAGS.unbalanced or "").split(",")
    if len(parts) == 1:
        return None
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(
            "--unbalanced must be LARGE,RARE,IMAGES, such as 8,30,100, or a list's path. Received: "
            f"{FLAGS.unbalanced}."
        )
    return tuple(map(int, parts))


def numbers(name: str, kind: type) -> list[float] | list[int]:
    """The numbers of a list flag, int or float: rates and decays, positive as L-BFGS needs it."""
    try:
        found = [kind(value) for value in FLAGS[name].value]
    except ValueError:
        found = [float("nan")]
    if kind is float and not all(0 < number < float("inf") for number in found):
        found = [float("nan")]
    if any(number != number for number in found):
        what = "positive numbers" if kind is float else "whole numbers"
        received = ",".join(FLAGS[name].value)
        raise ValueError(f"--{name} must be {what}. Received: --{name}={received}.")
    return found


def transfer_name(name: str) -> str:
    """What a task of --transfer is called in the names of scores."""
    return re.sub(r"\W+", "_", name)


def transfer_source(name: str) -> str:
    """The TFDS name of a task of --transfer, or folder:PATH."""
    return TRANSFER.get(name, name)
