import numpy as np
import pytest
from scipy import signal

import isd_tf
from isd_tf.networks import heads


@pytest.mark.parametrize(
    ("name", "trainable", "features"),
    # torchvision's published parameter counts, less the classifier's.
    [
        ("resnet18", 11_689_512 - 513_000, 512),
        ("resnet34", 21_797_672 - 513_000, 512),
        ("resnet50", 25_557_032 - 2_049_000, 2048),
    ],
)
def test_resnets_have_torchvisions_layout(name, trainable, features):
    encoder = isd_tf.build_encoder(name, 224)
    assert sum(int(np.prod(w.shape)) for w in encoder.trainable_weights) == trainable
    assert encoder.output_shape == (None, features)
    assert encoder.get_layer("layer4_0_relu").output.shape[1:3] == (7, 7)


def test_bottleneck_strides_its_3x3_convolution():
    encoder = isd_tf.build_encoder("resnet50", 224)
    assert encoder.get_layer("layer2_0_conv1").strides == (1, 1)
    assert encoder.get_layer("layer2_0_conv2").strides == (2, 2)


def test_strided_convolution_pads_symmetrically():
    encoder = isd_tf.build_encoder("resnet18", 224)
    image = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)
    pad, convolution = encoder.get_layer("conv1_pad"), encoder.get_layer("conv1")
    ours = convolution(pad(image)).numpy()[0, :, :, 5]

    kernel = convolution.kernel.numpy()[..., 5]
    padded = np.pad(image[0], [(3, 3), (3, 3), (0, 0)])
    full = sum(signal.correlate2d(padded[..., c], kernel[..., c], "valid") for c in range(3))
    np.testing.assert_allclose(ours, full[::2, ::2], atol=1e-4)


def test_convolution_of_stride_1_pads_symmetrically_without_a_layer():
    encoder = isd_tf.build_encoder("resnet18", 32, width=8)
    assert not any("layer1" in layer.name and "pad" in layer.name for layer in encoder.layers)
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    convolution = encoder.get_layer("conv1")
    kernel = convolution.kernel.numpy()[..., 5]
    expected = sum(signal.correlate2d(image[0, ..., c], kernel[..., c], "same") for c in range(3))
    np.testing.assert_allclose(convolution(image)[0, ..., 5], expected, atol=1e-5)


def test_small_images_keep_their_resolution_in_the_stem():
    encoder = isd_tf.build_encoder("resnet18", 32)
    assert encoder.get_layer("layer1_0_relu").output.shape[1:3] == (32, 32)
    assert encoder.get_layer("conv1").kernel_size == (3, 3)
    assert "maxpool" not in [layer.name for layer in encoder.layers]
    larger = isd_tf.build_encoder("resnet18", 96)
    assert larger.get_layer("layer1_0_relu").output.shape[1:3] == (24, 24)


def test_width_scales_every_stage():
    assert isd_tf.build_encoder("resnet18", 32, width=8).output_shape == (None, 64)
    assert isd_tf.build_encoder("resnet50", 32, width=8).output_shape == (None, 256)


def test_initial_values_are_torchvisions():
    encoder = isd_tf.build_encoder("resnet18", 224)
    kernel = encoder.get_layer("layer4_1_conv2").kernel.numpy()
    assert kernel.std() == pytest.approx(np.sqrt(2 / (3 * 3 * 512)), rel=0.01)
    assert not any(layer.name.endswith("bias") for layer in encoder.weights)
    norm = encoder.get_layer("bn1")
    assert (norm.momentum, norm.epsilon) == (0.9, 1e-5)


def test_heads_have_the_papers_sizes():
    projector, predictor = heads.isd_heads(512)
    assert projector is None
    shapes = [tuple(w.shape) for w in predictor.trainable_weights]
    # Linear without bias, BatchNorm's gamma and beta, Linear with bias.
    assert shapes == [(512, 512), (512,), (512,), (512, 512), (512,)]

    projector, predictor = heads.isd_plus_heads(2048)
    assert [w.shape[0] for w in projector.trainable_weights] == [2048, 4096, 4096, 4096, 4096, 512]
    assert predictor.input_shape == predictor.output_shape == (None, 512)
    assert predictor.get_layer("linear1").kernel.shape == (512, 4096)


def test_heads_start_as_pytorchs_linear_layers():
    _, predictor = heads.isd_plus_heads(1024)
    layer = predictor.get_layer("linear1")
    limit = 1 / np.sqrt(256)
    for values in (layer.kernel.numpy(), layer.bias.numpy()):
        assert np.abs(values).max() <= limit
        assert values.std() == pytest.approx(limit / np.sqrt(3), rel=0.1)


def test_unknown_encoder_lists_the_known_ones():
    with pytest.raises(ValueError, match="resnet18, resnet34, resnet50, tiny.*'vit'"):
        isd_tf.build_encoder("vit", 224)
    with pytest.raises(ValueError, match="image_size=4"):
        isd_tf.build_encoder("resnet18", 4)
    with pytest.raises(ValueError, match="30 features"):
        heads.isd_plus_heads(30)
