"""cache-dit put on a transformer and taken off without leaving anything behind.

It is used the way its manual gives for a loop of one's own: `enable_cache(transformer)`, branches
told apart by call order. Its context is made anew by every `enable_cache`, so one attachment per
video is one fresh context per video. `disable_cache` leaves an attribute on the instance and one on
a class of its own; both are removed here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bench.state import bytes_of

CALIBRATORS = ("taylorseer1", "taylorseer2", "foca", "dmd")


def library() -> Any:
    """The package, imported quietly."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cache_dit
    return cache_dit


def is_there() -> bool:
    try:
        library()
    except ImportError:
        return False
    return True


@contextmanager
def attached(transformer: Any, settings: dict[str, Any]) -> Iterator[Callable[[], int | None]]:
    cache_dit = library()
    forward = vars(transformer).get("forward")
    configs = {"cache_config": config_of(settings), "calibrator_config": calibrator_of(settings)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache_dit.enable_cache(transformer, **configs)
        contexts = transformer._context_manager._cached_context_manager
        try:
            yield lambda: bytes_of(contexts)
        finally:
            cache_dit.disable_cache(transformer)
            restore(transformer, forward)


def config_of(settings: dict[str, Any]) -> Any:
    """Fn, Bn, warmup, threshold, max_run, mask (a string of 0 and 1), mask_policy, steps."""
    known = {
        "Fn": "Fn_compute_blocks",
        "Bn": "Bn_compute_blocks",
        "warmup": "max_warmup_steps",
        "threshold": "residual_diff_threshold",
        "max_run": "max_continuous_cached_steps",
        "steps": "num_inference_steps",
        "mask_policy": "steps_computation_policy",
    }
    fields = {known[key]: value for key, value in settings.items() if key in known}
    if "mask" in settings:
        fields["steps_computation_mask"] = [int(digit) for digit in settings["mask"]]
        fields["num_inference_steps"] = len(settings["mask"])
    return library().DBCacheConfig(enable_separate_cfg=True, **fields)


def calibrator_of(settings: dict[str, Any]) -> Any:
    name, library_ = settings.get("calibrator"), library()
    only_hidden = {"enable_encoder_calibrator": False}  # Wan's blocks return nothing else
    if name is None:
        return None
    if name.startswith("taylorseer"):
        return library_.TaylorSeerCalibratorConfig(taylorseer_order=int(name[-1]), **only_hidden)
    kinds = {"foca": library_.FoCaCalibratorConfig, "dmd": library_.DMDCalibratorConfig}
    return kinds[name](**only_hidden)


def restore(transformer: Any, forward: Any) -> None:
    """Remove what `disable_cache` leaves: a forward on the instance, a mark on a class."""
    from cache_dit.caching.block_adapters.block_adapters import FakeDiffusionPipeline

    vars(transformer).pop("forward", None)
    if forward is not None:
        transformer.forward = forward
    if "_is_cached" in vars(FakeDiffusionPipeline):
        del FakeDiffusionPipeline._is_cached
