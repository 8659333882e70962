"""What a unit's blocks take and return, as one tensor.

Some blocks carry two streams, picture tokens and text tokens. Both are what the block changes, so
both have to be forecast: they are joined along the tokens, [B, N + M, D], and split again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ditcache.errors import DitcacheError
from ditcache.models.base import Blocks


class Work:
    """One call of a unit: its blocks, what they were called with, and the streams joined.

    joined [B, N, D], or [B, N + M, D] with the text's M tokens behind the others. hidden [B, N, D].
    """

    __slots__ = ("args", "blocks", "drops_text", "joined", "kwargs", "layout", "plain", "tokens")

    def __init__(self, blocks: list[nn.Module], layout: Blocks, args: tuple, kwargs: dict):
        self.blocks, self.layout, self.args, self.kwargs = blocks, layout, args, kwargs
        self.plain: int | None = None  # length of the tuple that a block returns around one stream
        self.drops_text = False  # SD3's last block returns None for it
        self.joined: Tensor = args[0] if args else kwargs["hidden_states"]
        self.tokens: int | None = None
        if len(layout.returns) > 1:
            text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
            self.tokens = self.joined.shape[1]
            self.joined = joined(self.joined, text)

    @property
    def hidden(self) -> Tensor:
        return self.joined if self.tokens is None else self.joined[:, : self.tokens]

    def named(self, names: list[str]) -> dict[str, Any]:
        """The blocks' arguments by name."""
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}

    def run(self) -> Tensor:
        """All blocks one after the other -> the streams, joined."""
        if self.tokens is None:
            return self.run_one_stream()
        hidden, text = self.joined[:, : self.tokens], self.joined[:, self.tokens :]
        for block in self.blocks:
            out = self.call(block, hidden, text)
            if not isinstance(out, tuple) or len(out) != len(self.layout.returns):
                raise unexpected(block, out, self.layout)
            by_name = dict(zip(self.layout.returns, out, strict=True))
            self.drops_text = by_name["text"] is None
            hidden, text = by_name["hidden"], text if self.drops_text else by_name["text"]
        return joined(hidden, text)

    def run_one_stream(self) -> Tensor:
        hidden, rest, kwargs = self.joined, self.args[1:], self.kwargs
        for block in self.blocks:
            if self.args:
                out = block(hidden, *rest, **kwargs)
            else:
                out = block(**{**kwargs, "hidden_states": hidden})
            if not isinstance(out, Tensor):
                if not isinstance(out, tuple) or any(rest is not None for rest in out[1:]):
                    raise unexpected(block, out, self.layout)
                self.plain, out = len(out), out[0]
            if not isinstance(out, Tensor) or out.shape != hidden.shape:
                raise unexpected(block, out, self.layout)
            hidden = out
        return hidden

    def call(self, block: nn.Module, hidden: Tensor, text: Tensor) -> Any:
        """The block as the transformer called it, with other streams."""
        args, kwargs = self.args, self.kwargs
        if len(args) > 1:
            return block(hidden, text, *args[2:], **kwargs)
        if args:
            return block(hidden, **{**kwargs, "encoder_hidden_states": text})
        return block(**{**kwargs, "hidden_states": hidden, "encoder_hidden_states": text})

    def returned(self, out: Tensor) -> Any:
        """Joined streams -> what the last block would return."""
        if self.tokens is None:
            return out if self.plain is None else (out, *[None] * (self.plain - 1))
        text = None if self.drops_text else out[:, self.tokens :]
        parts = {"hidden": out[:, : self.tokens], "text": text}
        return tuple(parts[name] for name in self.layout.returns)


def joined(hidden: Tensor, text: Tensor) -> Tensor:
    if hidden.dtype != text.dtype or hidden.shape[::2] != text.shape[::2]:
        raise DitcacheError(
            f"step cache: cannot keep both streams, {describe(hidden)} and {describe(text)}; "
            "they differ in more than their number of tokens"
        )
    return torch.cat([hidden, text], dim=1)


def unexpected(block: nn.Module, out: Any, layout: Blocks) -> DitcacheError:
    wanted = "one tensor like its input" if len(layout.returns) == 1 else ", ".join(layout.returns)
    return DitcacheError(
        f"step cache: {type(block).__name__} in {layout.path} returns {describe(out)}, not "
        f"{wanted}; docs/models.md says how to describe such a model"
    )


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(describe, value))})"
    return type(value).__name__
