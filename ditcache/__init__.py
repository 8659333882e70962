"""Caching for video diffusion transformers. Names are imported on first use, so that importing this
package is free.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "enable_cache": "ditcache.cache.attach",
    "disable_cache": "ditcache.cache.attach",
    "register_policy": "ditcache.cache.policies.base",
    "load": "ditcache.models.load",
    "WanChronoEditBridge": "ditcache.bridge.facade",
}

__all__ = [
    "WanChronoEditBridge",
    "__version__",
    "disable_cache",
    "enable_cache",
    "load",
    "register_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ditcache' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
