"""Counts the blocks that really run, the same way for every method.

A torch hook sits on one linear layer inside each third of a block (self-attention, cross-attention,
feed-forward), where no cache of anybody puts its own: a skipped third does not reach its layer. A
block counts by its thirds' shares of the arithmetic, so that a method that skips thirds is counted
fairly too.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

LAYERS = {"attn1": "to_q", "attn2": "to_q", "ffn": "net.0.proj"}


class BlockCounter:
    """blocks: blocks run since `reset`. full: transformer calls in which all of them ran. calls:
    all transformer calls.
    """

    def __init__(self, experts: list[nn.Module], shares: list[float]):
        self.num_blocks, self.shares = len(experts[0].blocks), shares
        self.ran = [0] * len(LAYERS)
        self.handles = []
        for transformer in experts:
            self.handles += [
                transformer.register_forward_pre_hook(self.begin),
                transformer.register_forward_hook(self.end, always_call=True),
            ]
            for block in transformer.blocks:
                for part, (name, layer) in enumerate(LAYERS.items()):
                    module = block.get_submodule(f"{name}.{layer}")
                    self.handles.append(module.register_forward_pre_hook(self.tick(part)))
        self.reset()

    def reset(self) -> None:
        self.blocks, self.full, self.calls = 0.0, 0, 0

    def tick(self, part: int) -> Any:
        def count(module: nn.Module, args: tuple) -> None:
            self.ran[part] += 1

        return count

    def begin(self, module: nn.Module, args: tuple) -> None:
        self.ran = [0] * len(LAYERS)

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.calls += 1
        self.full += min(self.ran) == self.num_blocks
        self.blocks += round(sum(s * n for s, n in zip(self.shares, self.ran, strict=True)), 6)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def shares_of_parts(transformer: nn.Module, run_once: Any) -> list[float]:
    """Each third's share of a block's arithmetic, from counting one run."""
    with FlopCounterMode(display=False) as counted:
        run_once()
    root = f"{type(transformer).__name__}.blocks.0"
    parts = [sum(counted.flop_counts[f"{root}.{name}"].values()) for name in LAYERS]
    return [part / sum(parts) for part in parts]
