"""Clips with another skill than moving: an object that turns into another colour or shape, at rest
or on its way.

Three domains of 29 frames, drawn from a numpy generator: `motion` (an object moves), `edit` (it
stays where it is and turns into something), `composite` (it does both, as its caption says).
"""

from dataclasses import dataclass, replace

import numpy as np

from ditcache.clips import world

REASONING_FRAMES = 29  # of ChronoEdit with temporal reasoning: eight latent frames
DOMAINS = ("motion", "edit", "composite")


@dataclass(frozen=True)
class Clip:
    """frames: uint8 [29, H, W, 3]. pair: for an edit as ChronoEdit was trained on, [5, H, W, 3]:
    the picture before and four times the one after, whose latent is the last; `frames` are then
    the 25 on the way.
    """

    domain: str
    scene: world.Scene
    frames: np.ndarray
    pair: np.ndarray | None = None


def draw_clip(domain: str, rng: np.random.Generator) -> Clip:
    """One clip of a domain; its scene's caption says what happens."""
    if domain == "motion":
        scene = world.draw_scene(rng)
        return Clip(domain, scene, world.render(scene, REASONING_FRAMES))
    if domain == "edit":
        before, after = draw_edit(rng)
        way = render_edit(before, after)
        return Clip(domain, after, way, np.concatenate([way[:1], np.repeat(way[-1:], 4, 0)]))
    if domain == "composite":
        before, after = draw_composite(rng)
        return Clip(domain, after, render_change(before, after, REASONING_FRAMES))
    raise ValueError(f"domain: must be one of {', '.join(DOMAINS)}, got {domain!r}")


def draw_composite(rng: np.random.Generator) -> tuple[world.Scene, world.Scene]:
    """A moving object that turns into another colour or shape on its way, or into both."""
    before = world.draw_scene(rng)
    return before, draw_change(before, rng, f"moves {before.direction} and becomes")


def draw_edit(rng: np.random.Generator) -> tuple[world.Scene, world.Scene]:
    """A resting object before and after."""
    before = replace(world.draw_scene(rng), travel=0.0)
    half = before.radius + 1
    x, y = (float(rng.uniform(half, size - half)) for size in (world.WIDTH, world.HEIGHT))
    before = replace(before, start=(x, y))
    return before, draw_change(before, rng, "becomes")


def draw_change(before: world.Scene, rng: np.random.Generator, verb: str) -> world.Scene:
    """The scene after: another colour, another shape, or both; its caption says what becomes of the
    object.
    """
    colours = [c for c in world.OBJECT_COLOURS if c not in (before.colour, before.background)]
    shapes = [shape for shape in world.SHAPES if shape != before.shape]
    kind = rng.choice(["colour", "shape", "both"], p=[0.5, 0.3, 0.2])
    colour = before.colour if kind == "shape" else str(rng.choice(colours))
    shape = before.shape if kind == "colour" else str(rng.choice(shapes))
    words = {"colour": colour, "shape": f"a {shape}", "both": f"a {colour} {shape}"}[str(kind)]
    if words.startswith("a orange"):
        words = f"an{words[1:]}"
    subject = "it" if rng.random() < 0.3 else f"the {before.shape}"
    jitter = np.clip(np.array(world.OBJECT_COLOURS[colour]) + rng.uniform(-0.03, 0.03, 3), 0, 1)
    rgb = before.colour_rgb if kind == "shape" else tuple(jitter)
    caption = f"{subject} {verb} {words}"
    return replace(before, shape=shape, colour=colour, colour_rgb=rgb, caption=caption)


def render_edit(before: world.Scene, after: world.Scene) -> np.ndarray:
    """uint8 [25, H, W, 3]: from one picture to the other by a cross-fade."""
    return render_change(before, after, REASONING_FRAMES - 4)


def render_change(before: world.Scene, after: world.Scene, num_frames: int) -> np.ndarray:
    """uint8 [T, H, W, 3]: a cross-fade between the two scenes, each at its place of the moment."""
    ways = [world.render(scene, num_frames).astype(np.float32) for scene in (before, after)]
    share = np.linspace(0, 1, num_frames, dtype=np.float32)[:, None, None, None]
    return (ways[0] * (1 - share) + ways[1] * share + 0.5).astype(np.uint8)
