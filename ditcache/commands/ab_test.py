"""`ditcache ab-test`: is this cache worth it, for this model, on these prompts."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ditcache.ab.settings import AbTestSettings
from ditcache.cache.settings import with_low
from ditcache.config import build
from ditcache.errors import GateFailed

if TYPE_CHECKING:
    from ditcache.report.progress import OnStep


DIFFERS = (
    "A bridge is meant to change the video: PSNR and SSIM say how far b and its controls are from "
    "a, not how good they are. The blocks of sources count as computed."
)


def run(cfg: DictConfig) -> float | None:
    """One job. Returns b's median denoising speed-up."""
    # 1) Check everything that can be checked without weights.
    settings = build(filled(cfg), "", AbTestSettings)
    settings.model.check_folder()
    if settings.search.asked:
        from ditcache.ab.search import check

        check(settings, cfg)

    # 2) Load, see that both caches fit the model, then open the run folder.
    from ditcache.report.progress import progress
    from ditcache.report.run_folder import chosen_options, open_run_folder

    with progress(steps_of(settings)) as show, closing(settings.store) as store:
        from ditcache.ab.collect import report_of
        from ditcache.ab.gate import judge
        from ditcache.ab.summary import print_report, write_report

        runner = make_runner(settings, show)
        names = names_of(cfg, chosen_options())
        folder = open_run_folder(OmegaConf.to_yaml(cfg, resolve=True))
        store.open(folder)

        # 3) Search, if asked: compared is then what was found, on the cases it has not seen.
        found = None
        if settings.search.asked:
            from ditcache.ab.search import search

            found = search(runner, folder, cfg)
            settings = runner.settings = replace_candidate(settings, found)

        # 4) Every case: a and b in turns, the controls, metrics, videos.
        entries = compare(runner, folder)

    # 5) The report in three forms, the table, the verdict.
    notes = [*runner.notes, *([] if found is None else found.notes)]
    if runner.renderer.bridging is not None:
        notes += [DIFFERS, *runner.renderer.bridging.notes]
        if not any(case.other for case in settings.cases):
            notes.append("There is no shuffled source: that takes another prompt.")
    report = report_of(settings, cfg, names, runner.bundle.device, entries, notes)
    if found is not None:
        report["search"] = found.verdict(report)
        report["notes"].append(report["search"]["text"])
        report["difference"] += found.difference()
    report["gate"] = judge(settings.gate, report)
    write_report(folder, report)
    print_report(folder, report)
    if report["gate"] is not None and not report["gate"]["passed"]:
        missed = [reason for reason in report["gate"]["reasons"] if "missed" in reason]
        raise GateFailed(f"gate: {'; '.join(missed)}")
    return next(row for row in report["rows"] if row["kind"] == "b")["speedup"]["median"]


def filled(cfg: DictConfig) -> DictConfig:
    """With each cache's settings for the low-noise expert filled up from its others."""
    for name in ("cache", "a", "b"):
        if cfg.get(name) is not None:
            cfg = with_low(cfg, name)
    return cfg


def names_of(cfg: DictConfig, chosen: dict[str, str]) -> dict[str, str]:
    """The options chosen for model, a and b; told apart where both are the same."""
    a = chosen.get("cache@a", "none")
    b = chosen.get("cache@b") if cfg.get("b") is not None else chosen.get("cache")
    b = str(b)
    if cfg.get("bridge") is not None:
        b = "bridge" if b == "none" else f"{b} + bridge"
    return {"model": chosen["model"], "a": a, "b": f"{b} (b)" if a == b != "none" else b}


def steps_of(settings: AbTestSettings) -> int:
    """Denoising steps to expect, for the progress bar."""
    cases, controls = len(settings.cases), min(settings.controls, len(settings.cases))
    searched = (1 + settings.search.trials) * cases // 2 if settings.search.asked else 0
    mixes = 0 if settings.bridge is None else 8  # at most
    return settings.segments * settings.steps * (2 * cases + (2 + mixes) * controls + searched)


def make_runner(settings: AbTestSettings, show: OnStep) -> Any:
    from ditcache.ab.results import Archive
    from ditcache.ab.runs import Runner
    from ditcache.cache.attach import check_fit
    from ditcache.models.load import load_once
    from ditcache.pipeline.render import Renderer
    from ditcache.pipeline.settings import check_bundle

    bundle = load_once(settings.model)
    check_bundle(bundle, settings)
    for cache in (settings.a, settings.candidate):
        check_fit(bundle, cache)
    renderer = Renderer(bundle, settings, show)
    if settings.bridge is not None:
        from ditcache.bridge.generate import Bridging

        renderer.bridging = Bridging(settings.bridge, bundle, settings.num_frames)
        renderer.bridging.load_controls()
    renderer.warm_up()
    archive = Archive(Path(settings.baseline.folder).expanduser())
    return Runner(bundle, settings, renderer, archive, settings.baseline.refresh)


def replace_candidate(settings: AbTestSettings, found: Any) -> AbTestSettings:
    """b as the search found it, on the cases held out, numbered anew: arms take turns by it."""
    changed = replace(settings, b=found.cache)
    changed.cases = [replace(case, index=index) for index, case in enumerate(found.held_out)]
    return changed


def compare(runner: Any, folder: Path) -> list[dict[str, Any]]:
    """All cases' entries. An interruption says how to go on."""
    from ditcache.ab.cases import entry_of
    from ditcache.errors import Interrupted

    entries: list[dict[str, Any]] = []
    try:
        for case in runner.settings.cases:
            entries.append(entry_of(folder, runner, case))
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted after {len(entries)} of {len(runner.settings.cases)} cases; the same "
            f"command with hydra.run.dir={folder} goes on from there"
        ) from None
    return entries


def after_sweep(folder: Path) -> None:
    """One table, CSV and page over all jobs of a sweep."""
    from ditcache.ab.sweep import collect

    collect(folder)
