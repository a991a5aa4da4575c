"""Reads the command line of run.py, and refuses what it may not say.

Knows neither TensorFlow nor isd_tf, as settings.py, so that mistakes are answered at once.
"""

import difflib
import glob
import importlib.util
import os
import re

import flagfiles
import settings
from absl import flags
from program import say
from settings import FLAGS

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
    own = settings.METHODS[FLAGS.method]
    required = REQUIRED_TO_CHECK if FLAGS.stages == ["check"] else (*REQUIRED, *own)
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
    check_lines(settings.own_flags())
    unknown = [stage for stage in FLAGS.stages if stage not in settings.STAGES]
    if unknown or not FLAGS.stages:
        raise ValueError(
            f"Unknown stages. Expected some of {', '.join(settings.STAGES)}. "
            f"Received: --stages={','.join(FLAGS.stages)}."
        )
    alone = [stage for stage in FLAGS.stages if stage in settings.ALONE]
    if alone and len(FLAGS.stages) > 1:
        raise ValueError(
            f"The {alone[0]} is a call of its own, before the training. Received: "
            f"--stages={','.join(FLAGS.stages)}. Pass --stages={alone[0]} alone."
        )
    # Of a flag file's, a nested one may well be about another method.
    every = dict.fromkeys(name for names in settings.METHODS.values() for name in names)
    unused = [name for name in every if name in typed and name not in own]
    if unused:
        say(f"Of no effect with --method={FLAGS.method}: --{', --'.join(unused)}.")
    check_ranges(RANGES)
    if FLAGS.stages == ["check"]:
        return  # The rest is about trainings.
    if FLAGS.learning_rate != settings.AUTO and not 0 < FLAGS.learning_rate < float("inf"):
        raise ValueError(
            f"--learning_rate must be positive and finite. Received: {FLAGS.learning_rate}."
        )
    if FLAGS.queue_size != settings.AUTO:
        check_queue()
    if FLAGS.learning_rate_schedule == "drops":
        bad = [epoch for epoch in FLAGS.drop_epochs if not epoch.isdigit()]
        if bad or not FLAGS.drop_epochs:
            raise ValueError(
                "--learning_rate_schedule=drops needs epochs, such as --drop_epochs=141,181. "
                f"Received: --drop_epochs={','.join(FLAGS.drop_epochs)}."
            )
        if FLAGS.epochs == settings.AUTO:
            raise ValueError(
                "Drops come after so many epochs of as many. Received: --epochs=auto with "
                "--learning_rate_schedule=drops. Give their number, or use the cosine."
            )
    _check_encoder()
    settings.views()
    settings.batch_norm()
    settings.unbalanced_numbers()
    _check_initial_weights()
    _check_export()
    _check_teacher()


def check_queue() -> None:
    """Raises ValueError for a queue that is too small, where the method has one."""
    if "queue_size" not in settings.METHODS[FLAGS.method]:
        return
    if FLAGS.queue_size < FLAGS.batch_size:
        raise ValueError(
            f"queue_size must be at least the global batch size ({FLAGS.batch_size}). "
            f"Received: --queue_size={FLAGS.queue_size}. Raise it or lower --batch_size."
        )
    if FLAGS.method == "msf" and FLAGS.neighbors > FLAGS.queue_size:
        raise ValueError(
            f"--neighbors must be at most --queue_size={FLAGS.queue_size}. "
            f"Received: {FLAGS.neighbors}."
        )


def _check_initial_weights():
    path, step = FLAGS.initial_weights, FLAGS.initial_weights_step
    if path is None:
        if step is not None:
            raise ValueError(
                f"A step is one of another run's. Received: --initial_weights_step={step} without "
                "--initial_weights."
            )
        return
    if path == settings.PUBLISHED:
        if not FLAGS.encoder.startswith(settings.LIBRARIES) or step is not None:
            raise ValueError(
                f"Published weights are those of {' and '.join(settings.LIBRARIES)} encoders, and "
                f"of no step. Received: --initial_weights={path} with --encoder={FLAGS.encoder}"
                f"{'' if step is None else f', --initial_weights_step={step}'}."
            )
        return
    if os.path.realpath(path) == os.path.realpath(FLAGS.workdir):
        raise ValueError(
            "A run begins with the weights of another one, and continues its own without being "
            f"told. Received: --initial_weights={path}, which is --workdir."
        )
    if settings.is_begun():
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
    if not path.endswith(settings.WEIGHTS_SUFFIXES):
        raise ValueError(
            "--initial_weights must be a run's workdir, or a file ending in "
            f"{', '.join(settings.WEIGHTS_SUFFIXES)}. Received: {path}."
        )
    if path.endswith(settings.PICKLES) and importlib.util.find_spec("torch") is None:
        raise ValueError(
            "PyTorch reads .pth and .pt files, and is not installed: pip install 'torch>=2.6'. "
            f"Received: --initial_weights={path}. A .safetensors file needs none."
        )


