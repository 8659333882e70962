"""`ditcache generate`: prompts -> videos, with what the cache cost and gained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ditcache.cache.settings import CacheSettings
from ditcache.config import build
from ditcache.errors import ConfigError
from ditcache.models.base import Bundle, Model
from ditcache.prompts import Prompts, choose_prompts
from ditcache.store.base import Store


@dataclass
class GenerateSettings:
    """The keys of conf/generate.yaml, checked before torch is imported or a checkpoint touched."""

    model: Model
    cache: CacheSettings
    store: Store
    prompts: Prompts
    steps: int
    guidance: float
    height: int
    width: int
    num_frames: int
    prompt: Any = None
    prompt_file: str | None = None
    negative_prompt: str = ""
    image: str | None = None
    seed: int = 0
    guidance_low: float | None = None
    shift: float | None = None
    compare: bool = False
    save_latents: bool = False
    fps: int = 16
    upscale: int = 1
    texts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("fps", 1), ("upscale", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: must be >= {low}, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise ValueError(f"seed: must be < 2**63, got {self.seed}")
        for name in ("guidance", "guidance_low", "shift"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1000:
                raise ValueError(f"{name}: must be > 0, got {value}")
        self.model.check_size(self.height, self.width, self.num_frames)
        self.texts = choose_prompts(self.prompt, self.prompt_file, self.prompts)
        if self.model.needs_image and self.image is None:
            raise ValueError("image: this model starts from a picture; set image=<file>")
        if not self.model.needs_image and self.image is not None:
            raise ValueError("image: this model does not take a picture; set image=null")
        self.cache.check_effect()
        if self.compare and self.cache.policy is None:
            raise ValueError("compare: needs a cache to compare; set cache=<policy>")
        if self.guidance <= 1 and self.negative_prompt != self.model.negative_prompt:
            raise ValueError("negative_prompt: has no effect without guidance; set guidance > 1")
        if self.guidance <= 1 and self.guidance_low != self.model.guidance_low:
            raise ValueError("guidance_low: has no effect without guidance; set guidance > 1")


def run(cfg: DictConfig) -> float | None:
    """One job. Returns the denoising speed-up over the baseline if one was rendered."""
    # 1) Check everything that can be checked without weights.
    settings = build(cfg, "", GenerateSettings)
    settings.model.check_folder()

    # 2) Load, see that the cache fits the model, then open the run folder.
    from ditcache.report.progress import progress

    total = len(settings.texts) * settings.steps * (2 if settings.compare else 1)
    with progress(total) as show:
        from ditcache.cache.attach import check_fit
        from ditcache.models.load import load_once
        from ditcache.pipeline.render import Renderer
        from ditcache.report.record import write_video
        from ditcache.report.run_folder import chosen_options, open_run_folder
        from ditcache.report.summary import print_summary, write_summary

        bundle = load_once(settings.model)
        check_bundle(bundle, settings)
        check_fit(bundle, settings.cache)
        renderer, names = Renderer(bundle, settings, show), chosen_options()
        folder = open_run_folder(OmegaConf.to_yaml(cfg, resolve=True))

        # 3) Render every prompt, beside its baseline if asked, in alternating order so that drift
        # cancels out; write its files at once.
        if settings.compare:
            renderer.warm_up()
        records = []
        for index, text in enumerate(settings.texts):
            baseline = None
            if settings.compare and index % 2 == 0:
                baseline = renderer.render(index, text, CacheSettings())
            video = renderer.render(index, text, settings.cache)
            if settings.compare and index % 2:
                baseline = renderer.render(index, text, CacheSettings())
            records.append(write_video(folder, settings, names["cache"], video, baseline))

        # 4) The run's own files, then the table.
        metrics = write_summary(folder, settings, names, records)
    print_summary(folder, metrics)
    return metrics.get("speedup", {}).get("denoise")


def check_bundle(bundle: Bundle, settings: GenerateSettings) -> None:
    """What only the loaded model knows: how many experts it has, how long its position tables are.

    A setting that would have no effect is refused. Raises ConfigError.
    """
    if len(bundle.experts) == 1:
        for name, value in (
            ("guidance_low", settings.guidance_low),
            ("model.boundary", settings.model.boundary),
        ):
            if value is not None:
                raise ConfigError(f"{name}: this model has one expert; set {name}=null")
    elif bundle.boundary is None:
        raise ConfigError("model.boundary: the checkpoint does not say where its experts divide")
    config, vae = bundle.pipe.transformer.config, bundle.pipe.vae.config
    sizes = (
        ("num_frames", settings.num_frames, vae.scale_factor_temporal * config.patch_size[0]),
        ("height", settings.height, vae.scale_factor_spatial * config.patch_size[1]),
        ("width", settings.width, vae.scale_factor_spatial * config.patch_size[2]),
    )
    for name, value, unit in sizes:
        most = config.rope_max_seq_len * unit
        if value > most:
            raise ConfigError(f"{name}: this model's position tables end at {most}, got {value}")
