"""Checkpoint folder or hub id -> bundle."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
import transformers
from omegaconf import OmegaConf

from ditcache.config import build, load_yaml
from ditcache.errors import ConfigError, DitcacheError, first_line
from ditcache.models.base import Bundle, Model
from ditcache.models.checkpoints import load_transformer
from ditcache.models.zoo import parts_of

WEIGHT_SETTINGS = ("path", "dtype", "vae_dtype", "device", "offload", "vae_tiling")


def load(model: str | Model = "tiny", **settings: Any) -> Bundle:
    """A model of conf/model by name (or an instance) -> bundle, ready to run.

    settings: keys of the model, e.g. `load("wan", path="/data/wan", device="cuda")`. Raises
    ConfigError for wrong ones and DitcacheError if the weights cannot be had.
    """
    if isinstance(model, str):
        node = OmegaConf.merge(load_yaml("model", model), settings)
        model = build(OmegaConf.create({"model": node}), "model", Model)
    model.check_folder()
    device = resolve_device(model)
    pipe = load_pipeline(model)
    if model.vae_tiling:
        pipe.vae.enable_tiling()
    place(pipe, device, model.offload)
    return Bundle(model, pipe)


LOADED: dict[tuple, Bundle] = {}


def load_once(model: Model) -> Bundle:
    """`load`, but the jobs of a sweep over other settings share one bundle. Keeps the last one."""
    own = repr(getattr(model, "weights", None))  # of a transformer that is published apart
    key = (type(model), own, *(getattr(model, name) for name in WEIGHT_SETTINGS))
    if key not in LOADED:
        LOADED.clear()  # before the next model takes its memory
        LOADED[key] = load(model)
    return Bundle(model, LOADED[key].pipe)


def load_pipeline(model: Model) -> Any:
    """The diffusers pipeline, on the CPU."""
    for library in (diffusers, transformers):  # one bar of ours is enough
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()  # what matters is raised
    huggingface_hub.logging.set_verbosity_error()
    path = str(model.folder or model.path)
    dtypes = {"default": getattr(torch, model.dtype), "vae": getattr(torch, model.vae_dtype)}
    try:
        if model.folder is None:
            reach_hub(path)
        with warnings.catch_warnings():  # of diffusers to huggingface_hub, not to our user
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            found = diffusers.DiffusionPipeline.load_config(path).get("_class_name")
        if found != (wanted := model.stored_as or model.pipeline):
            raise ConfigError(f"model.path: {path} holds a {found}, not a {wanted}")
        cls = getattr(diffusers, model.pipeline)
        parts = parts_of(Path(path), dtypes) if model.path.startswith("zoo:") else {}
        if (weights := getattr(model, "weights", None)) is not None:
            parts["transformer"] = load_transformer(path, weights, dtypes["default"])
        pipe = cls.from_pretrained(path, dtype=dtypes, use_safetensors=True, **parts)
    except DitcacheError:
        raise
    except Exception as error:  # a hub can fail in many ways, each with its own exception
        if model.folder is not None:
            raise DitcacheError(f"model.path: cannot load {path}: {first_line(error)}") from error
        raise DitcacheError(
            f"model.path: cannot get {path}, which is not in the local cache "
            f"({first_line(error)[:120]}); set model.path=<diffusers folder>, or model=tiny, which "
            "needs no download"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reach_hub(repo: str) -> None:
    """Ask the hub once for what is not in the local cache; `from_pretrained` would retry long."""
    if not isinstance(huggingface_hub.try_to_load_from_cache(repo, "model_index.json"), str):
        url = huggingface_hub.hf_hub_url(repo, "model_index.json")
        huggingface_hub.get_hf_file_metadata(url)


def place(pipe: Any, device: str, offload: str) -> None:
    """Move the pipeline to its device, or let diffusers move parts of it as they are needed."""
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


def resolve_device(model: Model) -> str:
    """`auto` -> cuda if there is one, else cpu. Raises ConfigError for what this machine lacks."""
    name = model.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except Exception as error:
        allowed = "use auto, cpu, cuda or cuda:<index>"
        message = f"model.device: cannot use '{name}' ({first_line(error)[:80]}); {allowed}"
        raise ConfigError(message) from None
    if model.offload != "none" and torch.device(name).type == "cpu":
        raise ConfigError(
            f"model.offload: '{model.offload}' needs a GPU to load onto; set model.offload=none"
        )
    return name
