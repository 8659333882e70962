"""Fine-tune the zoo's other members from wan-tiny. Each stage resumes where it stopped.

python scripts/train_siblings.py --stage wan22-high      # then wan22-low, i2v, chronoedit
torchrun --nproc-per-node 2 scripts/train_siblings.py    # everything, two CPU processes
python scripts/train_siblings.py --stage export --member wan22-tiny
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from rich.progress import track
from transformers import UMT5EncoderModel

from ditcache.clips import edits, world
from zoo import dit, members, siblings, text, training
from zoo.optim import MatrixAdam, trapezoid

SEED = 20261121
BASE = Path("ditcache/zoo/wan-tiny")
MOTION_CLIPS, LONG_CLIPS = 10_000, 3000
EDIT_CLIPS, REASONING_CLIPS = 6000, 3000
MEMBERS = ("wan22-tiny", "wan-i2v-tiny", "chronoedit-tiny")
STEPS = {"wan22-high": 800, "wan22-low": 1000, "i2v": 2200, "chronoedit": 1200}
BATCH = 32


def load_base() -> tuple[dit.Denoiser, AutoencoderKLWan]:
    """wan-tiny as shipped; only its transformer learns on."""
    model = dit.Denoiser(text.make_tokenizer())
    parts = {"torch_dtype": torch.float32}
    model.transformer = WanTransformer3DModel.from_pretrained(
        BASE, subfolder="transformer", **parts
    )
    model.text_encoder = UMT5EncoderModel.from_pretrained(BASE / "text_encoder", dtype="float32")
    model.text_encoder.requires_grad_(False)
    autoencoder = AutoencoderKLWan.from_pretrained(BASE, subfolder="vae", **parts)
    return model, autoencoder.eval()


def tokens_of(captions: list[str]) -> torch.Tensor:
    padding = {"padding": "max_length", "max_length": dit.TEXT_TOKENS, "truncation": True}
    return text.make_tokenizer()(captions, return_tensors="pt", **padding).input_ids


def cached(path: Path, make: Callable[[], dict[str, torch.Tensor]]) -> siblings.Clips:
    if not path.exists():
        training.save(make(), path)
    return siblings.Clips(**torch.load(path, weights_only=True))


def encoded(encode: Callable[..., torch.Tensor], *args: Any, **more: Any) -> torch.Tensor:
    """In bf16, five times faster and off by 1.5 % of the latents' spread; kept as fp16."""
    with torch.autocast("cpu", torch.bfloat16):
        return encode(*args, **more).half()


def motion_clips(
    folder: Path, autoencoder: AutoencoderKLWan, *, long: bool = False
) -> siblings.Clips:
    """This process's clips of wan-tiny's world, with their first pictures. long: as many frames as
    ChronoEdit's reasoning has.
    """

    def make() -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([SEED, 3 if long else 1, training.RANK])
        count = (LONG_CLIPS if long else MOTION_CLIPS) // training.PROCESSES
        frames = edits.REASONING_FRAMES if long else world.NUM_FRAMES
        scenes = [world.draw_scene(rng) for _ in range(count)]
        latents, condition, pictures = [], [], []
        for scene in track(scenes, description="encoding clips"):
            clip = world.render(scene, frames)
            latents.append(encoded(siblings.encode, autoencoder, clip[None]))
            condition.append(encoded(siblings.encode_picture, autoencoder, clip[0], len(clip)))
            pictures.append(torch.from_numpy(clip[0]))
        return {
            "latents": torch.cat(latents),
            "tokens": tokens_of([scene.caption for scene in scenes]),
            "condition": torch.cat(condition),
            "pictures": torch.stack(pictures),
        }

    return cached(folder / f"{'long' if long else 'motion'}-{training.RANK}.pt", make)


def edit_clips(folder: Path, autoencoder: AutoencoderKLWan, *, reasoning: bool) -> siblings.Clips:
    """This process's edits, as two latent frames or eight."""

    def make() -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([SEED, 2, training.RANK])
        count = (REASONING_CLIPS if reasoning else EDIT_CLIPS) // training.PROCESSES
        pairs = [edits.draw_edit(rng) for _ in range(count)]
        frames = edits.REASONING_FRAMES if reasoning else siblings.EDIT_FRAMES
        latents, condition, pictures = [], [], []
        for before, after in track(pairs, description="encoding edits"):
            picture = world.render(before)[0]
            latents.append(
                encoded(siblings.edit_latents, autoencoder, before, after, reasoning=reasoning)
            )
            condition.append(encoded(siblings.encode_picture, autoencoder, picture, frames))
            pictures.append(torch.from_numpy(picture))
        return {
            "latents": torch.cat(latents),
            "tokens": tokens_of([after.caption for _, after in pairs]),
            "condition": torch.cat(condition),
            "pictures": torch.stack(pictures),
        }

    kind = "reasoning" if reasoning else "edits"
    return cached(folder / f"{kind}-{training.RANK}.pt", make)


