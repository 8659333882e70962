"""What the zoo's other members can do, read back from their frames, and on which clips each one's
predictions are better than its siblings'.

    python scripts/eval_siblings.py                          # all of them, 60 clips each
    python scripts/eval_siblings.py --member wan22-tiny --write-card
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train_siblings
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

import ditcache
from ditcache.clips import edits, judge, world
from ditcache.metrics.psnr import psnr
from zoo import card, family, members, siblings

GUIDANCE = 4.0
LEVELS = (0.95, 0.8, 0.6, 0.4, 0.2)  # of noise, for flow losses
Results = dict[str, dict[str, str]]  # row -> column -> what the table shows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--member", choices=["all", *train_siblings.MEMBERS], default="all")
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write-card", action="store_true", help="CARD.md and sample.png as well")
    parser.add_argument("--logs", type=Path, default=Path("outputs/zoo"), help="for --write-card")
    arguments = parser.parse_args()
    if arguments.clips < 4:
        parser.error("--clips must be >= 4")
    for member in train_siblings.MEMBERS if arguments.member == "all" else [arguments.member]:
        bundle = ditcache.load("tiny", path=f"zoo:{member}", **KINDS[member])
        results, scenes, videos = EVALUATE[member](bundle.pipe, arguments.clips, arguments.seed)
        show(member, results)
        skills = {} if member == "wan22-tiny" else compare_skills(arguments.clips, arguments.seed)
        if skills:
            show("flow loss, lower is better", skills)
        if arguments.write_card:
            folder = members.ZOO / member
            card.save_picture(card.sample_picture(scenes, videos), folder / "sample.png")
            text = sibling_card(member, arguments, results, skills)
            (folder / "CARD.md").write_text(text)


def moving(pipe: Any, count: int, seed: int) -> tuple[Results, list[world.Scene], np.ndarray]:
    """wan22: captions followed, beside wan-tiny on the same captions and noise; each expert's flow
    loss on its own range.
    """
    base = ditcache.load("tiny").pipe
    scenes = drawn(seed, count)
    captions = [scene.caption for scene in scenes]
    results, videos = {}, np.empty(0)
    for name, one in (("wan-tiny", base), ("wan22-tiny", pipe)):
        videos = family.generate(one, captions, seed=seed * 100_003)
        results[name] = scores(scenes, videos)
    for name, expert in (("wan22-high", pipe.transformer), ("wan22-low", pipe.transformer_2)):
        low, high = siblings.RANGES[name]
        for label, transformer in (("wan-tiny", base.transformer), ("wan22-tiny", expert)):
            loss = flow_loss(pipe, transformer, scenes[:32], low, high)
            results[label][f"flow loss, sigma {low:g}-{high:g}"] = f"{loss:.4f}"
    return results, scenes, videos


def from_picture(pipe: Any, count: int, seed: int) -> tuple[Results, list[world.Scene], np.ndarray]:
    """i2v: does it go on from the picture, and where the caption says."""
    scenes, results, shown = drawn(seed, count), {}, np.empty(0)
    for frames in (edits.REASONING_FRAMES, world.NUM_FRAMES):
        videos, first = [], []
        for number, scene in enumerate(track(scenes, f"{frames} frames", transient=True)):
            picture = world.render(scene)[0]
            video = pipe(
                image=Image.fromarray(picture),
                prompt=scene.caption,
                height=64,
                width=64,
                num_frames=frames,
                num_inference_steps=family.STEPS,
                guidance_scale=GUIDANCE,
                generator=torch.Generator().manual_seed(seed * 100_003 + number),
            ).frames[0]
            videos.append(video)
            first.append(psnr(picture[None] / 255, video[:1]))
        shown = np.stack(videos)
        row = scores(scenes, shown)
        results[f"{frames} frames"] = {**row, "first frame": f"{np.mean(first):.1f} dB"}
    return results, scenes, shown


def edited_pictures(
    pipe: Any, count: int, seed: int
) -> tuple[Results, list[world.Scene], np.ndarray]:
    """chronoedit: is the last picture the edited one, with the object where it was."""
    rng = np.random.default_rng([seed, 3])
    pairs = [edits.draw_edit(rng) for _ in range(count)]
    results: Results = {}
    videos = np.empty(0)
    for name, way in REASONING.items():
        videos = np.stack(
            [
                edited(pipe, before, after, seed * 100_003 + number, way)
                for number, (before, after) in enumerate(track(pairs, name, transient=True))
            ]
        )
        lasts = np.repeat(videos[:, -1:], 3, 1)
        verdicts = [judge.judge(last) for last in lasts]
        targets = [after for _, after in pairs]
        results[name] = {
            quality: share(
                [
                    getattr(v, quality) == getattr(t, quality)
                    for v, t in zip(verdicts, targets, strict=True)
                ]
            )
            for quality in ("background", "colour", "shape")
        }
        wanted = [world.render(after)[:1] / 255 for after in targets]
        near = [psnr(a, b) for a, b in zip(wanted, videos[:, -1:], strict=True)]
        results[name]["edited picture"] = f"{np.mean(near):.1f} dB"
    return results, [after for _, after in pairs], videos


REASONING: dict[str, dict[str, Any]] = {
    "two frames": {"num_frames": siblings.EDIT_FRAMES},
    "reasoning, dropped after 8 steps": {
        "num_frames": edits.REASONING_FRAMES,
        "enable_temporal_reasoning": True,
        "num_temporal_reasoning_steps": 8,
    },
    "reasoning, kept": {
        "num_frames": edits.REASONING_FRAMES,
        "enable_temporal_reasoning": True,
        "num_temporal_reasoning_steps": family.STEPS,
    },
}


def edited(
    pipe: Any, before: world.Scene, after: world.Scene, seed: int, way: dict[str, Any]
) -> np.ndarray:
    return pipe(
        image=Image.fromarray(world.render(before)[0]),
        prompt=after.caption,
        height=64,
        width=64,
        num_inference_steps=family.STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        **way,
    ).frames[0]


EVALUATE = {"wan22-tiny": moving, "wan-i2v-tiny": from_picture, "chronoedit-tiny": edited_pictures}
KINDS: dict[str, dict[str, Any]] = {
    "wan22-tiny": {},
    "wan-i2v-tiny": {"_target_": "ditcache.models.wan.WanImageToVideo"},
    "chronoedit-tiny": {"_target_": "ditcache.models.chronoedit.ChronoEdit"},
}


def drawn(seed: int, count: int) -> list[world.Scene]:
    rng = np.random.default_rng([seed, 2])
    return [world.draw_scene(rng) for _ in range(count)]


def scores(scenes: list[world.Scene], videos: np.ndarray) -> dict[str, str]:
    verdicts = [judge.judge(video) for video in videos]
    found = judge.score(list(zip(scenes, verdicts, strict=True)))
    return {name: f"{100 * right / asked:.0f} %" for name, (right, asked) in found.items()}


def share(right: list[bool]) -> str:
    return f"{100 * np.mean(right):.0f} %"


def compare_skills(count: int, seed: int) -> Results:
    """Both image-conditioned members' flow loss on motion and on edits, in five, eight and two
    latent frames: each is better at what it was trained for.
    """
    names = [name for name in members.PIPELINES if name != "wan22-tiny"]
    if not all((members.ZOO / name / "model_index.json").is_file() for name in names):
        return {}
    pipes = [ditcache.load("tiny", path=f"zoo:{name}", **KINDS[name]).pipe for name in names]
    rng = np.random.default_rng([seed, 3])
    edits_drawn = [edits.draw_edit(rng) for _ in range(min(count, 32))]
    moves = drawn(seed, min(count, 32))
    domains = {
        "motion, 5 latent frames": [(s, world.render(s), None) for s in moves],
        "motion, 8": [(s, world.render(s, edits.REASONING_FRAMES), None) for s in moves],
        "edit, 8": [(a, world.render(b), (b, a, True)) for b, a in edits_drawn],
        "edit, 2": [(a, world.render(b), (b, a, False)) for b, a in edits_drawn],
    }
    results: Results = {name: {} for name in names}
    for domain, clips in domains.items():
        for name, pipe in zip(names, pipes, strict=True):
            results[name][domain] = f"{picture_flow_loss(pipe, clips):.4f}"
    return results


@torch.no_grad()
def picture_flow_loss(pipe: Any, clips: list[tuple]) -> float:
    """As `flow_loss`, given the first picture; clips: (scene, frames, edit or None)."""
    generator, losses = torch.Generator().manual_seed(5), []
    for scene, frames, edit in track(clips, description="flow loss", transient=True):
        if edit is None:
            latents = siblings.encode(pipe.vae, frames[None])
        else:
            latents = siblings.edit_latents(pipe.vae, edit[0], edit[1], reasoning=edit[2])
        picture, count = Image.fromarray(frames[0]), 4 * latents.shape[2] - 3
        text = pipe.encode_prompt(scene.caption, do_classifier_free_guidance=False)[0]
        tokens = pipe.encode_image(picture)
        condition = siblings.encode_picture(pipe.vae, frames[0], count)
        given = torch.cat([siblings.mask(latents.shape[2]), condition], 1)
        for sigma in LEVELS:
            noise = torch.randn(latents.shape, generator=generator)
            noisy = (1 - sigma) * latents + sigma * noise
            velocity = pipe.transformer(
                torch.cat([noisy, given], 1),
                torch.tensor([1000 * sigma]),
                text,
                tokens,
                return_dict=False,
            )[0]
            losses.append(float((velocity - (noise - latents)).square().mean()))
    return float(np.mean(losses))


@torch.no_grad()
def flow_loss(
    pipe: Any, transformer: Any, scenes: list[world.Scene], low: float, high: float
) -> float:
    """Mean squared error of the velocity on clips nobody has seen, at noise levels in a range."""
    states = pipe.encode_prompt([s.caption for s in scenes], do_classifier_free_guidance=False)[0]
    latents = torch.cat([siblings.encode(pipe.vae, world.render(s)[None]) for s in scenes])
    generator, losses = torch.Generator().manual_seed(5), []
    for share_ in LEVELS:
        sigma = low + (high - low) * share_
        noise = torch.randn(latents.shape, generator=generator)
        noisy = (1 - sigma) * latents + sigma * noise
        timestep = torch.full((len(scenes),), 1000 * sigma)
        velocity = transformer(noisy, timestep, states, return_dict=False)[0]
        losses.append(float((velocity - (noise - latents)).square().mean()))
    return float(np.mean(losses))


def show(title: str, results: Results, first: str = "") -> None:
    """first: what the rows are."""
    table = Table(title=title)
    table.add_column(first)
    columns = list(next(iter(results.values())))
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in results.items():
        table.add_row(name, *(row[column] for column in columns))
    Console().print(table)


def sibling_card(
    member: str, arguments: argparse.Namespace, results: Results, skills: Results
) -> str:
    """CARD.md, with every figure from the evaluation and the training logs."""
    folder = members.ZOO / member
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in (".safetensors", ".json"))
    stages = {"wan22-tiny": ("wan22-high", "wan22-low"), "wan-i2v-tiny": ("i2v",)}
    rows = []
    for stage in stages.get(member, ("chronoedit",)):
        last = json.loads((arguments.logs / f"{stage}.jsonl").read_text().splitlines()[-1])
        rows.append(
            f"| {stage} | {last['step']} | {last['seconds'] / 60:.0f} min | {last['loss']:.4f} |"
        )
    body = Path(__file__).parent / "zoo" / "cards" / f"{member}.md"
    return body.read_text().format(
        megabytes=f"{size / 1e6:.2f}",
        stages="\n".join(rows),
        seed=train_siblings.SEED,
        command=f"python scripts/eval_siblings.py --member {member} --clips {arguments.clips} "
        f"--seed {arguments.seed}",
        results=table_of(results),
        skills=table_of(skills) if skills else "",
    )


def table_of(results: Results, first: str = "") -> str:
    """Markdown. first: what the rows are."""
    columns = list(next(iter(results.values())))
    lines = [
        f"| {first}{' ' if first else ''}| {' | '.join(columns)} |",
        "|" + "---|" * (len(columns) + 1),
    ]
    lines += [
        f"| {name} | {' | '.join(row[column] for column in columns)} |"
        for name, row in results.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
