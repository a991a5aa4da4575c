"""The settings of a run: its flags, and what a command line may not say.

Knows neither TensorFlow nor isd_tf, whose import takes seconds: `--help` and mistakes are answered
before. So the names that the package knows stand here once more; settings_test.py holds them to it.
"""

import difflib
import glob
import importlib.util
import os
import re

import flagfiles
from absl import flags
from program import say

FLAGS = flags.FLAGS
STAGES = ("check", "pretrain", "evaluate", "export", "report")
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
flags.DEFINE_integer(
    "max_pixels", MAX_PIXELS, "Width times height beyond which an image counts as unreadable."
)
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
flags.DEFINE_integer("queue_size", None, "Anchors in the queue.")
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
flags.DEFINE_list(
    "stages",
    ["pretrain", "evaluate", "export", "report"],
    "What to do: some of pretrain, evaluate, export, report, which writes report.html; or check, "
    "which reads every image and lists what is odd.",
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
REQUIRED = "dataset image_size views encoder heads epochs batch_size learning_rate workdir".split()
REQUIRED_TO_CHECK = "dataset image_size workdir".split()
LARGEST = 2**31 - 1
RANGES = {  # Of every whole number, and of shares.
    "image_size": (1, LARGEST),
    "max_unreadable": (0, 1),
    "max_pixels": (1, LARGEST),
    "unbalanced_seed": (0, LARGEST),
    "width": (1, LARGEST),
    "queue_size": (1, LARGEST),
    "neighbors": (1, LARGEST),
    "teacher_image_size": (1, LARGEST),
    "epochs": (1, LARGEST),
    "batch_size": (1, LARGEST),
    "drop_factor": (0, 1),
    "seed": (0, LARGEST),
    "initial_weights_step": (1, LARGEST),
    "cluster_timeout": (1, LARGEST),
    "logical_cpus": (1, 1024),
    "steps_per_execution": (1, LARGEST),
    "checkpoint_every_steps": (0, LARGEST),
    "keep_checkpoints": (1, LARGEST),
    "keep_every_epochs": (0, LARGEST),
    "log_every_steps": (1, LARGEST),
    "knn_every_epochs": (0, LARGEST),
    "linear_epochs": (1, LARGEST),
    "clusters": (1, LARGEST),
}


def read(command_line: list[str]) -> None:
    """Reads a command line, the program's name first, and checks what it asks for.

    Raises:
        flags.Error: for a flag that does not exist, or a value that cannot be read.
        ValueError, OSError: naming what is wrong.
    """
    arguments = FLAGS(flagfiles.expand(command_line))[1:]
    if arguments:
        raise ValueError(f"Arguments must be flags. Received: {' '.join(arguments)}.")
    _check_recipe({name for word in command_line for name in re.findall(r"^--?(\w+)", word)})
    _check_evaluations()


def _check_recipe(typed):
    settings = METHODS[FLAGS.method]
    required = REQUIRED_TO_CHECK if FLAGS.stages == ["check"] else (*REQUIRED, *settings)
    unset = [name for name in required if FLAGS[name].value is None]
    if FLAGS.method == "compress" and FLAGS.stages != ["check"]:
        # Its student has a head of its own; and the default of the temperature is MoCo's.
        unset = [name for name in unset if name != "heads"]
        unset += ["teacher"] * (not FLAGS.teacher)
        unset += ["temperature"] * (not FLAGS["temperature"].present)
    if unset:
        raise ValueError(
            f"A recipe must set --{', --'.join(unset)}. Start from one of experiments/*.flags: "
            "python experiments/run.py --flagfile=quickstart.flags"
        )
    check_lines(own_flags())
    unknown = [stage for stage in FLAGS.stages if stage not in STAGES]
    if unknown or not FLAGS.stages:
        raise ValueError(
            f"Unknown stages. Expected some of {', '.join(STAGES)}. "
            f"Received: --stages={','.join(FLAGS.stages)}."
        )
    if "check" in FLAGS.stages and len(FLAGS.stages) > 1:
        raise ValueError(
            "The check is a call of its own, before the training. Received: "
            f"--stages={','.join(FLAGS.stages)}. Pass --stages=check alone."
        )
    # Of a flag file's, a nested one may well be about another method.
    every = dict.fromkeys(name for names in METHODS.values() for name in names)
    unused = [name for name in every if name in typed and name not in settings]
    if unused:
        say(f"Of no effect with --method={FLAGS.method}: --{', --'.join(unused)}.")
    check_ranges(RANGES)
    if FLAGS.stages == ["check"]:
        return  # The rest is about trainings.
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
    _check_encoder()
    if FLAGS.method == "msf" and FLAGS.neighbors > FLAGS.queue_size:
        raise ValueError(
            f"--neighbors must be at most --queue_size={FLAGS.queue_size}. "
            f"Received: {FLAGS.neighbors}."
        )
    views()
    batch_norm()
    _check_initial_weights()
    _check_export()
    _check_teacher()


def _check_initial_weights():
    path, step = FLAGS.initial_weights, FLAGS.initial_weights_step
    if path is None:
        if step is not None:
            raise ValueError(
                f"A step is one of another run's. Received: --initial_weights_step={step} without "
                "--initial_weights."
            )
        return
    if path == PUBLISHED:
        if not FLAGS.encoder.startswith(LIBRARIES) or step is not None:
            raise ValueError(
                f"Published weights are those of {' and '.join(LIBRARIES)} encoders, and of no "
                f"step. Received: --initial_weights={path} with --encoder={FLAGS.encoder}"
                f"{'' if step is None else f', --initial_weights_step={step}'}."
            )
        return
    if os.path.realpath(path) == os.path.realpath(FLAGS.workdir):
        raise ValueError(
            "A run begins with the weights of another one, and continues its own without being "
            f"told. Received: --initial_weights={path}, which is --workdir."
        )
    if is_begun():
        return  # They were loaded when it began.
    if not os.path.exists(path):
        raise FileNotFoundError(f"No such weights. Received: --initial_weights={path}.")
    if os.path.isdir(path):
        places = glob.glob(os.path.join(glob.escape(path), "checkpoints", "step-*"))
        names = [os.path.basename(place).removeprefix("step-") for place in places]
        steps = sorted(int(name) for name in names if name.isdigit())
        if not steps:
            raise ValueError(
                "The weights of a run are in its checkpoints. Received: "
                f"--initial_weights={path}, without any."
            )
        if step is not None and step not in steps:
            raise ValueError(
                f"{path} has checkpoints of the steps {', '.join(map(str, steps))}. Received: "
                f"--initial_weights_step={step}."
            )
        return
    if step is not None:
        raise ValueError(
            f"Only runs have steps. Received: --initial_weights_step={step} with the file {path}."
        )
    if not path.endswith(WEIGHTS_SUFFIXES):
        raise ValueError(
            "--initial_weights must be a run's workdir, or a file ending in "
            f"{', '.join(WEIGHTS_SUFFIXES)}. Received: {path}."
        )
    if path.endswith(PICKLES) and importlib.util.find_spec("torch") is None:
        raise ValueError(
            "PyTorch reads .pth and .pt files, and is not installed: pip install 'isd_tf[torch]'. "
            f"Received: --initial_weights={path}. A .safetensors file needs none."
        )


def is_begun() -> bool:
    """Whether the workdir has checkpoints to continue from, damaged ones included."""
    folder = os.path.join(glob.escape(FLAGS.workdir), "checkpoints")
    return any(glob.glob(os.path.join(folder, f"{kind}-*")) for kind in ("step", "damaged"))


def _check_export():
    unknown = [name for name in FLAGS.export_format if name not in EXPORT_FORMATS]
    if unknown or not FLAGS.export_format:
        raise ValueError(
            f"--export_format must be some of {', '.join(EXPORT_FORMATS)}. Received: "
            f"--export_format={','.join(FLAGS.export_format)}."
        )
    if "export" not in FLAGS.stages:
        return
    if "keras_hub" in FLAGS.export_format:
        usual = FLAGS.width in (None, KERAS_HUB_WIDTH)
        if (
            FLAGS.encoder not in KERAS_HUB_ENCODERS
            or FLAGS.image_size <= LARGEST_SMALL_IMAGE
            or not usual
        ):
            raise ValueError(
                f"KerasHub's ResNet is {', '.join(KERAS_HUB_ENCODERS)} of the usual width for "
                f"images above {LARGEST_SMALL_IMAGE} pixels. Received: --export_format=keras_hub "
                f"with --encoder={FLAGS.encoder}, --image_size={FLAGS.image_size}"
                f"{'' if usual else f', --width={FLAGS.width}'}."
            )
        if importlib.util.find_spec("keras_hub") is None:
            raise ValueError(
                "--export_format=keras_hub needs KerasHub, which is not installed: pip install "
                "'isd_tf[hub]'."
            )
    if "torch" in FLAGS.export_format and FLAGS.encoder not in ARCHITECTURES:
        raise ValueError(
            f"PyTorch's names are known of {', '.join(ARCHITECTURES)}. Received: "
            f"--export_format=torch with --encoder={FLAGS.encoder}."
        )


def _check_teacher():
    if FLAGS.method != "compress":
        given = [name for name in TEACHER if FLAGS[name].value != FLAGS[name].default]
        if given:
            raise ValueError(
                f"Only --method=compress takes a given teacher. Received: --{', --'.join(given)} "
                f"with --method={FLAGS.method}."
            )
        return
    kind, weights = teacher_kind(), FLAGS.teacher_weights
    if kind != "encoder" and weights:
        raise ValueError(
            f"--teacher={FLAGS.teacher} has weights of its own. Received: "
            f"--teacher_weights={weights}. Leave it out."
        )
    if kind == "encoder" and not weights:
        raise ValueError(
            "A teacher with random weights teaches nothing. Received: "
            f"--teacher={FLAGS.teacher} without --teacher_weights. Name their file, or pass "
            f"--teacher_weights={RANDOM} if that is what you want to see."
        )
    is_path = kind == "encoder" and weights not in (RANDOM, PUBLISHED)
    if is_path and not os.path.exists(weights):
        raise FileNotFoundError(f"No such file. Received: --teacher_weights={weights}.")
    if kind == "workdir" and os.path.realpath(FLAGS.teacher) == os.path.realpath(FLAGS.workdir):
        raise ValueError(
            f"A run cannot be its own teacher. Received: --teacher={FLAGS.teacher}, the --workdir."
        )
    if kind == "workdir" and not glob.glob(
        os.path.join(glob.escape(FLAGS.teacher), "checkpoints", "step-*")
    ):
        raise ValueError(
            "A run must have a checkpoint to be a teacher. Received: "
            f"--teacher={FLAGS.teacher}, which has none."
        )


def _check_encoder():
    """As far as one can without TensorFlow."""
    name = FLAGS.encoder
    if name in ARCHITECTURES:
        return
    if not (name.startswith(LIBRARIES) or name.endswith(".keras")):
        known = [*ARCHITECTURES, *(f"keras:{one}" for one in APPLICATIONS)]
        raise ValueError(
            f"Unknown encoder.{_nearest(name, known)} Expected one of {', '.join(ARCHITECTURES)}; "
            f"keras:NAME, keras_hub:PRESET or FILE.keras. Received: --encoder={name}."
        )
    if FLAGS.width is not None:
        raise ValueError(
            f"Only the encoders {', '.join(ARCHITECTURES)} have a width. Received: "
            f"--width={FLAGS.width} with --encoder={name}."
        )
    kind, _, of_keras = name.partition(":")
    if kind == "keras" and of_keras not in APPLICATIONS:
        raise ValueError(
            f"Unknown network of keras.applications.{_nearest(of_keras, APPLICATIONS)} Expected "
            f"one of {', '.join(APPLICATIONS)}. Received: --encoder={name}."
        )
    if kind == "keras_hub" and importlib.util.find_spec("keras_hub") is None:
        raise ValueError(
            f"--encoder={name} needs KerasHub. Install it by: pip install 'isd_tf[hub]'"
        )
    if kind not in ("keras", "keras_hub") and not os.path.isfile(name):
        raise FileNotFoundError(f"No such file. Received: --encoder={name}.")


def _nearest(name, known):
    by_lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[found[0]]}?" if found else ""


