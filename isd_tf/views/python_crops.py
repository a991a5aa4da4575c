"""Random crops in Python, of one image at a time.

Boxes are those of `crops`. Two libraries can resize:

    cykooz_resizer   the Rust library fast_image_resize, in a third of Pillow's time; it has no
                     wheel for Linux on ARM
    pillow           everywhere

Pixels are whole numbers in both, which do not depend on the processor or on threads. Some differ by
a level of 255 between the two and from those of `crops`; by two at most, as all round twice.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

try:
    import cykooz_resizer
except ModuleNotFoundError:
    cykooz_resizer = None

ATTEMPTS = 10
ASPECT = (3 / 4, 4 / 3)
# Of a large image so many pixels at a time are copied, or in the graph become floats.
PART_PIXELS = 2**21


def fastest_resizer() -> str:
    """The library that resizes here, by its package's name."""
    return "cykooz_resizer" if cykooz_resizer else "pillow"


class RandomCropsOfImage(NamedTuple):
    """One random crop for each of V views."""

    size: int
    areas: tuple[tuple[float, float], ...]
    resizer: str

    def __call__(self, image, draws):  # [H, W, 3], [V, 22]
        views = zip(draws.tolist(), self.areas, strict=True)
        boxes = [crop_box(own, *image.shape[:2], area) for own, area in views]
        return [resize_box(image, box, self.size, self.resizer) for box in boxes]


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


def resize_box(
    image: np.ndarray, box: tuple[int, int, int, int], size: int, resizer: str
) -> np.ndarray:
    """Cuts a box out of an image and resizes it: bilinear, antialiased.

    Args:
        image: uint8 [H, W, 3].
        box: top, left, height and width in pixels.
        size: side S of the result in pixels.
        resizer: the library, as `fastest_resizer` names it.

    Returns:
        uint8 [S, S, 3], read-only.
    """
    top, left, height, width = box
    pixels = image[top : top + height, left : left + width]
    resized = {"cykooz_resizer": _resized_by_cykooz, "pillow": _resized_by_pillow}[resizer]
    # Across first, as in `crops` (at once cykooz_resizer would go down first, and round otherwise);
    # in parts, as a copy of a large box would take as much memory as the image.
    rows = max(PART_PIXELS // width, 1)
    narrow = []
    for first in range(0, height, rows):
        part = pixels[first : first + rows]
        # Pixel by pixel: of a turned photograph, numpy would copy byte by byte.
        narrow.append(resized(part.view("V3").tobytes(), width, len(part), size, len(part)))
    whole = resized(b"".join(narrow), size, height, size, size)
    return np.frombuffer(whole, np.uint8).reshape(size, size, 3)


def _resized_by_cykooz(pixels, width, height, new_width, new_height):
    levels = cykooz_resizer.PixelType.U8x3
    source = cykooz_resizer.ImageData(width, height, levels, pixels)
    result = cykooz_resizer.ImageData(new_width, new_height, levels)
    bilinear = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.bilinear)
    cykooz_resizer.Resizer().resize(source, result, cykooz_resizer.ResizeOptions(bilinear))
    return result.get_buffer()


def _resized_by_pillow(pixels, width, height, new_width, new_height):
    image = Image.frombuffer("RGB", (width, height), pixels)
    return image.resize((new_width, new_height), Image.Resampling.BILINEAR).tobytes()
