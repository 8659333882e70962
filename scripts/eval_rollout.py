"""How far wan-causal-tiny can roll out before it forgets its caption, and how fast it follows a new
one: the drift curve of its card.

    python scripts/eval_rollout.py          # 40 captions, four times the training length
    python scripts/eval_rollout.py --write-card
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import train_causal
from eval_siblings import Results, show, table_of
from rich.progress import track

import ditcache
from ditcache.clips import world
from ditcache.kv.settings import KVSettings
from ditcache.models.base import Bundle
from ditcache.pipeline.chunks import warped
from ditcache.pipeline.rollout import Recipe, rollout
from ditcache.pipeline.streaming import StreamDecoder
from ditcache.pipeline.text import encode_text
from zoo import card, causal, drift, members

MEMBER = "wan-causal-tiny"
SWITCHED = 4  # chunk at which the caption changes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", type=int, default=40)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--window", type=int, default=9, help="latent frames")
    parser.add_argument("--sink", type=int, default=0, help="latent frames")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write-card", action="store_true", help="CARD.md and sample.png as well")
    parser.add_argument("--logs", type=Path, default=Path("outputs/zoo"), help="for --write-card")
    arguments = parser.parse_args()
    if arguments.chunks <= SWITCHED + 1:
        parser.error(f"--chunks must be > {SWITCHED + 1}")
    bundle = ditcache.load("tiny_causal")
    rng = np.random.default_rng([arguments.seed, 9])
    scenes = [world.draw_scene(rng) for _ in range(arguments.captions)]
    kv = KVSettings(window=arguments.window, sink=arguments.sink)

    results, videos = follow_captions(bundle, scenes, arguments.chunks, kv, arguments.seed)
    show(f"{arguments.captions} captions", results, "chunk")
    switch = follow_switches(bundle, scenes, arguments.chunks, kv, arguments.seed)
    show(f"another colour from chunk {SWITCHED} on", switch, "chunk")
    if arguments.write_card:
        folder = members.ZOO / MEMBER
        short = [video[:: len(video) // 4] for video in videos[:12]]
        card.save_picture(card.sample_picture(scenes, np.stack(short)), folder / "sample.png")
        (folder / "CARD.md").write_text(make_card(arguments, results, switch))


def follow_captions(
    bundle: Bundle, scenes: list[world.Scene], chunks: int, kv: KVSettings, seed: int
) -> tuple[Results, np.ndarray]:
    """Per chunk what the videos show, beside true clips of the same scenes."""
    frames = causal.video_frames(chunks * causal.CHUNK)
    videos, seen, truth = [], [], []
    for index, scene in track(list(enumerate(scenes)), description="rolling out"):
        videos.append(roll_out(bundle, {0: scene.caption}, chunks, kv, seed=[seed, index]))
        seen.append(drift.read_chunks(videos[-1]))
        truth.append(drift.read_chunks(causal.render_on([scene], [frames]) / 255))
    sharp = np.array([sharpness(video, chunks) for video in videos])
    rows: Results = {}
    for name, verdicts in (("true clips", truth), ("generated", seen)):
        shares = {
            quality: drift.share_right(scenes, verdicts, quality)
            for quality in ("background", "colour", "direction")
        }
        speeds = np.array([[v.speed for v in video] for video in verdicts])
        speed = speeds.mean(0) / np.mean([s.travel / (world.NUM_FRAMES - 1) for s in scenes])
        if name == "true clips":
            rows[name] = {q: percent(share.mean()) for q, share in shares.items()}
            rows[name] |= {"speed": f"{speed.mean():.2f}", "sharpness": ""}
            continue
        for chunk in range(chunks):
            rows[str(chunk)] = {q: percent(share[chunk]) for q, share in shares.items()} | {
                "speed": f"{speed[chunk]:.2f}",
                "sharpness": f"{(sharp[:, chunk] / sharp[:, 0]).mean():.2f}",
            }
    return rows, np.stack(videos)


def follow_switches(
    bundle: Bundle, scenes: list[world.Scene], chunks: int, kv: KVSettings, seed: int
) -> Results:
    """Per chunk from the switch on: share of videos that show the new colour and the old
    background.
    """
    rng, rows = np.random.default_rng([seed, 10]), {}
    changed = [other_colour(rng, scene) for scene in scenes]
    for recache in (False, True):
        seen = []
        for index, (scene, other) in track(
            list(enumerate(zip(scenes, changed, strict=True))), description="switching"
        ):
            texts = {0: scene.caption, SWITCHED: other.caption}
            video = roll_out(bundle, texts, chunks, kv, seed=[seed, index], recache=recache)
            seen.append(drift.read_chunks(video))
        colour = drift.share_right(changed, seen, "colour")
        background = drift.share_right(changed, seen, "background")
        for chunk in range(SWITCHED - 1, min(chunks, SWITCHED + 4)):
            row = rows.setdefault(str(chunk), {})
            name = "recache" if recache else "no recache"
            row[f"new colour, {name}"] = percent(colour[chunk])
            row[f"background, {name}"] = percent(background[chunk])
    return rows


def other_colour(rng: np.random.Generator, scene: world.Scene) -> world.Scene:
    """The same caption with another colour in it."""
    names = [c for c in world.OBJECT_COLOURS if c not in (scene.colour, scene.background)]
    colour = str(rng.choice(names))
    words = [colour if word == scene.colour else word for word in scene.caption.split()]
    at = words.index(colour)
    if at and words[at - 1] in ("a", "an"):
        words[at - 1] = "an" if colour == "orange" else "a"
    return replace(scene, colour=colour, caption=" ".join(words))


def roll_out(
    bundle: Bundle,
    captions: dict[int, str],
    chunks: int,
    kv: KVSettings,
    *,
    seed: list[int],
    recache: bool = False,
) -> np.ndarray:
    """Float frames [T, H, W, 3] in 0..1."""
    model = bundle.model
    recipe = Recipe(
        lengths=[causal.CHUNK] * chunks,
        timesteps=warped(model.timesteps, model.shift),
        kv=kv,
        recache=recache,
        seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
    )
    texts = {
        chunk: encode_text(bundle, caption, negative_prompt="", guidance=1.0)
        for chunk, caption in captions.items()
    }
    decoder = StreamDecoder(bundle)
    size = {"height": world.HEIGHT, "width": world.WIDTH}
    made = rollout(bundle, recipe, texts, **size)
    return np.concatenate([decoder.decode(chunk.latents) for chunk in made])


def sharpness(video: np.ndarray, chunks: int) -> np.ndarray:
    """Mean absolute horizontal difference, per chunk."""
    steps = np.abs(np.diff(video, axis=2)).mean((1, 2, 3))
    bounds = [0, *range(9, len(video), 12), len(video)]
    return np.array([steps[bounds[i] : bounds[i + 1]].mean() for i in range(chunks)])


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def make_card(arguments: argparse.Namespace, results: Results, switch: Results) -> str:
    """CARD.md, with every figure from the evaluation and the training logs."""
    folder = members.ZOO / MEMBER
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in (".safetensors", ".json"))
    rows = []
    for stage in train_causal.STEPS:
        last = json.loads((arguments.logs / f"{stage}.jsonl").read_text().splitlines()[-1])
        rows.append(
            f"| {stage} | {last['step']} | {last['seconds'] / 60:.0f} min | {last['loss']:.4f} |"
        )
    command = (
        f"python scripts/eval_rollout.py --captions {arguments.captions} "
        f"--chunks {arguments.chunks} --window {arguments.window} --sink {arguments.sink} "
        f"--seed {arguments.seed}"
    )
    return (
        (Path(__file__).parent / "zoo" / "cards" / f"{MEMBER}.md")
        .read_text()
        .format(
            megabytes=f"{size / 1e6:.2f}",
            stages="\n".join(rows),
            seed=train_causal.SEED,
            command=command,
            frames=causal.video_frames(arguments.chunks * causal.CHUNK),
            chunks=arguments.chunks,
            times=f"{arguments.chunks * causal.CHUNK / causal.TRAINED:g}",
            window=arguments.window,
            results=table_of(results, "chunk"),
            switched=SWITCHED,
            switch=table_of(switch, "chunk"),
        )
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
