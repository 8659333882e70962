"""Checkpoint folder or hub id -> bundle. Weights are loaded once per process and settings."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from omegaconf import OmegaConf

from ditcache.config import build, load_yaml
from ditcache.errors import ConfigError, DitcacheError
from ditcache.models.base import Bundle, Model


def load(model: str | Model = "tiny", **settings: Any) -> Bundle:
    """A model of conf/model by name (or an instance) -> bundle, ready to run.

    settings: keys of the model, e.g. `load("wan", path="/data/wan", device="cuda")`. Raises
    ConfigError for wrong ones and DitcacheError if the weights cannot be had.
    """
    if isinstance(model, str):
        node = OmegaConf.merge(load_yaml("model", model), settings)
        model = build(OmegaConf.create({"model": node}), "model", Model)
    model.check_folder()
    pipe = load_pipeline(
        model.pipeline,
        str(model.folder or model.path),
        model.dtype,
        model.vae_dtype,
        resolve_device(model.device),
        model.offload,
        model.vae_tiling,
    )
    return Bundle(model, pipe)


@lru_cache(maxsize=1)
def load_pipeline(
    pipeline: str,
    path: str,
    dtype: str,
    vae_dtype: str,
    device: str,
    offload: str,
    vae_tiling: bool,
) -> Any:
    """One pipeline stays in memory: a sweep over cache settings pays for its weights once."""
    for library in (diffusers, transformers):  # one bar of ours is enough
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()  # what matters is raised
    dtypes = {"default": getattr(torch, dtype), "vae": getattr(torch, vae_dtype)}
    try:
        pipe = getattr(diffusers, pipeline).from_pretrained(
            path, dtype=dtypes, use_safetensors=True
        )
    except Exception as error:  # a hub can fail in many ways, each with its own exception
        if Path(path).is_dir():
            raise DitcacheError(f"model.path: cannot load {path}: {first_line(error)}") from error
        raise DitcacheError(
            f"model.path: {path} is neither in the local cache nor reachable "
            f"({type(error).__name__}); set model.path=<diffusers folder>, or model=tiny, which "
            "needs no download"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    if vae_tiling:
        pipe.vae.enable_tiling()
    place(pipe, device, offload)
    return pipe


def place(pipe: Any, device: str, offload: str) -> None:
    """Move the pipeline to its device, or let diffusers move parts of it as they are needed."""
    if offload != "none" and device == "cpu":
        raise ConfigError(
            f"model.offload: '{offload}' needs a GPU to load onto; set model.offload=none"
        )
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(
            onload_device=torch.device(device),
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
        )
    else:
        pipe.to(device)


def resolve_device(name: str) -> str:
    """`auto` -> cuda if there is one, else cpu. Raises ConfigError for a device this machine
    lacks.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"model.device: no device '{name}'; use auto, cpu, cuda or cuda:<index>"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device: this machine has no CUDA device; set model.device=cpu")
    return name


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
