"""Forwards of a transformer without the pipeline around it: the latents do not depend on what comes
out, so that outputs of different settings can be compared step by step.
"""

import torch

import ditcache

TOKENS = 80  # of latents [1, 16, 5, 8, 8] in patches of (1, 2, 2)


def moving_latents(step, steps=6, batch=1, seed=0):
    """[B, 16, 5, 8, 8] at a step of a straight way from noise to something smooth."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 16, 5, 8, 8, generator=generator)
    goal = torch.randn(batch, 16, 1, 1, 1, generator=generator).expand_as(noise)
    return noise.lerp(goal, step / steps)


def by_hand(
    pipe,
    steps=6,
    *,
    branches=("cond", "uncond"),
    which=None,
    latents=moving_latents,
    before=None,
    **forward,
):
    """Branch -> outputs of a run of `steps` steps, of which `which` are visited.

    latents: step -> what goes in. before(step, branch): called ahead of every forward. forward: more
    arguments of the transformer.
    """
    pipe.scheduler.set_timesteps(steps)
    sigmas, transformer = pipe.scheduler.sigmas.tolist(), pipe.transformer
    transformer._reset_stateful_cache()
    states = torch.randn(
        1, 8, transformer.config.text_dim, generator=torch.Generator().manual_seed(1)
    )
    outputs = {branch: [] for branch in branches}
    with torch.no_grad():
        for step in range(steps) if which is None else which:
            moved = latents(step)
            for branch in branches:
                if before is not None:
                    before(step, branch)
                with transformer.cache_context(
                    branch,
                    step_index=step,
                    sigma=sigmas[step],
                    num_inference_steps=steps,
                ):
                    out = transformer(
                        hidden_states=moved,
                        timestep=pipe.scheduler.timesteps[step].expand(len(moved)),
                        encoder_hidden_states=(states * (branch == "cond")).expand(
                            len(moved), -1, -1
                        ),
                        **{"return_dict": False, **forward},
                    )
                outputs[branch].append(out if forward.get("return_dict") else out[0])
    return outputs


def decisions(cache, branch="cond", unit=0):
    """Per step: `1` computed, `0` skipped."""
    return "".join(
        str(int(d.computed)) for d in cache.trace.decisions if (d.branch, d.unit) == (branch, unit)
    )


class cached:
    """A cache on `pipe` for the length of a `with`."""

    def __init__(self, pipe, *args, **knobs):
        self.pipe, self.args, self.knobs = pipe, args, knobs

    def __enter__(self):
        return ditcache.enable_cache(self.pipe, *self.args, **self.knobs)

    def __exit__(self, *error):
        ditcache.disable_cache(self.pipe)
