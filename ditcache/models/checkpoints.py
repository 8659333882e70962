"""Transformers as their authors published them -> as diffusers names them.

Nothing in a file is executed: `.pt` files are read as tensors only. Every tensor must find its
place and every place its tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file
from torch import Tensor, nn

from ditcache.errors import DitcacheError, first_line, one_of
from ditcache.models.causal import Weights

State = dict[str, Tensor]
WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_orig_mod\.|_checkpoint_wrapped_module\.")
PREFIX = re.compile(r"(?:base_model\.|module\.|model\.|diffusion_model\.|net\.)+")
LORA = re.compile(r"(.+)\.lora_(A|B)(?:\.\w+)?\.weight")
SHOWN = 6  # names in a message


def load_transformer(pipeline: str, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """The transformer of a diffusers pipeline (folder or hub id) with `weights` in it, on the CPU,
    in `dtype` but for what diffusers keeps in fp32. Raises DitcacheError.
    """
    cls = diffusers.WanTransformer3DModel
    config = cls.load_config(pipeline, subfolder="transformer")
    with init_empty_weights():
        model = cls.from_config(config)
    state = plain_names(read_state(fetch(weights, weights.file), weights.entries))
    if weights.lora is not None:
        entries = [] if weights.lora_entry is None else [weights.lora_entry]
        lora = plain_names(read_state(fetch(weights, weights.lora), entries))
        merge_lora(state, lora, weights.lora_scale)
    fill(model, to_diffusers(state), dtype)
    return model.eval()


def fetch(weights: Weights, file: str) -> Path:
    """The file in the local folder or the hub's cache, or from the hub."""
    folder = Path(weights.path).expanduser()
    if folder.is_dir():
        if not (folder / file).is_file():
            raise DitcacheError(f"model.weights.file: {folder} has no {file}")
        return folder / file
    try:
        return Path(huggingface_hub.hf_hub_download(weights.path, file))
    except Exception as error:  # a hub can fail in many ways, each with its own exception
        raise DitcacheError(
            f"model.weights.path: cannot get {file} of {weights.path}, which is not in the local "
            f"cache ({first_line(error)[:120]}); set model.weights.path=<folder with {file}>"
        ) from error


def read_state(path: Path, entries: list[str]) -> State:
    """Tensors of a file by name; of a `.pt`, those in the first of `entries` that is there."""
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged files fail in many ways
        raise DitcacheError(f"model.weights: cannot read {path}: {first_line(error)}") from error
    if entries and path.suffix != ".safetensors":
        chosen = next((name for name in entries if name in content), None)
        if chosen is None:
            found = [str(name) for name in content][:SHOWN]
            raise DitcacheError(
                f"model.weights.entries: {path.name} has none of {', '.join(entries)}. "
                f"{one_of(entries[0], found)}"
            )
        content = content[chosen]
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        names = list(content)[:SHOWN] if isinstance(content, dict) else [type(content).__name__]
        raise DitcacheError(
            f"model.weights.entries: {path.name} is no state dict but holds "
            f"{', '.join(map(str, names))}; name the entry that is"
        )
    return content


def plain_names(state: State) -> State:
    """Without what FSDP, compile, checkpointing and trainers put before names."""
    names = {name: WRAPPERS.sub("", name) for name in state}
    return {names[name][prefix_of(names[name]) :]: tensor for name, tensor in state.items()}


def prefix_of(name: str) -> int:
    found = PREFIX.match(name)
    return found.end() if found else 0


def merge_lora(state: State, lora: State, scale: float) -> None:
    """W += scale B A, in fp32, for every pair in `lora`. Names are PEFT's, without prefix. Raises
    DitcacheError for what has no partner or no weight.
    """
    pairs: dict[str, State] = {}
    odd = []
    for name, tensor in lora.items():
        found = LORA.fullmatch(name)
        if found is None:
            odd.append(name)
        else:
            pairs.setdefault(found[1], {})[found[2]] = tensor
    odd += [name for name, pair in pairs.items() if len(pair) < 2 or f"{name}.weight" not in state]
    if odd or not pairs:
        raise DitcacheError(
            f"model.weights.lora: {len(odd)} of {len(lora)} names have no partner or no weight to "
            f"be added to: {some(odd)}"
        )
    for name, pair in pairs.items():
        weight = state[f"{name}.weight"]
        update = pair["B"].float() @ pair["A"].float()
        state[f"{name}.weight"] = (weight.float() + scale * update).to(weight.dtype)


def to_diffusers(state: State) -> State:
    """Names of Wan's own code -> diffusers'; those of diffusers stay."""
    if any(".attn1." in name for name in state):
        return state
    return convert_wan_transformer_to_diffusers(dict(state))


def fill(model: Any, state: State, dtype: torch.dtype) -> None:
    """Put the tensors in their places. Raises DitcacheError that lists what does not fit."""
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    wrong = [
        f"{name} {tuple(state[name].shape)} for {shape}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if missing or unexpected or wrong:
        lists = (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        found = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in lists if names)
        raise DitcacheError(
            f"model.weights: these are not the weights of {type(model).__name__} as model.path "
            f"describes it ({len(wanted)} tensors): {found}"
        )
    exact = model._keep_in_fp32_modules or []
    cast = {
        name: tensor.to(torch.float32 if any(part in exact for part in name.split(".")) else dtype)
        for name, tensor in state.items()
    }
    model.load_state_dict(cast, strict=True, assign=True)


def some(names: Iterable[str]) -> str:
    names = list(names)
    more = f", ... ({len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
