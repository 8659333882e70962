"""`ditcache bridge-train`: two frozen models and clips -> a projector between them, and whether it
is any good.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ditcache.bridge.data.base import Data
from ditcache.bridge.data.zoo import ZooData
from ditcache.bridge.fusion import Fusion
from ditcache.bridge.partner import check_two, load_partner, side_of
from ditcache.bridge.projectors.base import Projector
from ditcache.config import build
from ditcache.errors import ConfigError, one_of
from ditcache.models.base import Model

CONTROLS = ("self", "shuffled", "router", "lora")
PRECISIONS = ("auto", "no", "bf16", "fp16")


@dataclass(kw_only=True)
class BridgeTrainSettings:
    """The keys of conf/bridge_train.yaml, checked before torch is imported."""

    model: Model
    projector: Projector
    fusion: Fusion
    data: Data
    height: int
    width: int
    num_frames: int
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    preservation: float
    max_lag: float
    source_dropout: float
    caption_dropout: float
    partner: str | None = None
    partner_path: str | None = None
    mixed_precision: str = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0
    save_every: int = 50
    resume: str | None = None
    evaluate: bool = False
    seeds: int = 1
    controls: list[str] = field(default_factory=lambda: list(CONTROLS))
    videos: int = 0
    max_harm: float = 0.02
    other: Model = field(init=False)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be >= 1, got {getattr(self, name)}")
        for name in ("weight_decay", "preservation", "max_harm", "seed", "videos"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must be >= 0, got {getattr(self, name)}")
        for name in ("max_lag", "source_dropout", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: must be from 0 to below 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate: must be between 0 and 1, got {self.learning_rate}")
        if self.mixed_precision not in PRECISIONS:
            found = self.mixed_precision
            raise ValueError(f"mixed_precision: no '{found}'. {one_of(found, PRECISIONS)}")
        for name in self.controls:
            if name not in CONTROLS:
                raise ValueError(f"controls: no '{name}'. {one_of(name, CONTROLS)}")
        if self.evaluate and self.batch_size < 2 and "shuffled" in self.controls:
            raise ValueError("batch_size: a shuffled source needs another clip in the batch, >= 2")
        if self.videos == 1:
            raise ValueError("videos: a shuffled source needs another clip beside it; set >= 2")
        if isinstance(self.data, ZooData) and self.videos > self.data.test:
            raise ValueError(f"videos: {self.videos} are more than data.test={self.data.test}")
        if self.seeds > 1 and not self.evaluate:
            raise ValueError("seeds: more than one only says something with evaluate=true")
        if not self.projector.learns and not self.evaluate:
            raise ValueError("projector: has nothing to train; evaluate=true judges it as it is")
        ours = ("refresh_every", "refresh_drop", "window", "driver", "branches")
        plain = Fusion(fusion_direction=self.fusion.fusion_direction)
        for name in ours:
            if getattr(self.fusion, name) != getattr(plain, name):
                raise ValueError(
                    f"fusion.{name}: has no effect on training, which sees single steps; set it "
                    "when generating"
                )
        self.data.check()
        self.other = load_partner(self.model, self.partner, self.partner_path)
        check_two(self.model, self.other, self.num_frames, self.fusion)
        self.model.check_size(
            self.height, self.width, 5 if is_edit(self.model) else self.num_frames
        )

    @property
    def models(self) -> dict[str, Model]:
        """By side."""
        return {side_of(self.model): self.model, side_of(self.other): self.other}


def is_edit(model: Model) -> bool:
    return side_of(model) == "chrono"


def run(cfg: DictConfig) -> None:
    """One job."""
    # 1) Check everything that can be checked without weights.
    settings = build(cfg, "", BridgeTrainSettings)
    for model in settings.models.values():
        model.check_folder()

    # 2) Load both models, see that they fit, open the run folder.
    from ditcache.bridge.course import Course, fresh_accelerator
    from ditcache.models.load import load
    from ditcache.report.run_folder import open_run_folder

    bundles = {side: load(model) for side, model in settings.models.items()}
    on_cpu = all(bundle.device.type == "cpu" for bundle in bundles.values())
    accelerator = fresh_accelerator(settings.mixed_precision, cpu=on_cpu)
    course = Course(settings, bundles, accelerator)
    folder = open_run_folder(OmegaConf.to_yaml(cfg, resolve=True))

    # 3) Clips as latents, then training, then what it came to.
    course.prepare(folder)
    course.train()
    course.finish()


def after_sweep(folder: Path) -> None:
    """One table over all jobs of a sweep."""
    from ditcache.report.bridge_sweep import collect

    collect(folder)


def resumed(folder: str) -> Any:
    """The folder of an interrupted run. Raises ConfigError."""
    path = Path(folder).expanduser()
    if not any(path.glob("checkpoint-*.pt")):
        raise ConfigError(f"resume: {path} holds no checkpoint of bridge-train")
    return path
