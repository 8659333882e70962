"""Muon for matrices, AdamW for the rest, and a cosine or trapezoid learning rate. Shared by all zoo
stages.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn


class MatrixAdam:
    """Two torch optimisers behind one step: Muon on every weight of two or more dimensions, AdamW
    on the others.

    Convolution weights enter Muon as [out, in * kernel] views that share storage with the
    parameter.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        muon_lr: float,
        adam_lr: float,
        weight_decay: float,
    ):
        self.matrices: list[tuple[nn.Parameter, nn.Parameter]] = []
        vectors = []
        for name, parameter in named:
            if parameter.ndim >= 2 and "scale_shift_table" not in name and "shared" not in name:
                view = nn.Parameter(parameter.data.view(parameter.shape[0], -1))
                self.matrices.append((parameter, view))
            else:
                vectors.append(parameter)
        self.muon = torch.optim.Muon(
            [view for _, view in self.matrices],
            lr=muon_lr,
            weight_decay=weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adam = torch.optim.AdamW(vectors, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.base = {"muon": muon_lr, "adam": adam_lr}

    def step(self, scale: float) -> None:
        """One update with both learning rates multiplied by `scale`; clears the gradients."""
        for name, optimiser in (("muon", self.muon), ("adam", self.adam)):
            for group in optimiser.param_groups:
                group["lr"] = self.base[name] * scale
        for parameter, view in self.matrices:
            view.grad = None if parameter.grad is None else parameter.grad.view_as(view)
        self.muon.step()
        self.adam.step()
        self.adam.zero_grad()
        for parameter, view in self.matrices:
            parameter.grad = view.grad = None

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def cosine(progress: float, *, warmup: float = 0.01) -> float:
    """Linear warm-up, then half a cosine down to 0; `progress` in 0..1."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def trapezoid(
    progress: float, *, warmup: float = 0.016, flat_until: float = 0.45, floor: float = 0.02
) -> float:
    """Linear warm-up, constant to `flat_until`, then linear down to `floor`."""
    if progress < warmup:
        return progress / warmup
    return max(floor, min(1.0, 1 - (1 - floor) * (progress - flat_until) / (1 - flat_until)))
