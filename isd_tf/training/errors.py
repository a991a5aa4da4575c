"""What an error says to the person who started the run, in a sentence."""

import re

import tensorflow as tf

# What TensorFlow and Keras put around their sentence: nodes of graphs, stack traces and arguments.
_WRAPPINGS = re.compile(
    r"{{.*?}} ?| ?\[Op:.*?\]|\x1b\[\d*m|^Graph execution error:|^Detected at node .*"
    r"|^ *File \".*|^<stack traces unavailable>|^\d+ root error\(s\) found\.|^\s*\[\[.*"
    r"|^Exception encountered when calling .*|(?s:\n *Arguments received by .*)",
    re.MULTILINE,
)
_USER_CODE = re.compile(r"(?s)in user code:.*\n\s+(?:\w+\.)*\w*(?:Error|Exception): ")


def sentence(error: BaseException) -> str:
    """Returns what an error says, without the many lines of TensorFlow's and Keras'.

    Args:
        error: of whatever kind.
    """
    text = error.message if isinstance(error, tf.errors.OpError) else str(error)
    text = text or type(error).__name__
    if ran_out_of_memory(error):
        return (
            f"The memory does not suffice ({_first_line(text)}). Lower --batch_size, "
            "--queue_size, --image_size or --width, or use a smaller --encoder."
        )
    if "Error converting unicode string" in text:
        return (
            "TensorFlow takes paths in UTF-8 only (but those of images). Received one that is not. "
            "Rename what the flags name, or set LC_ALL=C.UTF-8 if it is UTF-8."
        )
    if isinstance(error, tf.errors.OpError):
        return f"{type(error).__name__}: {_first_line(text)}"
    if _USER_CODE.match(text) or _WRAPPINGS.search(text):
        text = _first_line(text)
    if isinstance(error, ValueError | OSError | FloatingPointError | RuntimeError):
        return text
    return f"{type(error).__name__}: {text}"


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had; a full disk has the same class in TF."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, tf.errors.ResourceExhaustedError):
        return bool(re.search(r"OOM|allocat|[Mm]emory", error.message))
    # A GPU's memory that runs out while something is copied there, or by the driver's word.
    return isinstance(error, tf.errors.OpError) and bool(
        re.search(r"Dst tensor is not initialized|(?i:out[ _]of[ _]memory)", error.message)
    )


def _first_line(text):
    """The first line that is not a wrapping."""
    lines = _WRAPPINGS.sub("", _USER_CODE.sub("", text)).splitlines()
    return next((line.strip() for line in lines if line.strip()), text.splitlines()[0])
