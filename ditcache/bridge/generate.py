"""Bridged generation: sources loaded once, a fresh bridge per video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ditcache.bridge.controls import Alone
from ditcache.bridge.controls_file import MIXED, TRAINED, controls_path, load_controls
from ditcache.bridge.mix import Mix
from ditcache.bridge.nets import Net
from ditcache.bridge.partner import side_of
from ditcache.bridge.refuse import check_bundles, check_frames
from ditcache.bridge.run import Bridge, Source
from ditcache.bridge.saved import load_net
from ditcache.bridge.settings import BridgeSettings
from ditcache.bridge.students import Student
from ditcache.cache.attach import blocks_of
from ditcache.errors import DitcacheError
from ditcache.models.base import Bundle
from ditcache.models.load import load
from ditcache.pipeline.denoise import denoise, make_scheduler
from ditcache.pipeline.inputs import Inputs, draw_inputs
from ditcache.pipeline.text import TextStates, encode_text
from ditcache.store.base import Store

SHUFFLED, SELF, SOURCE = "shuffled source", "self as source", "source alone"
WRONG_SOURCES = (
    "Shuffled source and self as source are the bridge itself, reading another case's prompt and "
    "picture or the target; bridge-train judges by ones that were trained that way."
)


@dataclass
class Spring:
    """A source of a run, loaded."""

    bundle: Bundle
    net: Net


class Bridging:
    """Everything that one run's videos share."""

    def __init__(self, settings: BridgeSettings, target: Bundle, num_frames: int):
        from ditcache.bridge.capture import shape_of

        self.settings, self.target = settings, target
        self.springs: dict[str, Spring] = {}
        self.students: dict[str, Student] = {}
        self.controls: list[str] = []
        self.notes: list[str] = []
        loaded: dict[str, Bundle] = {}
        transformer = target.pipe.transformer
        for number, wire in enumerate(settings.wires):
            path = wire.source.path
            bundle = loaded.get(path) or loaded.setdefault(path, load(wire.source))
            check_bundles(target, bundle)
            if bundle.model.offload != "none":
                raise DitcacheError("bridge: a source must stay where the target is; offload=none")
            if wire.header is None:
                assert settings.projector is not None
                source = bundle.pipe.transformer
                net = settings.projector.make(shape_of(source), shape_of(transformer))
                name = f"{number}"
            else:
                assert wire.path is not None
                way = side_of(target.model)
                net = load_net(wire.path, wire.header, way, bundle.pipe.transformer, transformer)
                name = str(wire.path)  # so that the order in which they were given does not matter
            net = net.to(target.device, transformer.dtype)
            self.springs[name] = Spring(bundle, net)
        frames = (num_frames - 1) // 4 + 1
        ends = settings.fusion.source_frames == "ends"
        sources = [] if ends else [s.bundle.pipe.transformer for s in self.springs.values()]
        check_frames(frames, settings.fusion, transformer, *sources)

    @property
    def num_parameters(self) -> int:
        return sum(spring.net.num_parameters for spring in self.springs.values())

    def arm(
        self,
        name: str,
        inputs: Inputs,
        prompt: str,
        picture: Any,
        *,
        guidance: float,
        store: Store,
        size: Mapping[str, int],
        other: tuple[str, Any] | None = None,
    ) -> Bridge | Mix:
        """For one video: `bridge`, or one of `controls`. other: prompt and picture of another
        video, for the shuffled source.
        """
        target, fusion = self.target.pipe.transformer, self.settings.fusion
        own, condition = self.settings.source_prompt or prompt, None
        if name == SHUFFLED:
            assert other is not None
            own, wrong = other
            if wrong is not picture:
                wanted = draw_inputs(self.target, inputs.text, **size, seed=0, picture=wrong)
                picture, condition = wrong, wanted.condition
        student = self.students.get(name)
        if student is not None and not student.mixes_outputs:  # reads no source
            spring = next(iter(self.springs.values()))
            return Mix(target, student, Source(spring.bundle.pipe.transformer, spring.net, {}))
        sources = {
            key: Source(target, spring.net, texts_of(inputs.text), inputs.image)
            if name == SELF
            else Source(
                spring.bundle.pipe.transformer,
                spring.net,
                texts_of(self.read(spring, own, guidance)),
                self.look(spring, picture),
                condition,
            )
            for key, spring in self.springs.items()
        }
        if student is not None:
            return Mix(target, student, next(iter(sources.values())))
        return Bridge(target, sources, fusion, store)

    def load_controls(self) -> None:
        """Fills `controls`: what one bridge can be compared with in whole runs, by the names that
        `arm` takes; and `notes`: what is known of it, and what it cannot be compared with.
        """
        wires, fusion = self.settings.wires, self.settings.fusion
        if len(wires) > 1 or self.settings.draft_steps is not None:
            what = "several sources" if len(wires) > 1 else "two stages"
            self.notes.append(f"There are no controls for {what}; compare a bridge by itself.")
            return
        (spring,), (wire,) = self.springs.values(), wires
        target, source = self.target.pipe.transformer, spring.bundle.pipe.transformer
        projector = self.settings.projector if wire.header is None else wire.header.projector
        assert projector is not None
        self.controls = [SHUFFLED] if projector.own_is_target else [SHUFFLED, SELF]
        self.notes.append(WRONG_SOURCES)
        if fusion.source_frames == "ends":
            self.notes.append("A source of two frames by itself, or mixed in, is no whole video.")
            return
        self.students = {SOURCE: Alone(source=True)}
        if wire.path is not None:
            path = controls_path(wire.path, side_of(self.target.model))
            found, known = load_controls(path, wire.path, target, source)
            self.students |= found
            self.notes += [f"bridge-train found: {sentence}" for sentence in known]
        missing = [name for name in (*MIXED, *TRAINED.values()) if name not in self.students]
        if missing:
            self.notes.append(
                f"Not compared with {', '.join(missing)}: bridge-train evaluate=true picks and "
                "trains them, and keeps them beside the bridge."
            )
        if self.target.model.offload != "none":
            self.students.pop("weight average", None)  # it changes weights where they are
        for student in self.students.values():
            student.to(self.target.device, target.dtype)
        self.controls += list(self.students)

    def read(self, spring: Spring, prompt: str, guidance: float) -> TextStates:
        negative = spring.bundle.model.negative_prompt
        return encode_text(spring.bundle, prompt, negative_prompt=negative, guidance=guidance)

    def look(self, spring: Spring, picture: Any) -> Tensor | None:
        pipe = spring.bundle.pipe
        if pipe.transformer.config.image_dim is None:
            return None
        return pipe.encode_image(picture, spring.bundle.device).to(pipe.transformer.dtype)

    def draft(
        self,
        inputs: Inputs,
        prompt: str,
        picture: Any,
        *,
        seed: int,
        size: Mapping[str, int],
        sampling: Mapping[str, Any],
    ) -> tuple[Inputs, int, int]:
        """Stage one: the first source's own video, noised again. Returns the target's inputs, the
        step at which it goes on, and how many forwards of the source it took.
        """
        s = self.settings
        assert s.draft_steps is not None and s.draft_sigma is not None
        spring = next(iter(self.springs.values()))
        text = self.read(spring, s.source_prompt or prompt, sampling["guidance"])
        own = draw_inputs(spring.bundle, text, **size, seed=seed, picture=picture)
        own = replace(own, latents=own.latents.to(inputs.latents))
        clean = denoise(spring.bundle, own, **{**sampling, "steps": s.draft_steps})
        scheduler = make_scheduler(self.target.pipe.scheduler, sampling["shift"])
        scheduler.set_timesteps(sampling["steps"])
        start, sigma = start_at(scheduler.sigmas.tolist(), s.draft_sigma)
        noised = (1 - sigma) * clean + sigma * inputs.latents
        forwards = s.draft_steps * (2 if sampling["guidance"] > 1 else 1)
        return replace(inputs, latents=noised), start, forwards


