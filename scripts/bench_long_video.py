"""Figures of docs/long-video.md: jumps at joins, and how far residuals of earlier segments are off.

python scripts/bench_long_video.py                 # both, about three minutes on an idle core
python scripts/bench_long_video.py --only joins --out docs      # also writes long-video.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ditcache
from ditcache.models.base import Bundle
from ditcache.pipeline.denoise import decode_latents, denoise
from ditcache.pipeline.inputs import draw_inputs
from ditcache.pipeline.segments import hold
from ditcache.pipeline.text import encode_text
from ditcache.report.pictures import contact_sheet
from ditcache.video import write_png

STAR = "a red star moves left on a striped blue background"
SQUARE = "a yellow square moves down on a checkered green background"
SEGMENTS, LATENTS, STEPS, GUIDANCE, SHIFT = 4, 5, 24, 4.0, 3.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("joins", "residuals"))
    parser.add_argument("--out", type=Path, help="folder for the picture")
    arguments = parser.parse_args()
    bundle = ditcache.load("tiny")
    if arguments.only != "residuals":
        joins(bundle, arguments.out)
    if arguments.only != "joins":
        residuals(bundle)


def long_video(bundle: Bundle, text: str, overlap: int, *, same: bool) -> Tensor:
    """Joined latents. same: every segment starts from the same noise."""
    states = encode_text(bundle, text, negative_prompt="", guidance=GUIDANCE)
    joined: Tensor | None = None
    for number in range(SEGMENTS):
        inputs = draw_inputs(
            bundle, states, height=64, width=64, num_frames=17, seed=0 if same else 1000 * number
        )
        if joined is not None and overlap:
            inputs = hold(inputs, joined, overlap)
        latents = denoise(bundle, inputs, steps=STEPS, guidance=GUIDANCE, shift=SHIFT)
        joined = latents if joined is None else torch.cat([joined, latents[:, :, overlap:]], 2)
    assert joined is not None
    return joined


def joins(bundle: Bundle, out: Path | None) -> None:
    """Mean change at the joins over that at all other frames."""
    print("| overlap | own noise | same noise |\n|---|---|---|")
    strips = []
    for overlap in range(4):
        row = []
        for same in (False, True):
            frames = decode_latents(bundle, long_video(bundle, STAR, overlap, same=same))
            row.append(f"{jump(frames, overlap):.2f}")
            if overlap > 1:
                name = f"overlap {overlap}, {'same' if same else 'own'} noise"
                strips.append((name, [("", frames[8::2][:22])]))
        print(f"| {overlap} | {' | '.join(row)} |", flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_png(out / "long-video.png", contact_sheet(strips, 1))


def jump(frames: np.ndarray, overlap: int) -> float:
    change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    at = [4 * (LATENTS - 1 + n * (LATENTS - overlap)) for n in range(SEGMENTS - 1)]
    return float(change[at].mean() / np.delete(change, at).mean())


def residuals(bundle: Bundle) -> None:
    """Relative error, in percent, of what could stand in for the stack's residual of a step."""
    seen = watched(bundle)
    print("\n| step | segment before, of segment 1 | 2 | 3 | step before | line |")
    print("|---|---|---|---|---|---|")
    for step in range(STEPS):
        row = [error(seen[n - 1, step], seen[n, step]) for n in (1, 2, 3)]
        row += [error(seen[2, step - 1], seen[2, step])] if step else []
        if step > 1:
            row.append(error(2 * seen[2, step - 1] - seen[2, step - 2], seen[2, step]))
        cells = [f"{100 * value:.1f}" for value in row] + [""] * (5 - len(row))
        print(f"| {step} | {' | '.join(cells)} |")


def watched(bundle: Bundle) -> dict[tuple[int, int], Tensor]:
    """(segment, step) -> the cond branch's residual over all blocks, of an uncached long video."""
    blocks, inputs, found = bundle.pipe.transformer.blocks, [], []

    def before(module: object, args: tuple, kwargs: dict) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    def after(module: object, args: tuple, output: Tensor) -> None:
        found.append(output - inputs.pop())

    handles = [
        blocks[0].register_forward_pre_hook(before, with_kwargs=True),
        blocks[-1].register_forward_hook(after),
    ]
    long_video(bundle, SQUARE, 3, same=True)
    for handle in handles:
        handle.remove()
    return {divmod(number, STEPS): value for number, value in enumerate(found[::2])}


def error(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).norm() / truth.norm())


if __name__ == "__main__":
    main()
