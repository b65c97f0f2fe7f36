"""Parameter lists: of real networks, built as the networks are, and of one size."""

from __future__ import annotations

Shape = tuple[int, ...]


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _conv(inputs: int, outputs: int, kernel: int) -> list[Shape]:
    return [(outputs, inputs, kernel, kernel), (outputs,)]


def _conv_norm(inputs: int, outputs: int, kernel: int = 1) -> list[Shape]:
    return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]


def _lstm(inputs: int, hidden: int) -> list[Shape]:
    return [(4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]


def resnet50() -> list[Shape]:
    """He et al. 2015."""
    shapes, inputs = _conv_norm(3, 64, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _conv_norm(inputs, width) + _conv_norm(width, width, 3)
            shapes += _conv_norm(width, 4 * width)
            if block == 0:
                shapes += _conv_norm(inputs, 4 * width)
            inputs = 4 * width
    return shapes + _linear(2048, 1000)


def mobilenet_v3_large() -> list[Shape]:
    """Howard et al. 2019."""
    shapes, inputs = _conv_norm(3, 16, 3), 16
    blocks = (
        (3, 16, 16, 0), (3, 64, 24, 0), (3, 72, 24, 0),
        (5, 72, 40, 24), (5, 120, 40, 32), (5, 120, 40, 32),
        (3, 240, 80, 0), (3, 200, 80, 0), (3, 184, 80, 0), (3, 184, 80, 0),
        (3, 480, 112, 120), (3, 672, 112, 168),
        (5, 672, 160, 168), (5, 960, 160, 240), (5, 960, 160, 240),
    )  # fmt: skip
    for kernel, wide, outputs, squeezed in blocks:
        shapes += _conv_norm(inputs, wide) if wide != inputs else []
        shapes += _conv_norm(1, wide, kernel)  # depthwise
        if squeezed:
            shapes += _conv(wide, squeezed, 1) + _conv(squeezed, wide, 1)
        shapes += _conv_norm(wide, outputs)
        inputs = outputs
    return shapes + _conv_norm(160, 960) + _linear(960, 1280) + _linear(1280, 1000)


def gpt2() -> list[Shape]:
    """Radford et al. 2019, the smallest; the output layer is the embedding."""
    width = 768
    norm: list[Shape] = [(width,), (width,)]
    block = norm + _linear(width, 3 * width) + _linear(width, width)
    block += norm + _linear(width, 4 * width) + _linear(4 * width, width)
    return [(50257, width), (1024, width), *(block * 12), *norm]


def lstm() -> list[Shape]:
    """Zaremba et al. 2014, the medium one, on Penn Treebank."""
    return [(10_000, 650), *_lstm(650, 650), *_lstm(650, 650), *_linear(650, 10_000)]


def dqn() -> list[Shape]:
    """Mnih et al. 2015, all 18 actions."""
    convolutions = _conv(4, 32, 8) + _conv(32, 64, 4) + _conv(64, 64, 3)
    return convolutions + _linear(64 * 7 * 7, 512) + _linear(512, 18)


WORKLOADS: dict[str, list[Shape]] = {
    "1 x 8M": [(2**23,)],
    "1 x 64M": [(2**26,)],
    "1 x 256M": [(2**28,)],
    "1000 x 64": [(64,)] * 1000,
    "10000 x 16": [(16,)] * 10_000,
    "ResNet-50": resnet50(),
    "MobileNetV3-Large": mobilenet_v3_large(),
    "GPT-2 124M": gpt2(),
    "LSTM": lstm(),
    "DQN": dqn(),
}
