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
    CompactHydraException,
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ditcache.cli import conf_dir, fail, groups, options
from ditcache.errors import DitcacheError, one_of


def run_command(command: str, arguments: list[str], *, program: str | None = None) -> int:
    """Compose the command's configuration and run it; returns the exit code."""
    module = command.replace("-", "_")
    sys.argv = [program or f"ditcache {command}", *arguments]
    os.environ.setdefault(
        "HYDRA_FULL_ERROR", "1"
    )  # exceptions reach us instead of being printed by Hydra
    mistakes: list[DitcacheError] = []

    def task(cfg: DictConfig) -> float | None:
        try:
            with discarding_empty_run_folder():
                return import_module(f"ditcache.commands.{module}").run(cfg)
        except DitcacheError as error:
            if (
                HydraConfig.get().mode == RunMode.MULTIRUN
            ):  # tell the launcher, so that a sweep shows the failure
                job = HydraConfig.get().job.num
                raise CompactHydraException(f"job {job}: {error}") from None
            mistakes.append(error)
            return None

    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir().resolve()), config_name=module)(
            task
        )()
    except KeyboardInterrupt:
        print(f"ditcache {command}: interrupted; nothing unfinished was kept", file=sys.stderr)
        return 130
    except (HydraException, OmegaConfBaseException) as error:
        return fail(f"ditcache {command}: {explain(error)}")
    except OSError as error:
        if error.filename is None:
            raise
        return fail(f"ditcache {command}: cannot write {error.filename}: {error.strerror}")
    return fail(f"ditcache {command}: {mistakes[0]}") if mistakes else 0


@contextlib.contextmanager
def discarding_empty_run_folder() -> Iterator[None]:
    """After an error, take away the folder Hydra made if the command had not put anything into
    it.
    """
    try:
        yield
    except BaseException:
        folder = Path(HydraConfig.get().runtime.output_dir)
        if folder.is_dir() and all(
            x.name == ".hydra" or x.suffix == ".log" for x in folder.iterdir()
        ):
            shutil.rmtree(folder)
            with contextlib.suppress(
                OSError
            ):  # the first parent that holds something else ends this
                for parent in folder.parents:
                    parent.rmdir()
        raise


def explain(error: Exception) -> str:
    """One line for an error of Hydra or OmegaConf: path, what came, what is allowed, the nearest
    name.
    """
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


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