def _check_evaluations():
    for name, known in (("evaluations", EVALUATIONS), ("evaluated_encoders", ENCODERS)):
        unknown = [value for value in FLAGS[name].value if value not in known]
        if unknown or not FLAGS[name].value:
            raise ValueError(
                f"--{name} must be some of {', '.join(known)}. Received: "
                f"--{name}={','.join(FLAGS[name].value)}."
            )
    if "initial" in FLAGS.evaluated_encoders and FLAGS.initial_weights is None:
        raise ValueError(
            "The initial encoder is that of a run with --initial_weights. Received: "
            f"--evaluated_encoders={','.join(FLAGS.evaluated_encoders)} without."
        )
    check_label_fraction()
    if FLAGS.label_dataset and FLAGS.label_fraction < 1:
        raise ValueError(
            "Few labels are either a share or a dataset. Received: "
            f"--label_fraction={FLAGS.label_fraction} and --label_dataset={FLAGS.label_dataset}."
        )
    for name in ("linear_learning_rates", "linear_weight_decays"):
        numbers(name, float)
    if any(row < 0 for row in numbers("query_images", int)):
        raise ValueError("--query_images must be rows of the test images, counted from 0.")
    if "transfer" in FLAGS.evaluations and not FLAGS.transfer:
        raise ValueError("--evaluations=transfer needs datasets. Received: an empty --transfer.")
    names = list(map(transfer_name, FLAGS.transfer))
    sources = [_whole(transfer_source(name)) for name in FLAGS.transfer]
    same = [
        name
        for name, score_name, source in zip(FLAGS.transfer, names, sources, strict=True)
        if names.count(score_name) > 1 or sources.count(source) > 1
    ]
    if same:
        raise ValueError(f"--transfer must name datasets apart. Received: {', '.join(same)}.")
    folders = [name.removeprefix("folder:") for name in FLAGS.transfer if "folder:" in name]
    for path in folders if "transfer" in FLAGS.evaluations else []:
        if not os.path.isdir(path):
            raise FileNotFoundError(f"No such folder. Received: --transfer=folder:{path}.")
    for path in FLAGS.compare_with:
        if not os.path.exists(os.path.join(path, "run.flags")):
            raise FileNotFoundError(
                f"--compare_with must name workdirs of runs. Received: {path}, without run.flags."
            )


def check_lines(flags_: list[flags.Flag]) -> None:
    """Raises ValueError for a value that a flag file cannot hold."""
    for flag in flags_:
        if re.search(r"[\r\n]", str(flag.value)):
            raise ValueError(
                f"A flag must stand on one line, as in the run.flags that a run leaves. Received: "
                f"--{flag.name}={flag.value!r}."
            )


def check_ranges(ranges: dict[str, tuple[float, float]]) -> None:
    """Raises ValueError for a number outside of its range, lowest and highest by flag."""
    for name, (low, high) in ranges.items():
        if FLAGS[name].value is not None and not low <= FLAGS[name].value <= high:
            raise ValueError(
                f"--{name} must be at least {low} and at most {high}. "
                f"Received: {FLAGS[name].value}."
            )


def check_label_fraction() -> None:
    """Raises ValueError unless it is a share."""
    if not 0 < FLAGS.label_fraction <= 1:
        raise ValueError(
            "--label_fraction must be greater than 0 and at most 1. "
            f"Received: {FLAGS.label_fraction}."
        )


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


def _whole(source):
    """A source, however a folder is spelled."""
    _, is_folder, path = source.partition("folder:")
    return os.path.realpath(path) if is_folder else source
