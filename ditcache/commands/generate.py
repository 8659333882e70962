"""`ditcache generate`: prompts -> videos, with what the cache cost and gained."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from ditcache.bridge.settings import BridgeSettings, check_bridge
from ditcache.cache.settings import CacheSettings, with_low
from ditcache.config import build
from ditcache.pipeline.settings import VideoSettings, check_bundle
from ditcache.store.base import Store


@dataclass(kw_only=True)
class GenerateSettings(VideoSettings):
    """The keys of conf/generate.yaml, checked before torch is imported or a checkpoint touched."""

    cache: CacheSettings
    store: Store
    compare: bool = False
    save_latents: bool = False
    fps: int = 16
    upscale: int = 1
    plan: bool = False
    bridge: BridgeSettings | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("fps", "upscale"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be >= 1, got {getattr(self, name)}")
        self.cache.check_effect()
        if self.cache.cfg is not None and self.guidance <= 1:
            raise ValueError("cache.cfg: has no effect without guidance; set guidance > 1")
        self.cache.check_segments("cache", self.segments)
        if self.store.shares and self.cache.warmstart is None:
            raise ValueError("store.share: only warm starts are shared; add cache/warmstart=reuse")
        if self.bridge is not None and self.segments > 1:
            raise ValueError(
                "segments: a bridge reads one segment's keys and values; set segments=1"
            )
        if self.compare and self.cache.policy is None and self.bridge is None:
            raise ValueError("compare: needs a cache to compare; set cache=<policy>")
        if self.plan and self.compare:
            raise ValueError("plan: renders nothing to compare; set compare=false")
        if self.bridge is not None:
            check_bridge(self, self.bridge, cached=self.cache.policy is not None)


def run(cfg: DictConfig) -> float | None:
    """One job. Returns the denoising speed-up over the baseline if one was rendered."""
    # 1) Check everything that can be checked without weights.
    settings = build(with_low(cfg), "", GenerateSettings)
    if settings.plan:
        from ditcache.report.plan import show as show_plan

        show_plan(settings)
        return None
    settings.model.check_folder()

    # 2) Load, see that the cache fits the model, then open the run folder.
    from ditcache.report.progress import progress

    total = len(settings.texts) * settings.segments * settings.steps * (1 + settings.compare)
    with progress(total) as show, closing(settings.store) as store:
        from ditcache.bridge.generate import Bridging
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
        arm = None if settings.bridge is None else "bridge"
        if settings.bridge is not None:
            renderer.bridging = Bridging(settings.bridge, bundle, settings.num_frames)
            names["cache"] += " + bridge"
        folder = open_run_folder(OmegaConf.to_yaml(cfg, resolve=True))
        store.open(folder)

        # 3) Render every prompt, beside its baseline if asked, in alternating order so that drift
        # cancels out; write its files at once.
        if settings.compare:
            renderer.warm_up()
        records = []
        for index, text in enumerate(settings.texts):
            picture, seed, baseline = settings.pictures[index], settings.seed, None
            if settings.compare and index % 2 == 0:
                baseline = renderer.render(index, text, CacheSettings(), picture, seed=seed)
            video = renderer.render(index, text, settings.cache, picture, seed=seed, arm=arm)
            if settings.compare and index % 2:
                baseline = renderer.render(index, text, CacheSettings(), picture, seed=seed)
            records.append(write_video(folder, settings, names["cache"], video, baseline))

        # 4) The run's own files, then the table.
        metrics = write_summary(folder, settings, names, records)
    print_summary(folder, metrics)
    return metrics.get("speedup", {}).get("denoise")