class Batches:
    """Draws a batch of captions with their share of dropped and disturbed ones."""

    def __init__(self, clips: siblings.Clips):
        self.clips, self.tokenizer = clips, text.make_tokenizer()
        self.no_caption = tokens_of([""])[0]

    def draw(self, rng: np.random.Generator, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [B] and tokens [B, L]."""
        rows = torch.from_numpy(rng.integers(len(self.clips.latents), size=batch))
        tokens = dit.add_stray_words(self.clips.tokens[rows].clone(), rng, self.tokenizer)
        tokens[torch.from_numpy(rng.random(batch) < 0.1)] = self.no_caption
        return rows, tokens


def padded_lengths(rng: np.random.Generator, batch: int) -> torch.Tensor:
    return torch.from_numpy(np.where(rng.random(batch) < 0.5, 512, rng.integers(32, 513, batch)))


def train_expert(stage: str, folder: Path, steps: int) -> None:
    """One expert of wan22-tiny, on its own noise range."""
    (model, autoencoder), (ema, _) = load_base(), load_base()
    attention = model.use_training_attention()
    clips = motion_clips(folder, autoencoder)
    batches = Batches(clips)

    def loss_of(rng: np.random.Generator, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        rows, tokens = batches.draw(rng, BATCH)
        sigma = siblings.draw_sigma(rng, BATCH, *siblings.RANGES[stage])
        padded_to = padded_lengths(rng, BATCH)
        return dit.flow_loss(
            model, attention, clips.latents[rows].float(), tokens, sigma, padded_to
        ), {}

    fit(stage, model, ema, loss_of, folder, steps)


def train_with_picture(stage: str, folder: Path, steps: int) -> None:
    """i2v: clips from their first picture, five latent frames or eight; its image encoder learns
    with it. chronoedit: edits, two latent frames or eight, starting from i2v, whose image encoder
    it shares.
    """
    base, autoencoder = load_base()
    models = [siblings.PictureDenoiser(base, chronoedit=stage == "chronoedit") for _ in range(2)]
    if stage == "chronoedit":
        start = torch.load(folder / "i2v.pt", weights_only=True)["ema"]
        for model in models:
            model.load_state_dict(start)
            model.image_encoder.requires_grad_(False)
        kinds = [edit_clips(folder, autoencoder, reasoning=r) for r in (False, True)]
        sizes, shares = (48, 12), (0.5, 0.5)
    else:
        kinds = [motion_clips(folder, autoencoder, long=long) for long in (False, True)]
        sizes, shares = (24, 14), (0.7, 0.3)
    model, ema = models
    attention = model.use_training_attention()
    batches = [Batches(clips) for clips in kinds]

    def loss_of(rng: np.random.Generator, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        kind = int(rng.choice(len(kinds), p=shares))
        clips, size = kinds[kind], sizes[kind]
        rows, tokens = batches[kind].draw(rng, size)
        loss = siblings.picture_loss(
            model,
            attention,
            clips,
            rows,
            tokens,
            dit.draw_sigma(rng, size),
            padded_lengths(rng, size),
        )
        return loss, {f"loss{kind}": float(loss.detach()) / shares[kind]}

    fit(stage, model, ema, loss_of, folder, steps)


def fit(
    stage: str,
    model: dit.Denoiser | siblings.PictureDenoiser,
    ema: torch.nn.Module,
    loss_of: Callable[..., tuple[torch.Tensor, dict[str, float]]],
    folder: Path,
    steps: int,
    *,
    muon_lr: float = 1e-3,
    adam_lr: float = 5e-4,
) -> None:
    """Gentler than wan-tiny's training: by default a third of its learning rates."""
    for block in model.transformer.blocks:
        block.compile()
    learning = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    training.fit(
        stage,
        model,
        MatrixAdam(learning, muon_lr=muon_lr, adam_lr=adam_lr, weight_decay=0.05),
        loss_of,
        steps=steps,
        schedule=trapezoid,
        folder=folder,
        seed=SEED,
        ema=ema,
        save_every=250,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=["all", *STEPS, "export"], default="all")
    parser.add_argument("--member", choices=["all", *MEMBERS], default="all", help="to export")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/zoo"), help="checkpoints, logs"
    )
    parser.add_argument("--steps", type=int, help="instead of the stage's own number")
    parser.add_argument("--threads", type=int, help="of this process")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    training.start_processes("cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for stage, steps in STEPS.items():
        if arguments.stage in ("all", stage):
            train = train_expert if stage.startswith("wan22") else train_with_picture
            train(stage, arguments.folder, arguments.steps or steps)
            training.barrier()
    if arguments.stage in ("all", "export") and training.RANK == 0:
        base, autoencoder = load_base()
        for member in MEMBERS if arguments.member == "all" else [arguments.member]:
            pipe = members.make_pipeline(member, arguments.folder, base, autoencoder)
            print(f"{member}: {members.export(member, pipe) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
