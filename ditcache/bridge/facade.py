"""A Wan and a ChronoEdit that read each other, in one object, for Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ditcache.bridge.capture import shape_of
from ditcache.bridge.course import Course, fresh_accelerator
from ditcache.bridge.fusion import SIDES, Fusion
from ditcache.bridge.generate import texts_of
from ditcache.bridge.nets import Net
from ditcache.bridge.partner import model_option
from ditcache.bridge.projectors.base import Projector
from ditcache.bridge.refuse import check_bundles, check_frames
from ditcache.bridge.run import Bridge, Source
from ditcache.bridge.saved import Header, end_of, load_net, locate, read_header, save_bridge
from ditcache.cli import conf_dir
from ditcache.config import build, load_yaml
from ditcache.errors import ConfigError, DitcacheError, one_of
from ditcache.models.load import load
from ditcache.pipeline.denoise import decode_latents, denoise
from ditcache.pipeline.inputs import draw_inputs
from ditcache.pipeline.text import encode_text
from ditcache.store.base import Store
from ditcache.store.device import DeviceStore


class WanChronoEditBridge:
    """wan, chrono: options of conf/model; wan_path, chrono_path: their weights, if elsewhere.
    projector, fusion: options of conf/projector and conf/fusion, or instances; settings: keys of
    either, such as projector_hidden_dim, gate_granularity, refresh_drop.

    Untrained, it changes nothing: `generate_with_fusion` is then the target's own video.
    """

    def __init__(
        self,
        wan: str = "tiny_i2v",
        chrono: str = "tiny_chronoedit",
        *,
        projector: str | Projector = "gating",
        fusion: str | Fusion = "bidirectional",
        wan_path: str | None = None,
        chrono_path: str | None = None,
        device: str = "auto",
        **settings: Any,
    ):
        nodes = {"projector": projector, "fusion": fusion}
        parts = {
            group: node if not isinstance(node, str) else load_yaml(group, node)
            for group, node in nodes.items()
        }
        self.given = OmegaConf.create(
            {group: part for group, part in parts.items() if isinstance(part, DictConfig)}
        )
        for name, value in settings.items():
            homes = [group for group in self.given if name in self.given[group]]
            if not homes:
                known = [key for group in self.given for key in self.given[group]]
                raise ConfigError(f"WanChronoEditBridge: no '{name}'. {one_of(name, known)}")
            self.given[homes[0]][name] = value
        self.projector: Projector = self.part("projector", parts, Projector)
        self.fusion: Fusion = self.part("fusion", parts, Fusion)
        paths = {"wan": wan_path, "chrono": chrono_path}
        self.bundles = {
            side: load(
                option, device=device, **({} if paths[side] is None else {"path": paths[side]})
            )
            for side, option in (("wan", wan), ("chrono", chrono))
        }
        check_bundles(self.bundles["wan"], self.bundles["chrono"])
        self.nets: dict[str, Net] = {
            target: self.projector.make(*(shape_of(self.transformer(s)) for s in (source, target)))
            for target, source in self.fusion.sources.items()
        }
        self.steps_trained = 0
        self.last: Bridge | None = None  # of the last generation: who was asked, and when

    def part(self, group: str, parts: dict[str, Any], base: type) -> Any:
        return build(self.given, group, base) if group in self.given else parts[group]

    def transformer(self, side: str) -> Any:
        return self.bundles[side].pipe.transformer

    @torch.no_grad()
    def generate_with_fusion(
        self,
        prompt: str,
        image: Image.Image | str | Path | None = None,
        *,
        target_model: str = "wan",
        source_prompt: str | None = None,
        num_frames: int = 29,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        store: Store | None = None,
    ) -> np.ndarray:
        """A video of `target_model` ("wan" or "chrono") that reads the other one. image: what it
        starts from (None: the embedded model's own picture). Returns float frames [T, H, W, 3] in
        0..1. Raises DitcacheError.
        """
        if target_model not in self.nets:
            raise ConfigError(
                f"target_model: no projector into it. {one_of(target_model, self.nets)}"
            )
        target, other = self.bundles[target_model], self.bundles[self.fusion.sources[target_model]]
        model = target.model
        check_frames((num_frames - 1) // 4 + 1, self.fusion, *map(self.transformer, SIDES))
        guidance = model.guidance if guidance is None else guidance
        picture = opened(image if image is not None else model.own_picture)
        text, own = (
            encode_text(
                bundle, words, negative_prompt=bundle.model.negative_prompt, guidance=guidance
            )
            for bundle, words in ((target, prompt), (other, source_prompt or prompt))
        )
        size = {"height": height or model.height, "width": width or model.width}
        inputs = draw_inputs(
            target, text, **size, num_frames=num_frames, seed=seed, picture=picture
        )
        look = None
        if other.pipe.transformer.config.image_dim is not None:
            look = other.pipe.encode_image(picture, other.device).to(other.pipe.transformer.dtype)
        transformer = target.pipe.transformer
        net = self.nets[target_model].to(target.device, transformer.dtype)
        source = Source(other.pipe.transformer, net, texts_of(own), look)
        self.last = Bridge(transformer, {"source": source}, self.fusion, store or DeviceStore())
        with self.last.attached(texts_of(text)):
            latents = denoise(
                target, inputs, steps=steps or model.steps, guidance=guidance, shift=model.shift
            )
        return decode_latents(target, latents)

    def train_projector(
        self, folder: str | Path, data: str = "zoo", data_settings: Any = None, **settings: Any
    ) -> dict[str, list[float]]:
        """Train the projectors into `folder`, as `ditcache bridge-train` does. data: an option of
        conf/data, data_settings: its keys; settings: keys of conf/bridge_train.yaml. Returns the
        loss per step of each run.
        """
        from ditcache.commands.bridge_train import BridgeTrainSettings

        node = OmegaConf.load(conf_dir() / "bridge_train.yaml")
        assert isinstance(node, DictConfig)
        for key in ("defaults", "hydra"):
            node.pop(key)
        wan, chrono = (model_option(self.bundles[side].model) for side in SIDES)
        node.model = load_yaml("model", wan)
        node.model.path = self.bundles["wan"].model.path
        node.data = OmegaConf.merge(load_yaml("data", data), data_settings or {})
        node.partner, node.partner_path = chrono, self.bundles["chrono"].model.path
        for name, value in settings.items():
            if name not in node:
                raise ConfigError(f"train_projector: no '{name}'. {one_of(name, map(str, node))}")
            node[name] = value
        for group, spec in (("projector", self.projector), ("fusion", self.fusion)):
            cls = type(spec)
            target = f"{cls.__module__}.{cls.__qualname__}"
            node[group] = {"_target_": target, **vars(spec)}
        checked = build(node, "", BridgeTrainSettings)
        on_cpu = self.bundles["wan"].device.type == "cpu"
        accelerator = fresh_accelerator(checked.mixed_precision, cpu=on_cpu)
        course = Course(checked, self.bundles, accelerator)
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        course.prepare(path)
        course.train()
        course.finish()
        self.nets = {way: net.requires_grad_(False).eval() for way, net in course.nets.items()}
        self.steps_trained = checked.steps
        return {
            run: [losses["bridge"] for losses in history.steps]
            for run, history in course.histories.items()
        }

    def save_projectors(self, path: str | Path) -> None:
        """One safetensors file, with what the projectors were trained between."""
        ends = {side: end_of(bundle) for side, bundle in self.bundles.items()}
        header = Header(ends, tuple(self.nets), self.projector, self.steps_trained)
        save_bridge(Path(path), header, self.nets)

    def load_projectors(self, path: str | Path) -> None:
        """Raises DitcacheError for a file of other models, or without a way that `fusion` names."""
        file = locate(str(path))
        header = read_header(file)
        nets = {}
        for target, source in self.fusion.sources.items():
            if target not in header.ways:
                raise DitcacheError(
                    f"load_projectors: {file} has projectors into {', '.join(header.ways)}, and "
                    f"fusion={self.fusion.fusion_direction} needs one into {target}"
                )
            ends = (self.transformer(source), self.transformer(target))
            nets[target] = load_net(file, header, target, *ends)
        self.nets, self.projector, self.steps_trained = nets, header.projector, header.steps


def opened(image: Image.Image | str | Path | None) -> Image.Image:
    from ditcache.pipeline.render import open_picture

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image is None:
        raise ConfigError("image: these models start from a picture; give one")
    return open_picture(Path(image))
