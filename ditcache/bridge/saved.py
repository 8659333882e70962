"""Trained projectors as one safetensors file, with what they were trained between.

`read_header` needs no torch, so that a wrong file is refused before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from ditcache.bridge.partner import model_option
from ditcache.bridge.projectors.base import Projector, Shape
from ditcache.config import build
from ditcache.errors import ConfigError, DitcacheError, first_line

if TYPE_CHECKING:
    from torch import nn

    from ditcache.bridge.nets import Net
    from ditcache.models.base import Bundle

FORMAT = "ditcache bridge 1"
ZOO = Path(__file__).parent.parent / "zoo" / "bridges"  # trained between embedded models


@dataclass(frozen=True)
class End:
    """One of the two models. model: its option in conf/model; path: its weights; fingerprint: of
    its transformer; shape: of its self-attention.
    """

    model: str
    path: str
    fingerprint: str
    shape: Shape


def end_of(bundle: Bundle) -> End:
    """A loaded model's."""
    from ditcache.bridge.capture import shape_of
    from ditcache.bridge.fingerprint import fingerprint

    model, transformer = bundle.model, bundle.pipe.transformer
    return End(model_option(model), model.path, fingerprint(transformer), shape_of(transformer))


@dataclass(frozen=True)
class Header:
    """ends: `wan` and `chrono`. ways: target sides there are projectors into. projector: its
    settings. steps: of training.
    """

    ends: dict[str, End]
    ways: tuple[str, ...]
    projector: Projector
    steps: int

    def side_of(self, fingerprint: str) -> str | None:
        """The side whose weights these are."""
        found = [side for side, end in self.ends.items() if end.fingerprint == fingerprint]
        return found[0] if found else None


def locate(path: str) -> Path:
    """`zoo:<name>` or a file. Raises ConfigError."""
    if path.startswith("zoo:"):
        names = sorted(file.stem for file in ZOO.glob("*.safetensors"))
        if path[4:] not in names:
            allowed = ", ".join(f"zoo:{name}" for name in names)
            raise ConfigError(f"bridge.path: there is no '{path}'. One of: {allowed}")
        return ZOO / f"{path[4:]}.safetensors"
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "bridge.safetensors"
    if not file.is_file():
        raise ConfigError(f"bridge.path: no file '{file}'; ditcache bridge-train writes one")
    return file


def read_header(path: Path) -> Header:
    """Raises ConfigError for a file that is no bridge."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > 100_000_000:
                raise ValueError("no safetensors file")
            about = json.loads(file.read(size)).get("__metadata__", {}).get("ditcache")
        about = json.loads(about or "{}")
        if about.get("format") != FORMAT:
            raise ValueError(f"its format is not '{FORMAT}'")
        ends = {
            side: End(**{**end, "shape": Shape(**end["shape"])})
            for side, end in about["ends"].items()
        }
        node = OmegaConf.create({"projector": about["projector"]})
        projector = build(node, "projector", Projector)
        return Header(ends, tuple(about["ways"]), projector, int(about["steps"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ConfigError(f"bridge.path: {path} holds no bridge ({first_line(error)})") from None


def describe(projector: Projector) -> dict[str, Any]:
    """A projector's settings as its YAML would hold them."""
    cls = type(projector)
    return {"_target_": f"{cls.__module__}.{cls.__qualname__}", **dataclasses.asdict(projector)}


def save_bridge(path: Path, header: Header, nets: dict[str, Net]) -> None:
    """nets: target side -> projector. The file appears only when it is complete."""
    from safetensors.torch import save_file

    from ditcache.files import complete_file

    about = {
        "format": FORMAT,
        "ends": {side: dataclasses.asdict(end) for side, end in header.ends.items()},
        "ways": list(header.ways),
        "projector": describe(header.projector),
        "steps": header.steps,
    }
    tensors = {
        f"{side}.{name}": tensor.detach().cpu().contiguous()
        for side, net in nets.items()
        for name, tensor in net.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(path) as partial:
        save_file(tensors, partial, {"ditcache": json.dumps(about)})


def load_net(path: Path, header: Header, way: str, source: nn.Module, target: nn.Module) -> Net:
    """The projector into side `way`. Raises DitcacheError if it was trained between other weights.

    Reads nothing but tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ditcache.bridge.capture import shape_of
    from ditcache.bridge.fingerprint import fingerprint

    if way not in header.ways:
        raise DitcacheError(
            f"bridge.path: {path} has a projector into {' and '.join(header.ways)}, none into {way}"
        )
    (other,) = (side for side in header.ends if side != way)
    for side, transformer in ((way, target), (other, source)):
        end, found = header.ends[side], fingerprint(transformer)
        if end.fingerprint != found:
            raise DitcacheError(
                f"bridge.path: {path} was trained with {end.path} as {side} (fingerprint "
                f"{end.fingerprint}), these weights are others ({found})"
            )
    net = header.projector.make(shape_of(source), shape_of(target))
    try:
        state = load_file(path)
        own = {k.removeprefix(f"{way}."): v for k, v in state.items() if k.startswith(f"{way}.")}
        net.load_state_dict(own)
    except (SafetensorError, RuntimeError) as error:
        raise DitcacheError(f"bridge.path: {path} is damaged: {first_line(error)}") from None
    return net.requires_grad_(False).eval()
