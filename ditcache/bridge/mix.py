"""What a bridge has to beat, in whole runs of a pipeline: mixes of both models' outputs or weights,
and a LoRA, in place of fused keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from ditcache.bridge.capture import told_apart
from ditcache.bridge.run import Source
from ditcache.bridge.students import Batch, Student

HOOK = "ditcache_mix"


class Mix:
    """One target with one student during one generation. forwards: of the source so far; own: of
    the target itself.
    """

    def __init__(self, target: nn.Module, student: Student, source: Source):
        self.target, self.student, self.source = target, student.eval(), source
        self.forwards, self.own = 0, 0

    @contextmanager
    def attached(self, texts: Mapping[str, Tensor]) -> Iterator[Mix]:
        """Within, the target's forwards are the student's. texts: what the target reads in each
        branch. Puts the target back as it was, also after an exception.
        """
        if not self.student.mixes_outputs:
            counter = self.target.register_forward_hook(self.count)
            try:
                with self.student.attached(None, self.target):
                    yield self
            finally:
                counter.remove()
            return
        registry = HookRegistry.check_if_exists_or_initialize(self.target)
        registry.register_hook(MixHook(self, texts), HOOK)
        try:
            yield self
        finally:
            registry.remove_hook(HOOK, recurse=False)

    def count(self, module: nn.Module, args: Any, output: Any) -> None:
        self.own += 1


class MixHook(ModelHook):
    """Runs only the models whose outputs the student mixes at this noise level."""

    def __init__(self, mix: Mix, texts: Mapping[str, Tensor]):
        super().__init__()
        self.mix, self.texts = mix, texts

    @torch.no_grad()
    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        mix = self.mix
        branch, seen = told_apart(self.texts, args, kwargs)
        seen.image, velocities = kwargs.get("encoder_hidden_states_image"), {}
        for role in mix.student.asks(float(seen.timestep[0]) / 1000):
            if role == "source":
                mix.forwards += 1
                theirs = mix.source.reads(seen, branch)
                velocities[role] = theirs.call(mix.source.transformer).to(seen.latents)
            else:
                mix.own += 1
                velocities[role] = self.fn_ref.original_forward(*args, **kwargs)[0]
        some = next(iter(velocities.values()))  # a switch reads only one, whichever name it has
        alone, other = velocities.get("target", some), velocities.get("source", some)
        return (mix.student(Batch(seen, some, alone, source_velocity=other), module),)