def start_at(sigmas: list[float], most: float) -> tuple[int, float]:
    """First step whose sigma is at most `most`, and that sigma. Raises DitcacheError where no step
    is left. sigmas: one more than steps.
    """
    for step, sigma in enumerate(sigmas[:-1]):
        if sigma <= most:
            return step, sigma
    raise DitcacheError(
        f"bridge.draft_sigma: {most:g} lies below the last step's sigma {sigmas[-2]:.3f}; raise it "
        "or take more steps"
    )


def texts_of(text: TextStates) -> dict[str, Tensor]:
    """Branch -> embeddings."""
    found = {"cond": text.cond}
    if text.uncond is not None:
        found["uncond"] = text.uncond
    return found


def record_of(arm: Bridge | Mix, target_forwards: int, denoise_seconds: float) -> dict[str, Any]:
    """What one video's bridge did, for metrics.json. cost: forwards of all models per forward of
    the target, as if source and target were equally large.
    """
    if isinstance(arm, Mix):
        return {
            "source_forwards": arm.forwards,
            "target_forwards": arm.own,
            "source_blocks": arm.forwards * len(blocks_of(arm.source.transformer)),
            "target_blocks": arm.own * len(blocks_of(arm.target)),
            "cost": (arm.forwards + arm.own) / max(target_forwards, 1),
        }
    on_cpu = next(arm.target.parameters()).device.type == "cpu"
    seconds = {f"{name}_s": value for name, value in arm.seconds.items()} if on_cpu else {}
    share = {"projector_share": arm.seconds["projector"] / denoise_seconds} if on_cpu else {}
    drafted = {"draft_forwards": arm.drafted} if arm.drafted else {}
    first = next(iter(arm.sources.values()))  # makes the draft
    return {
        "schedule": arm.fusion.schedule,
        "driver": arm.fusion.driver,
        "sources": len(arm.sources),
        "source_forwards": arm.forwards,
        **drafted,
        "target_forwards": target_forwards,
        "source_blocks": arm.blocks + arm.drafted * len(blocks_of(first.transformer)),
        "cost": 1 + (arm.forwards + arm.drafted) / max(target_forwards, 1),
        "refreshed": sorted({step for step, _, _ in arm.asked}),
        **seconds,
        **share,
    }
