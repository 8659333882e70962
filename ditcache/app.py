"""One Hydra application per command, and Hydra's errors as one line each."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ditcache.cli import conf_dir, fail, groups, options
from ditcache.errors import DitcacheError, Interrupted, first_line, one_of


class NoteFolders(Callback):
    """Hydra callback: remembers, before Hydra makes the output folder, what was there already."""

    first_existing: Path | None = None
    had_record = False
    sweep: Path | None = None

    def on_run_start(self, config: DictConfig, **kwargs: object) -> None:
        self.note(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        self.note(config.hydra.sweep.dir)
        NoteFolders.sweep = Path(config.hydra.sweep.dir)

    def note(self, folder: str) -> None:
        path = Path(os.path.abspath(folder))  # without `..`, as Hydra says it
        NoteFolders.first_existing = next(p for p in (path, *path.parents) if p.exists())
        NoteFolders.had_record = (path / ".hydra").exists()


def run_command(command: str, arguments: list[str], *, program: str | None = None) -> int:
    """Compose the command's configuration and run it; returns the exit code."""
    module = command.replace("-", "_")
    sys.argv = [program or f"ditcache {command}", *arguments]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let exceptions reach us
    mistakes: list[int] = []
    NoteFolders.sweep = None

    def task(cfg: DictConfig) -> float | None:
        try:
            with discarding_empty_run_folder():
                return import_module(f"ditcache.commands.{module}").run(cfg)
        except (DitcacheError, OSError) as error:
            hydra_config = HydraConfig.get()
            sweeping = hydra_config.mode == RunMode.MULTIRUN
            where = f"ditcache {command}: job {hydra_config.job.num}" if sweeping else ""
            fail(f"{where or f'ditcache {command}'}: {explain(error)}")
            mistakes.append(getattr(error, "exit_code", 2))
            if isinstance(error, Interrupted):
                raise KeyboardInterrupt from None
            if sweeping:  # so that the launcher counts it as failed; the other jobs still run
                raise
            return None

    try:
        conf = str(conf_dir().resolve())
        hydra.main(version_base="1.3", config_path=conf, config_name=module)(task)()
    except KeyboardInterrupt:
        if 130 not in mistakes:
            print(f"ditcache {command}: interrupted; what was finished is kept", file=sys.stderr)
        mistakes.append(130)
    except (DitcacheError, HydraException, OmegaConfBaseException, OSError) as error:
        if not mistakes:
            mistakes.append(fail(f"ditcache {command}: {explain(error)}"))
    if NoteFolders.sweep is not None:
        finish_sweep(module, NoteFolders.sweep)
    return max(mistakes) if mistakes else 0


def finish_sweep(module: str, folder: Path) -> None:
    """Let the command look at all finished jobs together, also after one has failed. (Hydra's
    on_multirun_end does not come then.)
    """
    after = getattr(import_module(f"ditcache.commands.{module}"), "after_sweep", None)
    if after is not None:
        after(folder)


@contextlib.contextmanager
def discarding_empty_run_folder() -> Iterator[None]:
    """Take away the folder made for this run if it holds no result, after an error or a plan."""
    folder, keep = Path(HydraConfig.get().runtime.output_dir), NoteFolders.first_existing
    try:
        yield
    except BaseException:
        if keep == folder and not NoteFolders.had_record:
            shutil.rmtree(folder / ".hydra", ignore_errors=True)
        raise
    finally:
        if keep != folder and {x.name for x in folder.iterdir()} <= {".hydra", "config.yaml"}:
            shutil.rmtree(folder)
            for parent in folder.parents:
                if keep is None or parent == keep or any(parent.iterdir()):
                    break
                parent.rmdir()


def explain(error: Exception) -> str:
    """One line for an error: path, what came, what is allowed, the nearest name."""
    if isinstance(error, OSError) and not isinstance(error, MissingConfigException):
        return f"cannot write {error.filename}: {error.strerror or first_line(error)}"
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if not group:
            return f"no configuration '{name}'"
        known = error.options or options(group)
        return f"{group}: no option '{name}'. {one_of(name, known)}"
    if isinstance(error, OverrideParseException):
        hint = "quote values with special characters twice"
        return f"cannot read '{error.override}': {first_line(error)} ({hint})"
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        return explain(cause)
    if (
        isinstance(error, OmegaConfBaseException)
        and error.full_key
        and error.parent_node is not None
    ):
        keys = [str(key) for key in error.parent_node if key != "hydra"]
        if str(error.key) not in keys:
            return f"{error.full_key}: no such key. {one_of(str(error.key), keys)}"
        return f"{error.full_key}: {first_line(error)}"
    text = first_line(error)
    for group in groups():
        if f"'{group}'" in text and "override" in text.lower():
            return f"{group}: {text}"
    return text
