"""Random crops in Python, of one image at a time: `crops` for where there is Python.

By cykooz_resizer (the Rust library fast_image_resize), in a third of the time of Pillow's resize.
Boxes are the graph's. Pixels are whole numbers here too, which do not depend on the processor or on
threads; some differ from the graph's by a level of 255; by two at most, as both round twice.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

try:
    import cykooz_resizer
except ModuleNotFoundError:  # It has no wheel for Linux on ARM; the graph crops there.
    cykooz_resizer = None

ATTEMPTS = 10
ASPECT = (3 / 4, 4 / 3)
# Of a large image so many pixels at a time are copied, or in the graph become floats.
PART_PIXELS = 2**21


class RandomCropsOfImage(NamedTuple):
    """One random crop for each of V views."""

    size: int
    areas: tuple[tuple[float, float], ...]

    def __call__(self, image, draws):  # [H, W, 3], [V, 22]
        views = zip(draws.tolist(), self.areas, strict=True)
        boxes = [crop_box(own, *image.shape[:2], area) for own, area in views]
        return [resize_box(image, box, self.size) for box in boxes]


def crop_box(
    draws: Sequence[float],
    height: int,
    width: int,
    area: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Chooses the box that `crops.crop_boxes` chooses.

    Args:
        draws: 22 numbers, of `crops.crop_draws`.
        height, width: of the image in pixels.
        area: as in `crops.random_resized_crop`.

    Returns:
        top, left, height and width in pixels.
    """
    (least, most), (narrow, wide) = area, map(math.log, ASPECT)
    for attempt in range(ATTEMPTS):
        pixels = height * width * (least + draws[attempt] * (most - least))
        ratio = math.exp(narrow + draws[ATTEMPTS + attempt] * (wide - narrow))
        box_height, box_width = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(draws[-2] * (height - box_height + 1))
            left = int(draws[-1] * (width - box_width + 1))
            return top, left, box_height, box_width
    box_height = min(height, round(width / ASPECT[0]))
    box_width = min(width, round(height * ASPECT[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def resize_box(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Cuts a box out of an image and resizes it.

    Args:
        image: uint8 [H, W, 3].
        box: top, left, height and width in pixels.
        size: side S of the result in pixels.

    Returns:
        uint8 [S, S, 3], read-only.
    """
    top, left, height, width = box
    box_pixels = image[top : top + height, left : left + width]
    bilinear = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.bilinear)
    options, resizer = cykooz_resizer.ResizeOptions(bilinear), cykooz_resizer.Resizer()

    def pixels(width, height, values=None):
        return cykooz_resizer.ImageData(width, height, cykooz_resizer.PixelType.U8x3, values)

    def resized(source, width, height):
        result = pixels(width, height)
        resizer.resize(source, result, options)
        return result

    # Across first, as the graph does; at once it would go down first, and round otherwise.
    def across(first, last):
        # Pixel by pixel: of a turned photograph, numpy would copy byte by byte.
        part = box_pixels[first:last].view("V3").tobytes()
        return resized(pixels(width, last - first, part), size, last - first)

    # A copy of a large box would take as much memory as the image.
    rows = PART_PIXELS // width
    if rows >= height:
        narrow = across(0, height)
    else:
        parts = (across(y, min(y + rows, height)) for y in range(0, height, rows))
        narrow = pixels(size, height, b"".join(part.get_buffer() for part in parts))
    whole = resized(narrow, size, size).get_buffer()
    return np.frombuffer(whole, np.uint8).reshape(size, size, 3)
