"""How the programs of this folder begin and end. Imported first: TensorFlow reads what it sets."""

import contextlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

from absl import app, flags, logging

# TensorFlow leaves oneDNN off on CPUs without AVX-512, at half the speed.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

FLAGS = flags.FLAGS
# Which machines with NVIDIA's driver have, whether TensorFlow can use it or not.
GPU_DRIVER = pathlib.Path("/dev/nvidiactl")


def begin(read_flags: Callable[[list[str]], None]) -> None:
    """Reads the command line, so that --help and mistakes need not wait for TensorFlow.

    Args:
        read_flags: reads and checks what `sys.argv` says.
    """
    prepare()
    app.define_help_flags()
    with _errors_in_a_sentence():
        try:
            read_flags(sys.argv)
        except SystemExit:  # After the help, by absl, with 1.
            sys.exit(0)


def run(main: Callable[[], None]) -> None:
    """Runs a program whose command line has been read."""

    def in_sentences(_):
        with _errors_in_a_sentence():
            main()

    app.run(in_sentences, argv=sys.argv[:1], flags_parser=lambda arguments: arguments)


@contextlib.contextmanager
def in_sentences() -> Iterator[None]:
    """Ends errors in one sentence, in a program that has flags of its own; Ctrl-C without one."""
    name = pathlib.Path(sys.argv[0]).name
    try:
        yield
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues.", file=sys.stderr, flush=True)
        sys.exit(130)  # As shells have it: 128 + SIGINT.
    except Exception as error:
        logging.debug("Where this was found:", exc_info=error)
        print(f"{name}: {printable(sentence(error))}", file=sys.stderr, flush=True)
        sys.exit(1)


def prepare() -> None:
    """Comes first in every program.

    No name of a file or class ends a run in a terminal that cannot show it: it is escaped. Windows,
    which has neither locks nor signals of this kind, is refused.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    if importlib.util.find_spec("fcntl") is None:
        sys.exit("These programs need Linux or macOS. Received: Windows. Use WSL there.")


@contextlib.contextmanager
def _errors_in_a_sentence() -> Iterator[None]:
    """Ends errors in one sentence, and with --verbosity=1 in a stack trace as well."""
    try:
        yield
    except Exception as error:
        if FLAGS.is_parsed() and FLAGS.verbosity >= 1:
            raise
        more = "--help explains all flags" if isinstance(error, flags.Error) else ""
        more = more or "--verbosity=1 shows where this was found"
        name = pathlib.Path(sys.argv[0]).name
        print(f"{name}: {printable(sentence(error))}\n({more}.)", file=sys.stderr, flush=True)
        sys.exit(getattr(error, "exit_code", 1))


def sentence(error: Exception) -> str:
    """What an error says to the person who started the program."""
    if "tensorflow" not in sys.modules:
        known = isinstance(error, flags.Error | ValueError | OSError)
        return str(error) if known else f"{type(error).__name__}: {error}"
    from isd_tf.training import errors

    return errors.sentence(error)


def failure(what: str, error: Exception) -> str:
    """Says that a part of the work has failed, which the other parts survive; returns the text."""
    text = f"{what} failed: {sentence(error)}"
    say(text)
    logging.debug("Where this was found:", exc_info=error)  # With --verbosity=1.
    return text


def say(text: str) -> None:
    print(printable(text), flush=True)


def printable(text: str) -> str:
    """Escapes what moves a terminal's cursor, turns its letters around or is no UTF-8.

    Ends of lines stay: those in a name are the place's to escape where it is said.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def import_tensorflow() -> None:
    """Imports TensorFlow without the seven lines that it writes on a machine without a GPU.

    They come from C++, at the import and where GPUs are first looked for, and go past Python to
    descriptor 2. All that is said there is shown nevertheless when the import fails, when it ends
    the process, as on a processor for which TensorFlow was not built, and when there is a GPU
    that cannot be used.
    """
    if "tensorflow" in sys.modules:
        return
    with _shown_unless_approved() as approve:
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU") or not GPU_DRIVER.exists():
            approve()


@contextlib.contextmanager
def _shown_unless_approved() -> Iterator[Callable[[], None]]:
    """Holds back what is written to descriptor 2 inside, and drops it if that is approved.

    Another process holds it, which outlives a crash of this one.
    """
    sys.stderr.flush()
    reading, writing = os.pipe()
    holder = os.fork()
    if not holder:
        os.close(writing)
        _hold(reading)
    os.close(reading)
    stderr, approved = os.dup(2), []
    os.dup2(writing, 2)
    os.close(writing)
    try:
        yield lambda: approved.append(True)
    finally:
        sys.stderr.flush()
        os.write(2, _DROP if approved else _SHOW)
        os.dup2(stderr, 2)
        os.close(stderr)
        os.waitpid(holder, 0)


# What no text ends with.
_DROP, _SHOW = b"\0drop", b"\0show"


def _hold(reading):
    """The life of the process that holds the lines back."""
    os.setsid()  # Ctrl-C is meant for the other one.
    said = b""
    while not said.endswith((_DROP, _SHOW)):
        more = os.read(reading, 2**16)
        if not more:
            break  # The other one has ended.
        said += more
    if not said.endswith(_DROP):
        with contextlib.suppress(OSError):
            os.write(2, said.removesuffix(_SHOW))
    os._exit(0)
