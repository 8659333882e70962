"""A whole bridge-train run: clips, one training per direction and seed, files, verdict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ditcache.bridge.capture import shape_of
from ditcache.bridge.controls_file import controls_path, save_controls
from ditcache.bridge.evaluate import TARGET, Row, losses_of, measure_costs, untrained
from ditcache.bridge.fingerprint import fingerprint
from ditcache.bridge.pair import Pair, shift_of
from ditcache.bridge.refuse import check_bundles, check_frames
from ditcache.bridge.samples import Samples, save_samples
from ditcache.bridge.sampling import Sampling
from ditcache.bridge.saved import Header, end_of, save_bridge
from ditcache.bridge.students import Bridged, LowRankUpdate, Router, Student
from ditcache.bridge.train import History, Recipe, train
from ditcache.bridge.verdict import Losses, judge
from ditcache.bridge.videos import judge_videos
from ditcache.errors import Interrupted
from ditcache.models.base import Bundle
from ditcache.report.bridge import write_bridge_report, write_losses, write_videos

if TYPE_CHECKING:
    from ditcache.bridge.nets import Net
    from ditcache.commands.bridge_train import BridgeTrainSettings

BRIDGE = "bridge"


class Course:
    """ways: (target side, source side) there are projectors for, in the order they are trained."""

    def __init__(
        self, settings: BridgeTrainSettings, bundles: dict[str, Bundle], accelerator: Accelerator
    ):
        self.settings, self.bundles, self.accelerator = settings, bundles, accelerator
        self.transformers = {side: b.pipe.transformer for side, b in bundles.items()}
        check_bundles(bundles["wan"], bundles["chrono"])
        latent_frames = (settings.num_frames - 1) // 4 + 1
        if settings.fusion.source_frames != "ends":
            check_frames(latent_frames, settings.fusion, *self.transformers.values())
        self.ways = list(settings.fusion.sources.items())
        for target, source in self.ways:  # parameters are counted before anything is encoded
            net = self.make_net(target, source)
            if accelerator.is_main_process:
                print(f"projector into {target}: {net.num_parameters:,} parameters")
        self.nets: dict[str, Net] = {}
        self.runs: dict[str, list[dict[str, Student]]] = {way: [] for way, _ in self.ways}
        self.histories: dict[str, History] = {}
        if settings.gradient_checkpointing:
            for transformer in self.transformers.values():
                transformer.enable_gradient_checkpointing()

    def make_net(self, target: str, source: str) -> Net:
        shapes = (shape_of(self.transformers[source]), shape_of(self.transformers[target]))
        return self.settings.projector.make(*shapes)

    def prepare(self, folder: Path) -> None:
        """Encode the clips, once for all processes."""
        from ditcache.commands.bridge_train import resumed

        s = self.settings
        self.folder = folder
        self.checkpoints = folder if s.resume is None else resumed(s.resume)
        size = {"height": s.height, "width": s.width, "num_frames": s.num_frames}
        with self.accelerator.main_process_first():
            self.samples: Samples = s.data.prepare(self.bundles, **size)
        if self.accelerator.is_main_process:
            models = {side: fingerprint(x) for side, x in self.transformers.items()}
            save_samples(self.samples, folder / "clips.safetensors", models)

    def train(self) -> None:
        """Every direction, every seed. Raises Interrupted with how to go on."""
        s = self.settings
        total = s.steps * s.seeds * len(self.ways)
        try:
            with self.bar("training", total) as tick:
                for target, source in self.ways:
                    for number in range(s.seeds):
                        self.train_one(target, source, s.seed + number, tick)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; the same command with resume={self.checkpoints} goes on"
            ) from None

    def train_one(self, target: str, source: str, seed: int, tick: Any) -> None:
        s = self.settings
        pair = Pair(self.samples, self.transformers, target, source)
        torch.manual_seed(seed)
        students = self.students(pair, target, source)
        name = f"{target}-{seed}"
        recipe = Recipe(
            steps=s.steps,
            batch_size=s.batch_size,
            learning_rate=s.learning_rate,
            weight_decay=s.weight_decay,
            shift=shift_of(self.bundles[target].pipe.scheduler),
            seed=seed,
            preservation=s.preservation,
            own_domain=s.data.own_domain(target),
            max_lag=s.max_lag,
            source_dropout=s.source_dropout,
            caption_dropout=s.caption_dropout,
            save_every=s.save_every,
            digest=self.digest(name),
        )
        checkpoint = self.checkpoints / f"checkpoint-{name}.pt"
        fusion = self.settings.fusion
        for student in students.values():
            student.to(pair.device)
        trained = {k: v for k, v in students.items() if v.num_parameters}
        with pair.opened():
            if trained:
                self.histories[name] = train(
                    self.accelerator, pair, trained, fusion, recipe, checkpoint, tick
                )
        self.runs[target].append(students)
        bridge = students[BRIDGE]
        assert isinstance(bridge, Bridged)
        self.nets.setdefault(target, bridge.net)  # the first seed's is the one that is kept

    def students(self, pair: Pair, target: str, source: str) -> dict[str, Student]:
        """The projector, and with `evaluate` its controls, each with fresh weights."""
        s, fusion = self.settings, self.settings.fusion
        net = self.make_net(target, source)
        found: dict[str, Student] = {BRIDGE: Bridged(net, fusion)}
        if not s.evaluate:
            return found
        if "self" in s.controls and not s.projector.own_is_target:
            found["self"] = Bridged(self.make_net(target, source), fusion, "self")
        if "shuffled" in s.controls:
            found["shuffled"] = Bridged(self.make_net(target, source), fusion, "shuffled")
        if "router" in s.controls:
            found["router"] = Router(self.samples.latents.shape[1])
        if "lora" in s.controls and net.num_parameters:
            rank = LowRankUpdate.rank_for(pair.target, net.num_parameters)
            found["lora"] = LowRankUpdate(pair.target, rank)
        return found

    def digest(self, name: str) -> str:
        """Of everything that a checkpoint depends on."""
        s = self.settings
        parts = {
            key: repr(getattr(s, key))
            for key in vars(s)
            if key not in ("resume", "seeds", "save_every", "max_harm", "videos")
        }
        parts |= {side: fingerprint(x) for side, x in self.transformers.items()} | {"run": name}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def finish(self) -> None:
        """Save the projector, draw the losses, judge."""
        if not self.accelerator.is_main_process:
            return
        s = self.settings
        ends = {side: end_of(bundle) for side, bundle in self.bundles.items()}
        header = Header(ends, tuple(way for way, _ in self.ways), s.projector, s.steps)
        path = self.folder / "bridge.safetensors"
        save_bridge(path, header, self.nets)
        write_losses(self.folder, self.histories)
        for target, source in self.ways:
            pair = Pair(self.samples, self.transformers, target, source)
            with pair.opened():
                self.judge(pair, target, path)
        print(f"wrote {path}")

    def judge(self, pair: Pair, target: str, path: Path) -> None:
        """Held-out losses of everything, the verdict, and videos. path: of the saved bridge, beside
        which its controls are kept.
        """
        s, fusion, autocast = self.settings, self.settings.fusion, self.accelerator.autocast
        runs = self.runs[target]
        if not s.evaluate:  # the same projector with the wrong source, instead of trained controls
            net = self.nets[target]
            runs = [{BRIDGE: Bridged(net, fusion), "shuffled": Bridged(net, fusion, "shuffled")}]
            if not s.projector.own_is_target:
                runs[0]["self"] = Bridged(net, fusion, "self")
        trained = {f"{i}|{k}": v for i, run in enumerate(runs) for k, v in run.items()}
        with self.bar("judging", 0) as tick:
            chosen = untrained(pair, fusion, autocast, tick, mixed=s.evaluate)
            picked = {name: setting for name, (_, setting) in chosen.items()}
            students = {**{name: student for name, (student, _) in chosen.items()}, **trained}
            losses = losses_of(pair, students, fusion, "test", autocast, tick)
        first = {k: student for k, student in students.items() if "|" not in k or k[0] == "0"}
        costs = measure_costs(pair, first, fusion, autocast)
        rows = [
            Row(
                name,
                losses[name],
                student.forwards,
                student.num_parameters,
                picked.get(name, ""),
                costs.get(name),
            )
            for name, student in students.items()
        ]
        test = self.samples.rows("test")
        domain = [self.samples.domains[int(i)] for i in self.samples.domain[test]]
        judged = [
            Losses(
                losses[f"{i}|{BRIDGE}"].tolist(),
                losses[TARGET].tolist(),
                {
                    **({"self": losses[TARGET].tolist()} if s.projector.own_is_target else {}),
                    **{k: losses[f"{i}|{k}"].tolist() for k in run if k != BRIDGE},
                },
                [n for n, d in enumerate(domain) if d == s.data.own_domain(target)],
                [n for n, d in enumerate(domain) if d == "composite"],
            )
            for i, run in enumerate(runs)
        ]
        verdicts = judge(judged, s.max_harm)
        if s.evaluate:
            kept = {name.removeprefix("0|"): student for name, student in first.items()}
            save_controls(controls_path(path, target), path, kept, verdicts)
        write_bridge_report(self.folder, target, rows, domain, judged, verdicts, s)
        if s.videos:
            self.watch(pair, target, students)

    def watch(self, pair: Pair, target: str, students: dict[str, Student]) -> None:
        """Whole videos of every method, read back."""
        s, model = self.settings, self.bundles[target].model
        shift = shift_of(self.bundles[target].pipe.scheduler)
        sampling = Sampling(model.steps, model.shift or shift, model.guidance)
        with self.bar("rendering", 0) as tick:
            found, sheet = judge_videos(
                pair,
                self.bundles[target],
                students,
                s.data,
                s.fusion,
                sampling,
                count=s.videos,
                autocast=self.accelerator.autocast,
                on_part=tick,
            )
        if not found:
            print("videos: fewer than two clips are held out; none was rendered")
            return
        write_videos(self.folder, target, found, sheet)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Any]:
        """A progress bar on a terminal; silent elsewhere. Yields what to call at each step."""
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        silent = not console.is_terminal or not self.accelerator.is_main_process
        with Progress(*columns, console=console, transient=True, disable=silent) as progress:
            task = progress.add_task(what, total=total or None, loss="")

            def tick(step: int = 0, losses: Any = None) -> None:
                shown = f"loss {losses[BRIDGE]:.3f}" if losses and BRIDGE in losses else ""
                progress.update(task, advance=1, loss=shown)

            yield tick


def fresh_accelerator(mixed_precision: str, *, cpu: bool) -> Accelerator:
    """Accelerate keeps one state per process, which the jobs of a sweep may set differently.
    mixed_precision: `auto` is none on a CPU, where autocast costs more time than it saves.
    """
    if mixed_precision == "auto":
        mixed_precision = "no" if cpu else "bf16"
    AcceleratorState._reset_state()
    return Accelerator(cpu=cpu, mixed_precision=mixed_precision)
