"""Train the tiny Wan family that ships inside the package. Stages run in order; each resumes where
it stopped.

torchrun --nproc-per-node 2 scripts/train_zoo.py            # everything, two CPU processes
python scripts/train_zoo.py --stage vae --device cuda       # one stage on one GPU
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from ditcache.clips import world
from zoo import dit, family, text, training, vae
from zoo.optim import MatrixAdam, cosine, trapezoid

SEED = 20261120
VAE_STEPS, DIT_STEPS, DECODER_STEPS = 9000, 10_000, 2000
LATENT_CLIPS, DIT_BATCH = 24_000, 32


def render_clips(seed: int, count: int) -> np.ndarray:
    """uint8 [count, T, H, W, 3]."""
    rng = np.random.default_rng(seed)
    return np.stack([world.render(world.draw_scene(rng)) for _ in range(count)])


def train_vae(folder: Path, device: torch.device, steps: int) -> None:
    """Encoder and decoder together, first mostly on crops, the last fifth on whole clips."""
    torch.manual_seed(SEED)
    model = vae.make_vae().to(device)
    vae.use_training_norm(model)
    clips, held_out = render_clips(SEED + 1 + training.RANK, 3000), render_clips(7, 48)

    def loss_of(rng: np.random.Generator, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        video = vae.draw_crops(clips, rng, full=progress > 0.8 or rng.random() < 0.28).to(device)
        mean, log_variance = vae.encode(model, video)
        latents = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        reconstruction = vae.reconstruction_loss(vae.decode(model, latents), video)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return reconstruction + 3e-4 * kl, {"kl": float(kl.detach())}

    training.fit(
        "vae",
        model,
        MatrixAdam(model.named_parameters(), muon_lr=3e-3, adam_lr=3e-3, weight_decay=0.0),
        loss_of,
        steps=steps,
        schedule=cosine,
        folder=folder,
        seed=SEED,
        evaluate=lambda: {"psnr": vae.psnr(model, held_out)},
        eval_every=500,
    )


def encode_clips(folder: Path, device: torch.device) -> None:
    """This process's share of the DiT's data: posterior means of fresh clips, their captions as
    tokens.

    Latents are normalised to mean 0 and standard deviation 1 per channel; the constants go into the
    VAE's config.
    """
    target = folder / f"latents-{training.RANK}.pt"
    if target.exists():
        return
    model, tokenizer = load_vae(folder, "vae").to(device), text.make_tokenizer()
    rng = np.random.default_rng([SEED, 2, training.RANK])
    scenes = [world.draw_scene(rng) for _ in range(LATENT_CLIPS // training.PROCESSES)]
    with torch.no_grad():
        means = [
            vae.encode(model, vae.to_video(world.render(s)[None]).to(device))[0].cpu()
            for s in scenes
        ]
    tokens = tokenizer(
        [scene.caption for scene in scenes],
        padding="max_length",
        max_length=dit.TEXT_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    training.save({"latents": torch.cat(means), "tokens": tokens}, target)


def load_vae(folder: Path, stage: str) -> AutoencoderKLWan:
    """The VAE as a stage left it, without normalisation constants."""
    model = vae.make_vae()
    model.load_state_dict(torch.load(folder / f"{stage}.pt", weights_only=True)["model"])
    return model.eval()


def latent_statistics(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-channel mean and standard deviation [C] over process 0's latents."""
    latents = torch.load(folder / "latents-0.pt", weights_only=True)["latents"]
    return latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))


