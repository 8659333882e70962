"""Train wan-causal-tiny from wan-tiny. Each stage resumes where it stopped.

torchrun --nproc-per-node 2 scripts/train_causal.py                    # both stages, two processes
python scripts/train_causal.py --stage export

Stage `causal`: every chunk is predicted behind the clean chunks before it (teacher forcing), at the
noise levels of few-step sampling. Stage `rollout`: behind chunks that the model has made itself, as
in Self-Forcing (arXiv:2506.08009) and resampling forcing (arXiv:2512.15702), with the true clip as
the aim, so that it learns to undo its own drift.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from train_siblings import SEED, encoded, fit, load_base, padded_lengths, tokens_of

from zoo import causal, dit, members, siblings, text, training

CLIPS, BATCH = 6000, 12
STEPS = {"causal": 2800, "rollout": 500}
NO_SWITCH = causal.LONG // causal.CHUNK


def long_clips(folder: Path, autoencoder) -> causal.LongClips:
    """This process's clips; four of ten switch captions at a chunk."""
    path = folder / f"causal-{training.RANK}.pt"
    if not path.exists():
        rng = np.random.default_rng([SEED, 4, training.RANK])
        latents, captions, switches = [], [], []
        for _ in track(range(CLIPS // training.PROCESSES), description="encoding clips"):
            switch = int(rng.integers(1, NO_SWITCH)) if rng.random() < 0.4 else NO_SWITCH
            at = None if switch == NO_SWITCH else switch * causal.CHUNK
            scenes, clip = causal.draw_clip(rng, causal.LONG, switch=at)
            latents.append(encoded(siblings.encode, autoencoder, clip[None]))
            captions += [scenes[0].caption, scenes[-1].caption]
            switches.append(switch)
        tokens = tokens_of(captions).unflatten(0, (-1, 2))
        data = {"latents": torch.cat(latents), "tokens": tokens, "switch": torch.tensor(switches)}
        training.save(data, path)
    return causal.LongClips(**torch.load(path, weights_only=True))


class Batches:
    """Windows of three chunks out of the long clips."""

    def __init__(self, clips: causal.LongClips):
        self.clips, self.tokenizer = clips, text.make_tokenizer()
        self.no_caption = tokens_of([""])[0]

    def draw(self, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
        """Latents [B, C, 9, H, W], tokens [B, 2, L], which caption every token of a frame sees
        [B, N], and which chunks count [B, 3]: not the first one of a window that begins later.
        """
        count, chunks = causal.LONG // causal.CHUNK, causal.TRAINED // causal.CHUNK
        rows = torch.from_numpy(rng.integers(len(self.clips.latents), size=BATCH))
        later = rng.integers(1, count - chunks + 1, BATCH)
        first = torch.from_numpy(np.where(rng.random(BATCH) < 0.5, 0, later))
        chunk = first[:, None] + torch.arange(chunks)
        frames = (first * causal.CHUNK)[:, None] + torch.arange(causal.TRAINED)
        latents = self.clips.latents[rows[:, None], :, frames].transpose(1, 2).float()
        tokens = self.clips.tokens[rows].clone()
        tokens[torch.from_numpy(rng.random(BATCH) < 0.1)] = self.no_caption
        for pair in tokens.unbind(1):
            pair[:] = dit.add_stray_words(pair.clone(), rng, self.tokenizer)
        second = (chunk >= self.clips.switch[rows][:, None]).repeat_interleave(
            causal.CHUNK * causal.TOKENS, 1
        )
        counts = (chunk > first[:, None]) | (first == 0)[:, None]
        return latents, tokens, second, counts.float()


def draw_levels(rng: np.random.Generator, shape: tuple[int, int]) -> torch.Tensor:
    """Three quarters the levels of few-step sampling, one quarter in between."""
    few = rng.choice(causal.LEVELS, shape)
    between = rng.uniform(0.02, 1, shape)
    return torch.from_numpy(np.where(rng.random(shape) < 0.25, between, few)).float()


def train(stage: str, folder: Path, steps: int) -> None:
    base, autoencoder = load_base()
    model, ema = (causal.make_causal(base, text.make_tokenizer()) for _ in range(2))
    if stage == "rollout":
        start = torch.load(folder / "causal.pt", weights_only=True)["ema"]
        model.load_state_dict(start)
        ema.load_state_dict(start)
    batches = Batches(long_clips(folder, autoencoder))
    attention = dit.set_attention(model.transformer, dit.TrainingAttention())
    own = dit.set_attention(ema.transformer, dit.TrainingAttention())
    attention.hidden = causal.clean_then_noisy_mask(causal.TRAINED)
    model.transformer.rope = causal.Twice(model.transformer.rope)

    def loss_of(rng: np.random.Generator, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        latents, tokens, second, counts = batches.draw(rng)
        bias = causal.caption_bias(tokens, padded_lengths(rng, BATCH), second)
        with torch.no_grad():
            states = torch.cat([model.text_states(pair) for pair in tokens.unbind(1)], 1)
        context = latents
        if stage == "rollout":
            # From further up, what comes out is another clip, whose future the true one is not.
            context = causal.own_context(ema, own, latents, states, bias, int(rng.choice([2, 3])))
        sigma = draw_levels(rng, tuple(counts.shape))
        loss = causal.causal_loss(model, attention, latents, context, states, bias, sigma, counts)
        return loss, {}

    muon_lr, adam_lr = {"causal": (1.5e-3, 7e-4), "rollout": (5e-4, 2.5e-4)}[stage]
    fit(stage, model, ema, loss_of, folder, steps, muon_lr=muon_lr, adam_lr=adam_lr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=["all", *STEPS, "export"], default="all")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/zoo"), help="checkpoints, logs"
    )
    parser.add_argument("--steps", type=int, help="instead of the stage's own number")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    training.start_processes("cpu")
    for stage, steps in STEPS.items():
        if arguments.stage in ("all", stage):
            train(stage, arguments.folder, arguments.steps or steps)
            training.barrier()
    if arguments.stage in ("all", "export") and training.RANK == 0:
        base, autoencoder = load_base()
        pipe = members.make_pipeline("wan-causal-tiny", arguments.folder, base, autoencoder)
        print(f"wan-causal-tiny: {members.export('wan-causal-tiny', pipe) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
