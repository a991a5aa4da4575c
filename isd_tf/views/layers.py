"""The views' functions as KerasCV layers, for pipelines of its users.

Each draws seeds and calls one pure function. KerasCV 0.9's stock layers give other meanings to the
same numbers: its brightness adds, its crop does not antialias, its jitter has a fixed order.
"""

import keras_cv
import tensorflow as tf

from isd_tf.views import crops, photometric


class _SeededAugmentation(keras_cv.layers.VectorizedBaseImageAugmentationLayer):
    """A KerasCV layer that draws seeds and calls one of the pure functions.

    Args:
        value_range: values of black and white in the images given and returned.
        seed: of the generator that draws the seeds.
    """

    def __init__(self, value_range=(0, 255), seed=None, **kwargs):
        super().__init__(seed=seed, **{"dtype": "float32", **kwargs})
        self.value_range = value_range
        self.seed = seed

    def augment(self, images, seeds):
        """The function of this layer: images [B, H, W, 3] in [0, 1], seeds [B, 2]."""
        raise NotImplementedError

    def get_random_transformation_batch(self, batch_size, **kwargs):
        return self._random_generator.uniform([batch_size, 2], maxval=2**62, dtype=tf.int64)

    def augment_images(self, images, transformations, **kwargs):
        black, white = self.value_range
        return (
            self.augment((images - black) / (white - black), transformations) * (white - black)
            + black
        )

    def augment_ragged_image(self, image, transformation, **kwargs):
        return self.augment_images(image[tf.newaxis], transformation[tf.newaxis])[0]

    def augment_labels(self, labels, transformations, **kwargs):
        return labels

    def get_config(self):
        return {**super().get_config(), "value_range": self.value_range, "seed": self.seed}


class RandomResizedCrop(_SeededAugmentation):
    """`random_resized_crop` as a KerasCV layer; `size` in pixels."""

    def __init__(self, size, area=(0.2, 1.0), aspect=(3 / 4, 4 / 3), **kwargs):
        super().__init__(**kwargs)
        self.size, self.area, self.aspect = size, area, aspect
        self.force_output_dense_images = True

    def augment(self, images, seeds):
        cut = crops.random_resized_crop(images, seeds, self.size, self.area, self.aspect)
        return photometric.to_unit_range(cut)

    def get_config(self):
        mine = {"size": self.size, "area": self.area, "aspect": self.aspect}
        return {**super().get_config(), **mine}


class ColorJitterAndGrayscale(_SeededAugmentation):
    """`color_jitter_and_grayscale` as a KerasCV layer."""

    def __init__(
        self, jitter_rate=0.8, grayscale_rate=0.2, strengths=(0.4, 0.4, 0.4, 0.1), **kwargs
    ):
        super().__init__(**kwargs)
        self.jitter_rate, self.grayscale_rate = jitter_rate, grayscale_rate
        self.strengths = strengths

    def augment(self, images, seeds):
        return photometric.color_jitter_and_grayscale(
            images, seeds, self.jitter_rate, self.grayscale_rate, self.strengths
        )

    def get_config(self):
        rates = {"jitter_rate": self.jitter_rate, "grayscale_rate": self.grayscale_rate}
        return {**super().get_config(), **rates, "strengths": self.strengths}


class RandomGaussianBlur(_SeededAugmentation):
    """`random_gaussian_blur` as a KerasCV layer."""

    def __init__(self, rate=0.5, sigma=(0.1, 2.0), **kwargs):
        super().__init__(**kwargs)
        self.rate, self.sigma = rate, sigma

    def augment(self, images, seeds):
        return photometric.random_gaussian_blur(images, seeds, self.rate, self.sigma)

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "sigma": self.sigma}


class RandomHorizontalFlip(_SeededAugmentation):
    """`random_horizontal_flip` as a KerasCV layer."""

    def __init__(self, rate=0.5, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate

    def augment(self, images, seeds):
        return photometric.random_horizontal_flip(images, seeds, self.rate)

    def get_config(self):
        return {**super().get_config(), "rate": self.rate}
