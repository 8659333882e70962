"""The procedural world the zoo is trained on: one object moving over a textured background.

Knows nothing of models. A `Scene` is drawn from a numpy generator, so a clip is a function of its
seed alone. Shapes: clips are uint8 `[T, H, W, 3]`.
"""

from dataclasses import dataclass

import numpy as np

HEIGHT = WIDTH = 64
NUM_FRAMES = 17

OBJECT_COLOURS = {
    "red": (0.88, 0.10, 0.10),
    "orange": (0.96, 0.52, 0.06),
    "yellow": (0.96, 0.90, 0.14),
    "green": (0.18, 0.82, 0.20),
    "cyan": (0.16, 0.84, 0.90),
    "blue": (0.16, 0.30, 0.96),
    "purple": (0.62, 0.16, 0.84),
    "white": (0.97, 0.97, 0.97),
}
BACKGROUNDS = {
    "black": (0.09, 0.09, 0.10),
    "gray": (0.50, 0.50, 0.50),
    "blue": (0.12, 0.17, 0.44),
    "green": (0.11, 0.35, 0.20),
    "pink": (0.74, 0.42, 0.56),
    "brown": (0.38, 0.24, 0.14),
}
TEXTURES = ("plain", "striped", "checkered", "cloudy")
TEXTURE_SHARES = (0.25, 0.35, 0.2, 0.2)
SHAPES = ("circle", "square", "triangle", "star", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Scene:
    """Everything one clip shows. Positions and radius in pixels, colours in 0..1."""

    shape: str
    colour: str
    background: str
    texture: str
    direction: str
    radius: float
    start: tuple[float, float]
    travel: float
    colour_rgb: tuple[float, ...]
    background_rgb: tuple[float, ...]
    texture_seed: int
    texture_contrast: float
    caption: str


def draw_scene(rng: np.random.Generator) -> Scene:
    """One random scene; words that would hide the object (green on green) are never paired."""
    shape, texture = str(rng.choice(SHAPES)), str(rng.choice(TEXTURES, p=TEXTURE_SHARES))
    background = str(rng.choice(list(BACKGROUNDS)))
    colour = str(rng.choice([name for name in OBJECT_COLOURS if name != background]))
    direction = str(rng.choice(list(DIRECTIONS)))
    radius, travel = rng.uniform(12, 14), rng.uniform(25, 33)
    start = []
    for axis, size in ((0, WIDTH), (1, HEIGHT)):
        low, high = radius + 1, size - radius - 1
        shift = DIRECTIONS[direction][axis] * travel
        start.append(
            rng.uniform(low - min(shift, 0), max(low - min(shift, 0), high - max(shift, 0)))
        )
    jitter = lambda rgb: tuple(np.clip(np.array(rgb) + rng.uniform(-0.03, 0.03, 3), 0, 1))  # noqa: E731
    return Scene(
        shape,
        colour,
        background,
        texture,
        direction,
        radius,
        (start[0], start[1]),
        travel,
        jitter(OBJECT_COLOURS[colour]),
        jitter(BACKGROUNDS[background]),
        int(rng.integers(2**31)),
        rng.uniform(0.045, 0.07),
        draw_caption(rng, shape, colour, background, texture, direction),
    )


def draw_caption(
    rng: np.random.Generator, shape: str, colour: str, background: str, texture: str, direction: str
) -> str:
    """Mostly one sentence; sometimes another verb, no article, no texture word or no background."""
    article = "" if rng.random() < 0.06 else "an " if colour == "orange" else "a "
    verb = str(rng.choice(["moves", "moving", "slides", "drifts"], p=[0.7, 0.14, 0.08, 0.08]))
    subject = f"{article}{colour} {shape} {verb} {direction}"
    if rng.random() < 0.04:
        return subject
    surface = background if texture == "plain" or rng.random() < 0.1 else f"{texture} {background}"
    preposition = "over" if rng.random() < 0.1 else "on"
    return f"{subject} {preposition} a {surface} background"


def render(scene: Scene, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """scene -> uint8 [T, H, W, 3], soft edges, mild shading; the same way in any number of
    frames.
    """
    progress = np.linspace(0, 1, num_frames, dtype=np.float32)
    dx, dy = DIRECTIONS[scene.direction]
    return paint(
        scene,
        scene.start[0] + dx * scene.travel * progress,
        scene.start[1] + dy * scene.travel * progress,
    )


def paint(
    scene: Scene, centre_x: np.ndarray, centre_y: np.ndarray, period: float | None = None
) -> np.ndarray:
    """The scene's object at these places, pixels [T] each -> uint8 [T, H, W, 3]. period: after so
    many pixels, in both directions, there is the object again.
    """
    ys, xs = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32) + 0.5
    backdrop = np.array(scene.background_rgb, np.float32) + texture_field(scene, xs, ys)[..., None]
    local_x, local_y = xs - centre_x[:, None, None], ys - centre_y[:, None, None]
    if period is not None:
        local_x, local_y = ((x + period / 2) % period - period / 2 for x in (local_x, local_y))
    alpha = coverage(scene.shape, local_x, local_y, scene.radius)[..., None]
    shade = 1 - 0.10 * (local_x + local_y) / (2 * scene.radius)  # lit from the top left
    ink = np.array(scene.colour_rgb, np.float32) * shade[..., None]
    clip = backdrop * (1 - alpha) + ink * alpha
    return (np.clip(clip, 0, 1) * 255 + 0.5).astype(np.uint8)


def texture_field(scene: Scene, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Brightness offset [H, W] within +-contrast, plus a faint slope so that no background is
    flat.
    """
    rng = np.random.default_rng(scene.texture_seed)
    slope = (
        0.015
        * ((xs - WIDTH / 2) * rng.uniform(-1, 1) + (ys - HEIGHT / 2) * rng.uniform(-1, 1))
        / (WIDTH / 2)
    )
    period, phase = rng.uniform(12, 20), rng.uniform(0, 2 * np.pi, 2)
    wave = lambda along, k: np.clip(1.6 * np.sin(2 * np.pi * along / period + phase[k]), -1, 1)  # noqa: E731
    if scene.texture == "striped":
        angle = rng.choice([0, 0.25, 0.5, 0.75]) * np.pi
        return slope + scene.texture_contrast * wave(xs * np.cos(angle) + ys * np.sin(angle), 0)
    if scene.texture == "checkered":
        return slope + scene.texture_contrast * wave(xs * 0.8, 0) * wave(ys * 0.8, 1)
    if scene.texture == "cloudy":
        waves = np.zeros_like(xs)
        for _ in range(5):
            direction, length, offset = (
                rng.uniform(0, 2 * np.pi),
                rng.uniform(16, 48),
                rng.uniform(0, 2 * np.pi),
            )
            waves += np.sin(
                2 * np.pi * (xs * np.cos(direction) + ys * np.sin(direction)) / length + offset
            )
        return slope + scene.texture_contrast * np.clip(waves / 2.2, -1, 1)
    return slope


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Share of each pixel covered by a shape centred on the origin, 0..1 with a soft edge of about
    1.2 pixels.

    Sizes are chosen so that all shapes cover areas of the same order.
    """
    if shape == "circle":
        distance = np.hypot(x, y) - 0.92 * radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.84 * radius
    elif shape == "cross":
        arm, width = radius, 0.34 * radius
        upright = np.maximum(np.abs(x) - width, np.abs(y) - arm)
        level = np.maximum(np.abs(x) - arm, np.abs(y) - width)
        distance = np.minimum(upright, level)
    elif shape == "triangle":  # isosceles, apex up
        slanted = 0.89 * np.abs(x) - 0.45 * (y + 0.1 * radius) - 0.49 * radius
        distance = np.maximum(slanted, y - 0.82 * radius)
    elif (
        shape == "star"
    ):  # five points: the union of five thin isosceles spikes and a pentagon, by folding the angle
        angle = np.arctan2(x, -y)
        sector = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        length = np.hypot(x, y)
        along, across = length * np.cos(sector), length * np.sin(sector)
        outer, inner = 1.12 * radius, 0.47 * radius
        edge_x, edge_y = inner * np.cos(np.pi / 5) - outer, inner * np.sin(np.pi / 5)
        distance = (edge_y * (along - outer) - edge_x * across) / np.hypot(edge_x, edge_y)
    else:
        raise ValueError(f"shape: must be one of {', '.join(SHAPES)}, got {shape!r}")
    return np.clip(0.5 - distance / 1.2, 0, 1)
