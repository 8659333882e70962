"""`ditcache <command> ...`: finds the command and hands the rest to its Hydra application.

Standard library only, so that `--help` and a mistyped command answer at once.
"""

import os
import re
import sys
from pathlib import Path

from ditcache import __version__
from ditcache.arguments import hydra_arguments
from ditcache.errors import DitcacheError, one_of


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Answer one command line; returns the exit code (0 done, 1 a failed gate or a bug, 2 bad
    input).
    """
    if arguments[:1] in (["-sc"], ["--shell-completion"]):
        return complete(arguments)
    word, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if word in ("--help", "-h", "help"):
        print(overview())
        return 0
    if word in ("--version", "-V"):
        print(f"ditcache {__version__}")
        return 0
    if word not in commands():
        return fail(f"ditcache: no command '{word}'. {one_of(word, commands())}")
    if "--help" in rest or "-h" in rest:
        print(command_help(word))
        return 0
    for argument in rest:
        group, _, value = argument.partition("=")
        if value in ("null", "") and group in groups():
            return fail(f"ditcache {word}: {group}: needs a name. {one_of('none', options(group))}")
    try:
        passed = hydra_arguments(rest)
    except DitcacheError as error:
        return fail(f"ditcache {word}: {error}")
    from ditcache.app import run_command

    return run_command(word, passed)


def fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def conf_dir() -> Path:
    """The folder of YAML: inside an installed package, or beside it in a checkout."""
    packaged = Path(__file__).parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "conf"


def commands() -> dict[str, str]:
    """Command word -> its summary, the first line of its primary YAML."""
    names = sorted(path.stem for path in (Path(__file__).parent / "commands").glob("[a-z]*.py"))
    return {name.replace("_", "-"): header(conf_dir() / f"{name}.yaml")[0] for name in names}


def groups() -> list[str]:
    """Config groups, nested ones as `cache/forecaster`; `hydra` is Hydra's own, `calibration` holds
    data that models name.
    """
    folders = (
        path.relative_to(conf_dir()).as_posix() for path in conf_dir().rglob("*") if path.is_dir()
    )
    return sorted(name for name in folders if name.split("/")[0] not in ("hydra", "calibration"))


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def header(path: Path) -> list[str]:
    """The comment at the head of a YAML file, without the marks."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return lines or [""]


def overview() -> str:
    lines = [
        "ditcache: caching for video diffusion transformers",
        "",
        "usage: ditcache <command> [key=value ...]",
        "",
    ]
    lines += [f"  {name:<12} {summary}" for name, summary in commands().items()]
    lines += ["", "  ditcache <command> --help      its config groups and keys"]
    lines += ["  ditcache <command> --cfg job   the whole configuration it would run with"]
    lines += [
        '  eval "$(ditcache -sc install=bash)"   completion for this shell (bash, zsh or fish)'
    ]
    return "\n".join(lines)


def command_help(command: str) -> str:
    primary = conf_dir() / f"{command.replace('-', '_')}.yaml"
    text = primary.read_text(encoding="utf-8")
    renders = "\n  - sampling" in text
    prompts = "[prompt ...] " if renders else ""
    lines = [f"usage: ditcache {command} {prompts}[group=option ...] [key=value ...] [-m]", ""]
    lines += [*header(primary), "", "config groups (group=option):"]
    used = re.findall(r"^  - (\w+):", text, re.M)
    lines += [
        f"  {group:<18} {', '.join(options(group))}"
        for group in groups()
        if group.split("/")[0] in used and options(group)
    ]
    lines += ["", "keys:"]
    shared = (conf_dir() / "sampling.yaml").read_text(encoding="utf-8") if renders else ""
    lines += [f"  {key:<22} {text}" for key, text in keys_of(shared + text)]
    lines += [
        "",
        "flags: --cfg job (show the configuration), -m (sweep over comma-separated values),",
    ]
    lines += ["       --config-dir FOLDER (own YAML beside ours), --info searchpath"]
    return "\n".join(lines)


def keys_of(text: str) -> list[tuple[str, str]]:
    """Keys of a primary YAML, nested ones as `gate.min_psnr`, each with its comment or value."""
    found, parent = [], ""
    for indent, key, value, comment in re.findall(
        r"^( {0,2})(\w+): *([^#\n]*?)? *(?:# *(.*))?$", text, re.M
    ):
        parent = parent if indent else key
        if parent in ("defaults", "hydra") or not (value or comment):
            continue
        found.append((f"{parent}.{key}" if indent else key, comment or value))
    return found


def complete(arguments: list[str]) -> int:
    """Answer the shell: command words ourselves, everything after them by Hydra."""
    from ditcache.app import run_command

    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if "query" not in arguments[-1]:
        return run_command("generate", arguments, program="ditcache")
    if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
        print("\n".join(name for name in commands() if name.startswith("".join(words[1:]))))
        return 0
    if words[1] in commands():
        os.environ["COMP_LINE"] = line.replace(words[1], "", 1)
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
        return run_command(words[1], arguments, program="ditcache")
    return 0
