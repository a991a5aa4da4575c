"""The networks of isd_tf in PyTorch: what its training step is compared with, in speed and value.

ResNets in torchvision's layout and with its names, ISD's and ISD+'s heads. Written in plain
torch.nn, so that tests/torch_parity_test.py needs no torchvision, and apart from isd_tf's code.
"""

import collections

import torch
from torch import nn

# name: (bottleneck blocks?, blocks of each stage, width of the first stage, stride of the 3x3 stem
# that small images have)
ARCHITECTURES = {
    "resnet18": (False, (2, 2, 2, 2), 64, 1),
    "resnet50": (True, (3, 4, 6, 3), 64, 1),
    "tiny_resnet": (False, (1, 1, 1), 32, 2),
}


class Block(nn.Module):
    """A basic block, or a bottleneck that strides its 3x3 convolution."""

    def __init__(self, inputs, width, stride, bottleneck):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        channels = (inputs, width, width, outputs) if bottleneck else (inputs, width, outputs)
        self.depth = len(kernels)
        for i in range(self.depth):
            conv = convolution(channels[i], channels[i + 1], kernels[i], strides[i])
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"bn{i + 1}", nn.BatchNorm2d(channels[i + 1]))
        self.downsample = None
        if stride > 1 or inputs != outputs:
            conv = convolution(inputs, outputs, 1, stride)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.depth:
                y = torch.relu_(y)
        return torch.relu_(y + (x if self.downsample is None else self.downsample(x)))


def convolution(inputs, outputs, kernel, stride):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def encoder(name, image_size):
    """Images [B, 3, S, S] to features [B, C]; up to 64 pixels the stem is one 3x3 convolution."""
    bottleneck, stages, width, small_stride = ARCHITECTURES[name]
    small = image_size <= 64
    layers = collections.OrderedDict()
    layers["conv1"] = convolution(3, width, *((3, small_stride) if small else (7, 2)))
    layers["bn1"] = nn.BatchNorm2d(width)
    layers["relu"] = nn.ReLU(inplace=True)
    if not small:
        layers["maxpool"] = nn.MaxPool2d(3, 2, 1)
    channels = width
    for stage, blocks in enumerate(stages):
        parts = []
        for i in range(blocks):
            stride = 2 if stage > 0 and i == 0 else 1
            parts.append(Block(channels, width * 2**stage, stride, bottleneck))
            channels = width * 2**stage * (4 if bottleneck else 1)
        layers[f"layer{stage + 1}"] = nn.Sequential(*parts)
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    return nn.Sequential(layers)


def perceptron(inputs, hidden, outputs, first_bias):
    layers = collections.OrderedDict()
    layers["linear1"] = nn.Linear(inputs, hidden, bias=first_bias)
    layers["bn"] = nn.BatchNorm1d(hidden)
    layers["relu"] = nn.ReLU(inplace=True)
    layers["linear2"] = nn.Linear(hidden, outputs)
    return nn.Sequential(layers)


def heads(name, features):
    """Returns the projector and the predictor of "isd" (no projector) or "isd_plus"."""
    if name == "isd":
        return nn.Identity(), perceptron(features, features, features, False)
    hidden, embedding = 2 * features, features // 4
    projector = perceptron(features, hidden, embedding, True)
    return projector, perceptron(embedding, hidden, embedding, True)
