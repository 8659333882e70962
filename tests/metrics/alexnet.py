"""AlexNet's features with random weights, as torchvision numbers them, and random linear heads."""

import torch
from torch import nn


def random_alexnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )


def backbone(net: nn.Sequential) -> dict[str, torch.Tensor]:
    return {f"features.{key}": value.detach() for key, value in net.state_dict().items()}


def random_heads() -> dict[str, torch.Tensor]:
    """Positive, as the published ones are."""
    torch.manual_seed(1)
    sizes = (64, 192, 384, 256, 256)
    return {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1) for i, n in enumerate(sizes)}