def _check_export():
    unknown = [name for name in FLAGS.export_format if name not in settings.EXPORT_FORMATS]
    if unknown or not FLAGS.export_format:
        raise ValueError(
            f"--export_format must be some of {', '.join(settings.EXPORT_FORMATS)}. Received: "
            f"--export_format={','.join(FLAGS.export_format)}."
        )
    if "export" not in FLAGS.stages:
        return
    if "keras_hub" in FLAGS.export_format:
        usual = FLAGS.width in (None, settings.KERAS_HUB_WIDTH)
        if (
            FLAGS.encoder not in settings.KERAS_HUB_ENCODERS
            or FLAGS.image_size <= settings.LARGEST_SMALL_IMAGE
            or not usual
        ):
            raise ValueError(
                f"KerasHub's ResNet is {', '.join(settings.KERAS_HUB_ENCODERS)} of the usual width "
                f"for images above {settings.LARGEST_SMALL_IMAGE} pixels. Received: "
                f"--export_format=keras_hub with --encoder={FLAGS.encoder}, "
                f"--image_size={FLAGS.image_size}"
                f"{'' if usual else f', --width={FLAGS.width}'}."
            )
        if importlib.util.find_spec("keras_hub") is None:
            raise ValueError(
                "--export_format=keras_hub needs KerasHub, which is not installed: pip install "
                "'keras-hub==0.32.*'."
            )
    if "torch" in FLAGS.export_format and FLAGS.encoder not in settings.ARCHITECTURES:
        raise ValueError(
            f"PyTorch's names are known of {', '.join(settings.ARCHITECTURES)}. Received: "
            f"--export_format=torch with --encoder={FLAGS.encoder}."
        )


def _check_teacher():
    if FLAGS.method != "compress":
        given = [name for name in settings.TEACHER if FLAGS[name].value != FLAGS[name].default]
        if given:
            raise ValueError(
                f"Only --method=compress takes a given teacher. Received: --{', --'.join(given)} "
                f"with --method={FLAGS.method}."
            )
        return
    kind, weights = settings.teacher_kind(), FLAGS.teacher_weights
    if kind != "encoder" and weights:
        raise ValueError(
            f"--teacher={FLAGS.teacher} has weights of its own. Received: "
            f"--teacher_weights={weights}. Leave it out."
        )
    if kind == "encoder" and not weights:
        raise ValueError(
            "A teacher with random weights teaches nothing. Received: "
            f"--teacher={FLAGS.teacher} without --teacher_weights. Name their file, or pass "
            f"--teacher_weights={settings.RANDOM} if that is what you want to see."
        )
    is_path = kind == "encoder" and weights not in (settings.RANDOM, settings.PUBLISHED)
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
    if name in settings.ARCHITECTURES:
        return
    if not (name.startswith(settings.LIBRARIES) or name.endswith(".keras")):
        known = [*settings.ARCHITECTURES, *(f"keras:{one}" for one in settings.APPLICATIONS)]
        raise ValueError(
            f"Unknown encoder.{_nearest(name, known)} Expected one of "
            f"{', '.join(settings.ARCHITECTURES)}; keras:NAME, keras_hub:PRESET or FILE.keras. "
            f"Received: --encoder={name}."
        )
    if FLAGS.width is not None:
        raise ValueError(
            f"Only the encoders {', '.join(settings.ARCHITECTURES)} have a width. Received: "
            f"--width={FLAGS.width} with --encoder={name}."
        )
    kind, _, of_keras = name.partition(":")
    if kind == "keras" and of_keras not in settings.APPLICATIONS:
        raise ValueError(
            f"Unknown network of keras.applications.{_nearest(of_keras, settings.APPLICATIONS)} "
            f"Expected one of {', '.join(settings.APPLICATIONS)}. Received: --encoder={name}."
        )
    if kind == "keras_hub" and importlib.util.find_spec("keras_hub") is None:
        raise ValueError(
            f"--encoder={name} needs KerasHub. Install it by: pip install 'keras-hub==0.32.*'"
        )
    if kind not in ("keras", "keras_hub") and not os.path.isfile(name):
        raise FileNotFoundError(f"No such file. Received: --encoder={name}.")


def _nearest(name, known):
    by_lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[found[0]]}?" if found else ""


def _check_evaluations():
    for name, known in (
        ("evaluations", settings.EVALUATIONS),
        ("evaluated_encoders", settings.ENCODERS),
    ):
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
        settings.numbers(name, float)
    if any(row < 0 for row in settings.numbers("query_images", int)):
        raise ValueError("--query_images must be rows of the test images, counted from 0.")
    if "transfer" in FLAGS.evaluations and not FLAGS.transfer:
        raise ValueError("--evaluations=transfer needs datasets. Received: an empty --transfer.")
    names = list(map(settings.transfer_name, FLAGS.transfer))
    sources = [_whole(settings.transfer_source(name)) for name in FLAGS.transfer]
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


def _whole(source):
    """A source, however a folder is spelled."""
    _, is_folder, path = source.partition("folder:")
    return os.path.realpath(path) if is_folder else source


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
        value = FLAGS[name].value
        if value not in (None, settings.AUTO) and not low <= value <= high:
            raise ValueError(
                f"--{name} must be at least {low} and at most {high}. Received: {value}."
            )


def check_label_fraction() -> None:
    """Raises ValueError unless it is a share."""
    if not 0 < FLAGS.label_fraction <= 1:
        raise ValueError(
            "--label_fraction must be greater than 0 and at most 1. "
            f"Received: {FLAGS.label_fraction}."
        )
