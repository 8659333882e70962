"""Pictures and prompts of the tiny world, to try or calibrate image-conditioned models with.

python scripts/draw_scenes.py --count 24 --out outputs/scenes         # objects that move
python scripts/draw_scenes.py --count 24 --edits --out outputs/edits  # ones that rest
ditcache calibrate model=tiny_i2v image=outputs/scenes prompt_file=outputs/scenes/prompts.txt
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from ditcache.clips import world


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--edits", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="an empty or new folder")
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error("--count must be >= 1")
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"--out: {arguments.out} is not empty")
    scenes = draw(arguments.count, arguments.seed, edits=arguments.edits)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number, (scene, _) in enumerate(scenes):
        Image.fromarray(world.render(scene)[0]).save(arguments.out / f"{number:03d}.png")
    prompts = "".join(f"{prompt}\n" for _, prompt in scenes)
    (arguments.out / "prompts.txt").write_text(prompts)
    print(f"{arguments.out}: {arguments.count} pictures and prompts.txt")


def draw(count: int, seed: int, *, edits: bool) -> list[tuple[world.Scene, str]]:
    """(what the picture shows, prompt); other scenes than those of training and evaluation."""
    rng = np.random.default_rng([20261126, seed])
    if edits:
        pairs = [edits.draw_edit(rng) for _ in range(count)]
        return [(before, after.caption) for before, after in pairs]
    return [(scene, scene.caption) for scene in (world.draw_scene(rng) for _ in range(count))]


if __name__ == "__main__":
    main()