def train_dit(folder: Path, device: torch.device, steps: int, batch: int) -> None:
    """Flow matching on precomputed latents; a tenth of the captions is dropped for classifier-free
    guidance.
    """
    torch.manual_seed(SEED)
    tokenizer = text.make_tokenizer()
    model, ema = dit.Denoiser(tokenizer).to(device), dit.Denoiser(tokenizer).to(device)
    ema.load_state_dict(model.state_dict())
    attention = model.use_training_attention()
    data = torch.load(folder / f"latents-{training.RANK}.pt", weights_only=True)
    mean, std = (value.view(1, -1, 1, 1, 1) for value in latent_statistics(folder))
    latents, tokens = (data["latents"] - mean) / std, data["tokens"]
    no_caption = tokenizer(
        "", padding="max_length", max_length=dit.TEXT_TOKENS, return_tensors="pt"
    ).input_ids[0]
    autoencoder = with_statistics(load_vae(folder, "vae"), folder).to(device)
    for block in model.transformer.blocks:
        block.compile()

    def loss_of(rng: np.random.Generator, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        rows = torch.from_numpy(rng.integers(len(latents), size=batch))
        chosen = dit.add_stray_words(tokens[rows].clone(), rng, tokenizer)
        chosen[torch.from_numpy(rng.random(batch) < 0.1)] = no_caption
        padded_to = torch.from_numpy(
            np.where(rng.random(batch) < 0.5, 512, rng.integers(32, 513, batch))
        )
        sigma = dit.draw_sigma(rng, batch)
        return dit.flow_loss(
            model, attention, *(x.to(device) for x in (latents[rows], chosen, sigma, padded_to))
        ), {}

    training.fit(
        "dit",
        model,
        MatrixAdam(model.named_parameters(), muon_lr=3e-3, adam_lr=1.5e-3, weight_decay=0.05),
        loss_of,
        steps=steps,
        schedule=trapezoid,
        folder=folder,
        seed=SEED,
        ema=ema,
        eval_every=2000,
        evaluate=lambda: family.caption_following(
            family.make_pipeline(ema, autoencoder, tokenizer), seed=3, count=24
        ),
    )


def with_statistics(model: AutoencoderKLWan, folder: Path) -> AutoencoderKLWan:
    mean, std = latent_statistics(folder)
    model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return model


def train_decoder(folder: Path, device: torch.device, steps: int) -> None:
    """The decoder alone, on whole clips, with a little noise on the frozen encoder's latents."""
    torch.manual_seed(SEED)
    model = load_vae(folder, "vae").to(device)
    vae.use_training_norm(model)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    spread = latent_statistics(folder)[1].view(1, -1, 1, 1, 1).to(device)
    clips, held_out = render_clips(SEED + 11 + training.RANK, 3000), render_clips(7, 48)

    def loss_of(rng: np.random.Generator, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        video = vae.draw_crops(clips, rng, full=True).to(device)
        with torch.no_grad():
            latents = vae.encode(model, video)[0]
        noisy = latents + 0.04 * spread * torch.randn_like(latents)
        return vae.reconstruction_loss(vae.decode(model, noisy), video), {}

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    training.fit(
        "decoder",
        model,
        MatrixAdam(trained, muon_lr=1e-3, adam_lr=1e-3, weight_decay=0.0),
        loss_of,
        steps=steps,
        schedule=cosine,
        folder=folder,
        seed=SEED,
        evaluate=lambda: {"psnr": vae.psnr(model, held_out)},
        eval_every=500,
    )


def export(folder: Path, target: Path) -> None:
    """Average of the DiT, final decoder, constants -> `target`, an ordinary diffusers folder."""
    tokenizer = text.make_tokenizer()
    denoiser = dit.Denoiser(tokenizer)
    denoiser.load_state_dict(torch.load(folder / "dit.pt", weights_only=True)["ema"])
    autoencoder = with_statistics(load_vae(folder, "decoder"), folder)
    size = family.export(family.make_pipeline(denoiser, autoencoder, tokenizer), target)
    print(f"{target}: {size / 1e6:.2f} MB")


def recipe() -> dict[str, str]:
    """What the model card says of this file's settings."""
    return {"seed": str(SEED), "latent_clips": f"{LATENT_CLIPS:,}", "batch": str(2 * DIT_BATCH)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stage", choices=["all", "vae", "dit", "decoder", "export"], default="all"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/zoo"), help="checkpoints and logs"
    )
    parser.add_argument("--target", type=Path, default=Path("ditcache/zoo/wan-tiny"))
    parser.add_argument(
        "--batch", type=int, default=DIT_BATCH, help="DiT clips per step and process"
    )
    for stage, steps in (("vae", VAE_STEPS), ("dit", DIT_STEPS), ("decoder", DECODER_STEPS)):
        parser.add_argument(f"--{stage}-steps", type=int, default=steps)
    arguments = parser.parse_args()
    folder, stage = arguments.folder, arguments.stage
    folder.mkdir(parents=True, exist_ok=True)
    device = training.start_processes(arguments.device)
    if stage in ("all", "vae"):
        train_vae(folder, device, arguments.vae_steps)
    if stage in ("all", "dit"):
        training.barrier()
        encode_clips(folder, device)
        training.barrier()
        train_dit(folder, device, arguments.dit_steps, arguments.batch)
    if stage in ("all", "decoder"):
        training.barrier()
        train_decoder(folder, device, arguments.decoder_steps)
    if stage in ("all", "export") and training.RANK == 0:
        export(folder, arguments.target)


if __name__ == "__main__":
    main()
