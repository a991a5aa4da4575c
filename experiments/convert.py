"""Converts an encoder between runs of isd_tf, Keras' files and PyTorch's.

    python experiments/convert.py --source=resnet50.pth --target=resnet50.keras --encoder=resnet50

A source is the workdir of a run, or a file: .keras, .weights.h5, .safetensors, .pth or .pt. A
target is a file of these. PyTorch's hold torchvision's state dict, without a classifier: strict
loading takes them into a model whose `fc` is torch.nn.Identity(). .pth and .pt need PyTorch: pip
install 'torch>=2.6'. A .keras file of ours is loaded after `import isd_tf`.
"""

import argparse
import importlib.util
import os
import pathlib
import sys

import program

EXAMPLE = "python experiments/convert.py --source=runs/imagenet --target=encoder.safetensors"
TARGETS = (".keras", ".weights.h5", ".safetensors", ".pth", ".pt")
# Of the sources, those that do not say which network they are of.
PICKLES = (".pth", ".pt", ".pth.tar")
WEIGHTS_ALONE = (".weights.h5", ".safetensors", *PICKLES)
SOURCES = (".keras", *WEIGHTS_ALONE)


def main() -> None:
    program.prepare()
    # argparse, not absl: what is wrong ends with exit code 2.
    parser = argparse.ArgumentParser(
        usage=EXAMPLE, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, type=pathlib.Path, metavar="PATH")
    parser.add_argument("--target", required=True, type=pathlib.Path, metavar="PATH")
    parser.add_argument(
        "--source_encoder",
        choices=["student", "teacher"],
        default="student",
        help="of a source with both; default student",
    )
    parser.add_argument(
        "--source_step", type=int, metavar="N", help="of a run's checkpoints; default the newest"
    )
    parser.add_argument(
        "--encoder", metavar="NAME", help="such as resnet50, of a file that holds weights alone"
    )
    parser.add_argument(
        "--image_size", type=int, default=224, metavar="N", help="with --encoder; default 224"
    )
    parser.add_argument(
        "--width", type=int, metavar="N", help="with --encoder; default its usual one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the target if it exists")
    settings = parser.parse_args()
    problem = problem_of(settings)
    if problem:
        parser.error(problem)
    program.import_tensorflow()
    try:
        convert(settings)
    except Exception as error:
        sys.exit(f"convert.py: {program.sentence(error)}")


def problem_of(settings: argparse.Namespace) -> str | None:
    """What is wrong with a command line, as far as it shows without TensorFlow."""
    source, target = settings.source, settings.target
    if not source.exists():
        return f"No such source. Received: --source={source}."
    if not target.name.endswith(TARGETS):
        return f"--target must end in one of {', '.join(TARGETS)}. Received: {target}."
    if target.exists() and not settings.overwrite:
        return f"The target exists. Received: --target={target}. Pass --overwrite to replace it."
    alone = source.is_file() and source.name.endswith(WEIGHTS_ALONE)
    if source.is_file() and not source.name.endswith(SOURCES):
        kinds = ", ".join(SOURCES)
        return f"--source must be a workdir, or end in one of {kinds}. Received: {source}."
    if alone and settings.encoder is None:
        return f"{source} holds weights alone. Say of which network: --encoder=resnet50."
    if not alone and settings.encoder is not None:
        return f"{source} says itself which network it holds. Leave --encoder out."
    pickles = [path for path in (source, target) if path.name.endswith(PICKLES)]
    if pickles and importlib.util.find_spec("torch") is None:
        return (
            f"PyTorch reads and writes {pickles[0]}, and is not installed: pip install "
            "'torch>=2.6'. A .safetensors file needs none."
        )
    return None


def convert(settings: argparse.Namespace) -> None:
    """Loads the source, all of its weights, and writes the target, complete or not at all."""
    import isd_tf
    from isd_tf.training.initial_weights import load_keras_encoder

    source, target = settings.source, settings.target
    if source.suffix == ".keras":
        encoder, _ = load_keras_encoder(source, settings.source_encoder)
        program.say(f"Read: all {len(encoder.weights)} arrays of {source}.")
    else:
        encoder = isd_tf.build_encoder(*network_of(settings))
        loaded = isd_tf.load_weights(encoder, source, settings.source_encoder, settings.source_step)
        program.say(f"Read: {loaded.sentence()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"unfinished-{os.getpid()}-{target.name}")
    try:
        if target.suffix == ".keras":
            encoder.save(unfinished)
        elif target.suffix == ".h5":
            encoder.save_weights(unfinished)
        else:
            isd_tf.torch_weights.save(encoder, unfinished)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    program.say(f"Written: {target}")


def network_of(settings: argparse.Namespace) -> tuple[str, int, int | None]:
    """Name, image size and width of the source's encoder: as the run says, or the command line."""
    if settings.source.is_file():
        return settings.encoder, settings.image_size, settings.width
    import workdirs

    if not (settings.source / "run.flags").exists():
        raise ValueError(f"{settings.source} is not the workdir of a run: it has no run.flags.")
    name, size, width = (
        workdirs.flag(settings.source, flag) for flag in ("encoder", "image_size", "width")
    )
    return name, int(size), width and int(width)


if __name__ == "__main__":
    main()
