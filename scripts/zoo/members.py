"""Trained siblings -> pipelines in memory, and the folders that ship."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ditcache.clips import world
from ditcache.models import delta
from ditcache.models.zoo import BASE, DELTA, SHARED, WEIGHTS
from zoo import causal, dit, siblings, text

ZOO = Path("ditcache/zoo")
COMMON = ("text_encoder", "tokenizer", "vae")
PIPELINES = {
    "wan22-tiny": "WanPipeline",
    "wan-i2v-tiny": "WanImageToVideoPipeline",
    "chronoedit-tiny": "ChronoEditPipeline",
    "wan-causal-tiny": "WanPipeline",
}
FROM_PICTURE = ("wan-i2v-tiny", "chronoedit-tiny")


def trained(folder: Path, stage: str, model: torch.nn.Module) -> torch.nn.Module:
    """The model with the average of its weights over training."""
    model.load_state_dict(torch.load(folder / f"{stage}.pt", weights_only=True)["ema"])
    return model.eval()


def make_pipeline(member: str, folder: Path, base: dit.Denoiser, autoencoder: Any) -> Any:
    """The diffusers pipeline of one member, from its checkpoints in `folder`."""
    parts = {
        "tokenizer": text.make_tokenizer(),
        "text_encoder": base.text_encoder,
        "vae": autoencoder,
        "scheduler": diffusers.UniPCMultistepScheduler.from_pretrained(ZOO / BASE / "scheduler"),
    }
    if member == "wan22-tiny":
        experts = [
            trained(folder, f"wan22-{name}", dit.Denoiser(parts["tokenizer"])).transformer
            for name in ("high", "low")
        ]
        parts |= {"transformer": experts[0], "transformer_2": experts[1]}
        parts |= {"boundary_ratio": siblings.BOUNDARY}
    elif member == "wan-causal-tiny":
        student = causal.make_causal(base, parts["tokenizer"])
        parts |= {"transformer": trained(folder, "rollout", student).transformer}
    else:
        chronoedit = member == "chronoedit-tiny"
        stage = "chronoedit" if chronoedit else "i2v"
        model = trained(folder, stage, siblings.PictureDenoiser(base, chronoedit=chronoedit))
        parts |= {
            "transformer": model.transformer,
            "image_encoder": model.image_encoder,
            "image_processor": siblings.make_image_processor(),
        }
    pipe = getattr(diffusers, PIPELINES[member])(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own_picture(member: str) -> np.ndarray:
    """uint8 [H, W, 3]: what a member starts from if it is given no picture: the star of
    conf/prompts/one.yaml and edits.yaml.
    """
    start = (32.0, 32.0) if member == "chronoedit-tiny" else (47.0, 32.0)
    scene = world.Scene(
        "star",
        "red",
        "blue",
        "striped",
        "left",
        radius=13.0,
        start=start,
        travel=30.0,
        colour_rgb=world.OBJECT_COLOURS["red"],
        background_rgb=world.BACKGROUNDS["blue"],
        texture_seed=7,
        texture_contrast=0.06,
        caption="a red star moves left on a striped blue background",
    )
    return world.render(scene)[0]


def export(member: str, pipe: Any) -> int:
    """Write a member's folder: what it shares is named, its transformers are differences. Returns
    bytes.
    """
    origins = dict.fromkeys(COMMON, BASE)
    if member == "chronoedit-tiny":
        origins |= dict.fromkeys(("image_encoder", "image_processor"), "wan-i2v-tiny")
    base = load_file(ZOO / BASE / "transformer" / WEIGHTS)
    target = ZOO / member
    with TemporaryDirectory(dir=ZOO) as work:
        folder = Path(work) / member
        pipe.save_pretrained(folder, safe_serialization=True)
        for name in origins:
            shutil.rmtree(folder / name)
        if member in FROM_PICTURE:
            Image.fromarray(own_picture(member)).save(folder / "picture.png")
        for path in folder.glob(f"transformer*/{WEIGHTS}"):
            save_file(delta.encode(load_file(path), base), path.with_name(DELTA))
            path.unlink()
        (folder / SHARED).write_text(json.dumps(origins, indent=2) + "\n")
        for card in target.glob("*"):
            if card.name in ("CARD.md", "sample.png"):  # eval_siblings.py writes them
                shutil.copy(card, folder)
        if target.exists():
            shutil.rmtree(target)
        folder.replace(target)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
