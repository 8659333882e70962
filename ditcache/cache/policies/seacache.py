"""SeaCache: the change of the latents, seen through the filter a denoiser applies at this noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ditcache.cache.policies.base import Context, Policy
from ditcache.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class SeaCache(Policy):
    """Add up the relative change of spectrally filtered latents; compute when the sum reaches
    `threshold` (SeaCache; as in diffusers, on the latents).

    The filter is the gain of an optimal linear denoiser for a signal with power 1 / f^beta at the
    step's noise level, so that noise does not count as change. Decided on cond; uncond follows.

    threshold: 0 skips nothing. beta: fall-off of the signal's power; 3 for video, 2 for images.
    """

    branches_agree: ClassVar[bool] = True

    threshold: float = 0.25
    beta: float = 3.0

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold: must be >= 0, got {self.threshold}")
        if not self.beta > 0:
            raise ValueError(f"beta: must be > 0, got {self.beta}")

    def should_compute(self, ctx: Context) -> bool:
        from ditcache.cache.signal import change, largest

        before = ctx.state.get("before")
        if before is None:
            return True
        now = self.indicator(ctx)
        total = ctx.state.values.get("total", 0.0) + change(now, before)
        ctx.state.values["total"], ctx.state.values["now"] = total, now
        ctx.signal = largest(total)
        return not ctx.signal < self.threshold  # NaN computes

    def record(self, ctx: Context, computed: bool) -> None:
        if computed:
            ctx.state.values["total"] = 0.0
        if ctx.branch != "uncond":
            now = ctx.state.values.pop("now", None)  # of this step, if it was asked
            ctx.state.put("before", self.indicator(ctx) if now is None else now)

    def indicator(self, ctx: Context) -> Tensor:
        """The filtered latents of this step."""
        if ctx.sigma is None or ctx.latents is None:
            raise ConfigError("cache.policy: SeaCache needs the pipeline's sigmas and latents")
        if ctx.latents.dim() < 4:
            raise ConfigError(
                "cache.policy: SeaCache filters latents over space and time, and this model packs "
                f"them as {list(ctx.latents.shape)}; use another policy"
            )
        return filtered(ctx.latents, ctx.sigma, self.beta)


def filtered(latents: Tensor, sigma: float, beta: float) -> Tensor:
    """[B, C, T, H, W] or [B, C, H, W] -> the same in fp32, each frequency scaled by a denoiser's
    gain.
    """
    import torch

    noise = min(max(sigma, 1e-6), 1 - 1e-6)
    signal = 1 - noise
    axes, gain = tuple(range(2, latents.dim())), torch.ones((), device=latents.device)
    for axis in axes:
        frequency = torch.fft.fftfreq(latents.shape[axis], device=latents.device).abs()
        power = 1 / (frequency**beta + 1e-16)
        along = signal * power / (signal**2 * power + noise**2 + 1e-16)
        gain = gain * along.view([-1 if a == axis else 1 for a in axes])
    spectrum = torch.fft.fftn(latents.float(), dim=axes)
    return torch.fft.ifftn(spectrum * (gain / gain.mean()), dim=axes).real
