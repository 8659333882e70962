"""`ditcache rollout`: prompts -> long videos, chunk by chunk, in fixed memory."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ditcache.cache.settings import CacheSettings, with_low
from ditcache.config import build
from ditcache.errors import ConfigError, one_of
from ditcache.kv.settings import KVSettings
from ditcache.models.base import Model
from ditcache.models.causal import CONTEXTS
from ditcache.pipeline.chunks import partition, warped
from ditcache.prompts import Prompts, choose_prompts
from ditcache.store.base import Store
from ditcache.store.tiered import TieredStore

WHOLE = (
    "model: {} generates whole clips; rollout needs a causal model, such as model=tiny_causal or "
    "model=self_forcing"
)


@dataclass(kw_only=True)
class RolloutSettings:
    """The keys of conf/rollout.yaml, checked before torch is imported or a checkpoint touched.

    texts: the prompts in the end. lengths: latent frames of every chunk, the picture's among them.
    steps: timesteps as the model gets them.
    """

    model: Model
    kv: KVSettings
    cache: CacheSettings
    store: Store
    prompts: Prompts
    prompt: Any = None
    prompt_file: str | None = None
    switch: Any = None
    image: str | None = None
    negative_prompt: str = ""
    seed: int = 0
    chunks: int | None = 7
    frames: int | None = None
    chunk: int = 3
    first_chunk: int | None = None
    timesteps: list[float] = field(default_factory=list)
    warp: bool = True
    shift: float | None = None
    guidance: float = 1.0
    guidance_low: float | None = None
    height: int = 64
    width: int = 64
    context: str = "clean"
    context_noise: float = 0.0
    recache: bool = True
    plan: bool = False
    verify: bool = False
    save_latents: bool = False
    fps: int = 16
    upscale: int = 1
    texts: list[str] = field(init=False)
    switches: dict[int, str] = field(init=False)
    lengths: list[int] = field(init=False)
    steps: list[float] = field(init=False)

    def __post_init__(self) -> None:
        if not self.model.causal:
            raise ValueError(WHOLE.format(type(self.model).__name__))
        if self.model.vae_tiling:
            raise ValueError("model.vae_tiling: has no effect, rollout decodes frame by frame")
        for name in ("chunk", "chunks", "frames", "first_chunk", "fps", "upscale"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be >= 1, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: must be >= 0 and < 2**63, got {self.seed}")
        self.model.check_size(self.height, self.width, 1)
        self.texts = choose_prompts(self.prompt, self.prompt_file, self.prompts)
        self.check_steps()
        self.lengths = self.divided()
        self.switches = self.read_switches()
        self.check_kv()
        self.cache.check_effect()
        if self.cache.cfg is not None and self.guidance <= 1:
            raise ValueError("cache.cfg: has no effect without guidance; set guidance > 1")
        if self.plan and self.verify:
            raise ValueError("plan: loads nothing to verify; set one of plan and verify")

    def check_steps(self) -> None:
        """Timesteps, guidance, context."""
        t = self.timesteps
        falling = all(a > b for a, b in pairwise(t))
        if not t or not falling or t[-1] <= 0 or t[0] > 1000:
            raise ValueError(f"timesteps: must fall from at most 1000 to above 0, got {t}")
        for name in ("guidance", "guidance_low", "shift"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1000:
                raise ValueError(f"{name}: must be > 0, got {value}")
        if self.warp and self.shift is None:
            raise ValueError("shift: timesteps are warped by it; set shift=5 or warp=false")
        if not self.warp and self.shift != self.model.shift:
            raise ValueError("shift: has no effect with warp=false")
        self.steps = warped(t, self.shift) if self.warp and self.shift else list(t)
        if self.guidance <= 1:
            for name in ("negative_prompt", "guidance_low"):
                if getattr(self, name) != getattr(self.model, name):
                    raise ValueError(f"{name}: has no effect without guidance; set guidance > 1")
        if self.context not in CONTEXTS:
            raise ValueError(f"context: no '{self.context}'. {one_of(self.context, CONTEXTS)}")
        if not 0 <= self.context_noise < 1000:
            raise ValueError(f"context_noise: must be >= 0 and < 1000, got {self.context_noise}")

    def divided(self) -> list[int]:
        """Latent frames per chunk. A picture is a chunk of its own before the others."""
        if (self.chunks is None) == (self.frames is None):
            raise ValueError("frames: give either chunks or frames (and the other as null)")
        picture = self.image is not None
        if picture and self.first_chunk not in (None, 1):
            raise ValueError("first_chunk: a picture is a first chunk of 1 frame; leave it out")
        first = 1 if picture else self.first_chunk
        if self.frames is not None:
            lengths = partition(self.frames, self.chunk, first)
        else:
            assert self.chunks is not None
            lengths = [self.chunk] * (self.chunks + picture)
            lengths[0] = first or self.chunk
        if picture and len(lengths) < 2:
            raise ValueError("frames: the picture is all there is; ask for more")
        return lengths

    def read_switches(self) -> dict[int, str]:
        """Chunk -> prompt, from the `switch` group."""
        if self.switch is not None and not isinstance(self.switch, dict):
            raise ValueError(f"switch: needs chunks and prompts, switch.4='...', got {self.switch}")
        found: dict[int, str] = {}
        for key, text in (self.switch or {}).items():
            if not str(key).isdigit() or not 0 < int(key) < len(self.lengths):
                raise ValueError(
                    f"switch.{key}: must be a chunk from 1 to {len(self.lengths) - 1}, which "
                    "begins with another prompt"
                )
            if not str(text).strip():
                raise ValueError(f"switch.{key}: must not be empty")
            found[int(key)] = str(text).strip()
        return dict(sorted(found.items()))

    def check_kv(self) -> None:
        """What window, positions and store allow."""
        kv = self.kv
        try:
            kv.check_chunk(max(self.lengths))
        except ValueError as error:
            raise ValueError(f"kv.{error}") from None
        if kv.offload and not isinstance(self.store, TieredStore):
            raise ValueError("kv.offload: needs a store with tiers; set store=tiered")
        if not kv.offload and isinstance(self.store, TieredStore):
            raise ValueError("store: holds nothing in a rollout without kv.offload=true")
        if self.context == "recompute" and kv.window is None:
            raise ValueError("context: recompute needs a window; set kv.window or context=clean")
        if not self.switches and self.recache != getattr(self.model, "recache", None):
            raise ValueError("recache: has no effect without a switch of prompts")

    @property
    def picture(self) -> Path | None:
        return None if self.image is None else Path(self.image).expanduser()

    @property
    def total(self) -> int:
        """Latent frames."""
        return sum(self.lengths)


def run(cfg: DictConfig) -> None:
    """One job."""
    # 1) Check everything that can be checked without weights.
    if "timesteps" not in cfg.model:  # nothing that other keys take from the model is there either
        raise ConfigError(WHOLE.format(str(cfg.model.get("_target_")).rpartition(".")[2]))
    settings = build(with_low(cfg), "", RolloutSettings)
    if settings.plan:
        from ditcache.report.rollout_plan import show as show_plan

        show_plan(settings)
        return
    settings.model.check_folder()
    if settings.verify:
        from ditcache.report.verify import verify

        verify(settings)
        return

    # 2) Load, see that the rollout fits the model, then open the run folder.
    from ditcache.models.load import load_once
    from ditcache.pipeline.extend import check_rollout, extend
    from ditcache.report.rollout import Recorder
    from ditcache.report.run_folder import chosen_options, open_run_folder

    with closing(settings.store) as store:
        bundle = load_once(settings.model)
        check_rollout(bundle, settings)
        names = chosen_options()
        folder = open_run_folder(OmegaConf.to_yaml(cfg, resolve=True))
        store.open(folder)

        # 3) Roll out every prompt; its files grow with it and get their names at the end.
        with Recorder(folder, settings, names) as recorder:
            for index, text in enumerate(settings.texts):
                with recorder.video(index, text) as add:
                    for chunk, frames in extend(bundle, settings, text):
                        add(chunk, frames)  # written at once, then forgotten
    recorder.show()
