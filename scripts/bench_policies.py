"""The README's table: what each cache costs and gains on the embedded model, in one run.

    python scripts/bench_policies.py                  # twenty prompts, a few minutes on two cores
    python scripts/bench_policies.py --seed 1 --prompts demo

Arms take turns prompt by prompt. The first arm is the reference; two controls stand beside the
caches: fewer steps at about the same compute, and the noise floor (initial noise moved by 1e-4).
"""

import argparse
import time
from statistics import median

import numpy as np
import torch
from rich.progress import track

import ditcache
from ditcache.config import load_yaml
from ditcache.metrics.psnr import psnr, psnr_per_frame
from ditcache.metrics.ssim import ssim
from ditcache.pipeline.denoise import decode_latents, denoise
from ditcache.pipeline.inputs import Inputs, draw_inputs
from ditcache.pipeline.text import encode_text

STEPS, GUIDANCE = 24, 4.0
ARMS: dict[str, dict] = {
    "`none`": {},
    "`taylorseer`": {"policy": "taylorseer"},
    "`taylorseer cache.policy.every=2 cache.head=6`": {
        "policy": "taylorseer",
        "every": 2,
        "head": 6,
    },
    "`interval`": {"policy": "interval"},
    "`fbcache`": {"policy": "fbcache"},
    "`fbcache cache.policy.threshold=0.12`": {"policy": "fbcache", "threshold": 0.12},
    "control: 14 steps, no cache": {"steps": 14},
    "control: noise moved by 1e-4": {"moved": 1e-4},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", default="twenty", help="an option of conf/prompts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    bundle = ditcache.load("tiny")
    prompts = list(load_yaml("prompts", arguments.prompts).texts)
    run_arm(bundle, inputs_of(bundle, prompts[0], arguments.seed), ARMS["`taylorseer`"])  # warm-up
    rows: dict[str, list[dict]] = {name: [] for name in ARMS}
    for prompt in track(prompts, description="prompts", transient=True):
        inputs = inputs_of(bundle, prompt, arguments.seed)
        results = {name: run_arm(bundle, inputs, arm) for name, arm in ARMS.items()}
        for name, result in results.items():
            rows[name].append(compared(results["`none`"], result))
    print(f"wan-tiny, {len(prompts)} prompts, seed {arguments.seed}, {STEPS} steps, ", end="")
    print(f"guidance {GUIDANCE}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(markdown(rows))


def inputs_of(bundle, prompt: str, seed: int) -> Inputs:
    text = encode_text(bundle, prompt, negative_prompt="", guidance=GUIDANCE)
    return draw_inputs(bundle, text, height=64, width=64, num_frames=17, seed=seed)


def run_arm(bundle, inputs: Inputs, arm: dict) -> dict:
    """One video: seconds of denoising, share of blocks computed, bytes kept, frames."""
    knobs = {key: value for key, value in arm.items() if key not in ("policy", "steps", "moved")}
    if "moved" in arm:
        noise = torch.randn(inputs.latents.shape, generator=torch.Generator().manual_seed(1))
        inputs = Inputs(inputs.latents + arm["moved"] * noise, inputs.text)
    steps = arm.get("steps", STEPS)
    cache = ditcache.enable_cache(bundle, arm["policy"], **knobs) if "policy" in arm else None
    started = time.perf_counter()
    latents = denoise(bundle, inputs, steps=steps, guidance=GUIDANCE)
    seconds = time.perf_counter() - started
    ditcache.disable_cache(bundle)
    trace = cache.trace if cache else None
    return {
        "seconds": seconds,
        "computed": steps / STEPS * (trace.blocks_computed / trace.blocks if trace else 1.0),
        "bytes": cache.store.stats()["bytes_peak"] if cache else 0,
        "frames": decode_latents(bundle, latents),
    }


def compared(reference: dict, result: dict) -> dict:
    """The figures of one video against its reference; the frames are dropped."""
    a, b = reference["frames"], result["frames"]
    return {
        "speedup": reference["seconds"] / result["seconds"],
        "psnr": psnr(a, b),
        "worst_frame": min(psnr_per_frame(a, b)),
        "ssim": ssim(a, b),
        **{key: result[key] for key in ("seconds", "computed", "bytes")},
    }


def markdown(rows: dict[str, list[dict]]) -> str:
    lines = [
        "| `cache=` | denoising | speed-up | of possible | blocks | PSNR (95 % CI) | worst video "
        "| worst frame | SSIM | kept |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, results in rows.items():
        column = {key: [result[key] for result in results] for key in results[0]}
        speedup, computed = median(column["speedup"]), float(np.mean(column["computed"]))
        cells = [
            name,
            f"{median(column['seconds']):.2f} s",
            f"{speedup:.2f}x",
            f"{100 * speedup * computed:.0f} %",
            f"{100 * computed:.0f} %",
        ]
        if name == "`none`":
            cells += ["", "", "", "", "0"]
        else:
            low, high = interval(column["psnr"])
            cells += [f"{np.mean(column['psnr']):.1f} ({low:.1f}-{high:.1f}) dB"]
            cells += [f"{min(column['psnr']):.1f} dB", f"{min(column['worst_frame']):.1f} dB"]
            kept = max(column["bytes"]) // 1024
            cells += [f"{np.mean(column['ssim']):.4f}", f"{kept} KiB" if kept else "0"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(values: list[float]) -> tuple[float, float]:
    """Bootstrap 95 % confidence interval of the mean over prompts."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (10_000, len(values))).mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


if __name__ == "__main__":
    main()
