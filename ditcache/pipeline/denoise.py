"""The denoising loop, written out. Bit for bit what diffusers' pipelines do, with the step in the
open.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ditcache.errors import ConfigError
from ditcache.models.base import Bundle
from ditcache.pipeline.callbacks import Callback, Step
from ditcache.pipeline.inputs import Inputs

WAY, ENDS = slice(None, -1), [0, -1]  # of ChronoEdit's latent frames with temporal reasoning


@torch.no_grad()
def denoise(
    bundle: Bundle,
    inputs: Inputs,
    *,
    steps: int,
    guidance: float,
    guidance_low: float | None = None,
    shift: float | None = None,
    start: int = 0,
    callbacks: Iterable[Callback] = (),
) -> Tensor:
    """Noise -> clean latents [B, C, T, H, W], by flow matching with classifier-free guidance.

    start: first step of the schedule, for latents that are noised that far. guidance > 1 needs
    `inputs.text.uncond`. guidance_low: for the low-noise expert (None: the
    same). shift: of the flow schedule (None: the checkpoint's).
    """
    original = bundle.pipe.scheduler
    scheduler = make_scheduler(original, shift)
    scheduler.set_timesteps(steps, device=bundle.device)
    scheduler.set_begin_index(start)
    bundle.pipe.scheduler = scheduler
    try:
        return run_steps(
            bundle, inputs, scheduler, start, guidance, guidance_low or guidance, tuple(callbacks)
        )
    finally:
        bundle.pipe.scheduler = original
        for transformer in bundle.experts.values():
            transformer._reset_stateful_cache()


def run_steps(
    bundle: Bundle,
    inputs: Inputs,
    scheduler: Any,
    start: int,
    guidance: float,
    guidance_low: float,
    callbacks: tuple[Callback, ...],
) -> Tensor:
    """The loop itself."""
    sigmas, timesteps = scheduler.sigmas[start:].tolist(), scheduler.timesteps[start:].tolist()
    boundary = (
        None if bundle.boundary is None else bundle.boundary * scheduler.config.num_train_timesteps
    )
    dtypes = {name: transformer.dtype for name, transformer in bundle.experts.items()}
    latents = inputs.hold(inputs.latents, sigmas[0])
    reasoning = getattr(bundle.model, "reasoning_steps", 0)
    for index, timestep in enumerate(scheduler.timesteps[start:]):
        # 0) ChronoEdit: the frames between the pictures before and after have done their part.
        if reasoning and index == reasoning:
            latents, inputs = drop_reasoning(latents, inputs, scheduler)

        # 1) Which expert works at this noise level, and how strongly it is guided.
        low = boundary is not None and timesteps[index] < boundary
        expert, strength = ("transformer_2", guidance_low) if low else ("transformer", guidance)
        transformer = bundle.experts[expert]

        # 2) Velocity of the cond branch, and of the uncond branch where there is guidance.
        model_input, when = inputs.at(latents, timestep)
        model_input = model_input.to(dtypes[expert])
        where = {"step_index": index, "sigma": sigmas[index], "num_inference_steps": len(timesteps)}
        velocity = run_branch(
            "cond", transformer, model_input, when, inputs.text.cond, inputs.image, where
        )
        if guidance > 1.0:
            assert inputs.text.uncond is not None
            uncond = run_branch(
                "uncond",
                transformer,
                model_input,
                when,
                inputs.text.uncond,
                inputs.image,
                where,
            )
            velocity = uncond + strength * (velocity - uncond)

        # 3) One step down the noise schedule.
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        latents = inputs.hold(latents, sigmas[index + 1])
        step = Step(
            index, len(timesteps), timesteps[index], sigmas[index], expert, latents, velocity
        )
        for callback in callbacks:
            callback(step)
        latents = step.latents
    return inputs.known(inputs.hold(latents, 0.0))


def drop_reasoning(latents: Tensor, inputs: Inputs, scheduler: Any) -> tuple[Tensor, Inputs]:
    """Keep the first and the last latent frame, also in what a multistep scheduler remembers."""
    frames = latents.shape[2]
    assert inputs.condition is not None
    for index, output in enumerate(scheduler.model_outputs):
        if output is not None and output.shape[2] == frames:
            scheduler.model_outputs[index] = output[:, :, ENDS]
    if scheduler.last_sample is not None:
        scheduler.last_sample = scheduler.last_sample[:, :, ENDS]
    return latents[:, :, ENDS], replace(inputs, condition=inputs.condition[:, :, ENDS])


def run_branch(
    branch: str,
    transformer: nn.Module,
    model_input: Tensor,
    timestep: Tensor,
    text: Tensor,
    image: Tensor | None,
    where: dict[str, Any],
) -> Tensor:
    """One forward inside the branch's cache context -> velocity [B, C, T, H, W]."""
    extra = {} if image is None else {"encoder_hidden_states_image": image}
    with transformer.cache_context(branch, **where):  # type: ignore[operator]
        return transformer(
            hidden_states=model_input,
            timestep=timestep,
            encoder_hidden_states=text,
            return_dict=False,
            **extra,
        )[0]


def make_scheduler(scheduler: Any, shift: float | None) -> Any:
    """A fresh scheduler of the same class and settings, with another flow shift if asked."""
    settings = {}
    if shift is not None:
        key = "flow_shift" if "flow_shift" in scheduler.config else "shift"
        if key not in scheduler.config:
            name = type(scheduler).__name__
            raise ConfigError(f"shift: {name} has no flow shift; set shift=null")
        if not scheduler.config.get("use_flow_sigmas", True):
            raise ConfigError("shift: this scheduler does not run on flow sigmas; set shift=null")
        settings[key] = shift
    return type(scheduler).from_config(scheduler.config, **settings)


def latent_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [1, C, 1, 1, 1] of the VAE's latents, where and as `like` is."""
    mean, spread = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(like)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, spread


@torch.no_grad()
def decode_latents(bundle: Bundle, latents: Tensor) -> Any:
    """Clean latents -> float frames [T, H, W, 3] in 0..1 (numpy), as diffusers' pipelines return
    them.
    """
    vae = bundle.pipe.vae
    latents = latents.to(bundle.device, vae.dtype)
    mean, spread = latent_statistics(vae, latents)
    latents = latents / (1.0 / spread) + mean
    if getattr(bundle.model, "reasoning_steps", 0) and latents.shape[2] > 2:  # never dropped
        way, edit = (vae.decode(latents[:, :, i], return_dict=False)[0] for i in (WAY, ENDS))
        video = torch.cat([way, edit[:, :, 1:]], dim=2)
    else:
        video = vae.decode(latents, return_dict=False)[0]
    return bundle.pipe.video_processor.postprocess_video(video, output_type="np")[0]
