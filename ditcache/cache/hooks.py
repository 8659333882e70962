"""The hooks through which a transformer tells its step cache where it is.

A stateful diffusers hook learns step and branch from `cache_context`; torch's own forward hooks on
the transformer mark the beginning and end of each forward. `transformer.forward` itself is left
alone, because offload hooks of accelerate and diffusers wrap and restore it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import nn

from ditcache.cache.driver import Driver
from ditcache.cache.run import Call, Run
from ditcache.cache.where import Finder
from ditcache.errors import DitcacheError

if TYPE_CHECKING:
    from ditcache.cache.attach import StepCache

COMPILE = (
    "step cache: decisions do not belong into a compiled transformer; compile its blocks, with "
    "transformer.compile_repeated_blocks(fullgraph=True)"
)
# Arguments that make some blocks behave unlike the others, which units cannot follow.
PER_BLOCK = (
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
    "skip_layers",
)


class ContextHook(ModelHook):
    """Receives diffusers' cache context, and word that a run has ended. Sits on the block list."""

    _is_stateful = True

    def __init__(self, run: Run, finder: Finder):
        super().__init__()
        self.run, self.finder, self.contexts = run, finder, StateManager(BaseState)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """diffusers pipelines call this at the end of a run."""
        self.run.end()
        self.finder.forget()
        return module


class ForwardHooks:
    """Torch hooks that tell the driver when the expert's forward begins and ends."""

    def __init__(self, cache: StepCache, driver: Driver, context: ContextHook, names: list[str]):
        self.cache, self.driver, self.context, self.names = cache, driver, context, names
        self.refused = [name for name in PER_BLOCK if name in names]

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module._compiled_call_impl is not None:
            raise DitcacheError(COMPILE)
        if torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False):
            raise DitcacheError("step cache: gradient checkpointing would recompute skipped blocks")
        try:
            context = self.context.contexts.context
        except ValueError:  # none is set
            context = None
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs} if args else kwargs
        for name in self.refused:
            if inputs.get(name) is not None:
                raise DitcacheError(f"step cache: does not work with {name}; call disable_cache")
        where = self.cache.finder.find(context, inputs)
        if where.begins:
            self.cache.run.end()
        latents = inputs.get("hidden_states")
        channels = getattr(getattr(module, "config", None), "out_channels", None)
        if latents is not None and channels is not None and latents.dim() > 3:
            latents = latents[:, :channels]  # the noisy ones; conditioning stands behind them
        call = Call(
            where.branch,
            where.step,
            where.num_steps,
            where.sigma,
            inputs.get("timestep"),
            latents,
        )
        self.driver.begin_call(call, self.cache.schedule_of)

    def end(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Returns another output where the driver puts one in place of the transformer's."""
        sample = output if output is None or isinstance(output, torch.Tensor) else output[0]
        instead = self.driver.end_call(sample)
        if instead is None:
            return None
        if isinstance(output, tuple):
            return (instead, *output[1:])
        return instead if isinstance(output, torch.Tensor) else type(output)(sample=instead)
