"""A command's arguments as people type them -> as Hydra reads them. Standard library only.

An argument without `=` is a prompt. Prompts and paths are quoted here, so that commas, apostrophes,
brackets and accents need no second pair of quotes. Flags go first, then everything else in one run,
because argparse takes only one run of positional arguments.
"""

import re

from ditcache.errors import DitcacheError, one_of

OVERRIDE = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@:-]*=")
DELETION = re.compile(r"~[A-Za-z_][\w./@:-]*$")
TEXT_KEYS = ("prompt", "negative_prompt")
PATH_KEYS = (
    "image",
    "prompt_file",
    "model.path",
    "model.calibration",
    "cache.policy.calibration",
    "cache.low.policy.calibration",
    "bridge.path",
    "bridge.source_path",
    "data.path",
    "data.cache",
    "partner_path",
    "resume",
)
SPECIAL = re.compile(r"[^\w./\\:~@%+-]")  # what a path may hold and Hydra's grammar may not

SWITCHES = {
    "--run": "-r",
    "--multirun": "-m",
    "--resolve": "",
    "--hydra-help": "",
}
FLAGS_WITH_VALUE = {
    "--cfg": "-c",
    "--package": "-p",
    "--config-path": "-cp",
    "--config-name": "-cn",
    "--config-dir": "-cd",
    "--experimental-rerun": "",
    "--info": "-i",
}
CHOICES = {"--cfg": ("job", "hydra", "all"), "-c": ("job", "hydra", "all")}


def hydra_arguments(arguments: list[str]) -> list[str]:
    """Flags, then overrides, then `prompt=[...]` if there were free-standing prompts.

    Raises DitcacheError for a flag nobody knows and for prompts given in both ways.
    """
    flags: list[str] = []
    overrides: list[str] = []
    prompts: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("-"):
            flags += read_flag(argument, rest)
        elif argument.startswith("cache._target_="):  # short for a policy class of one's own
            overrides += ["cache=custom", argument.replace("cache.", "cache.policy.", 1)]
        elif argument.lstrip("+").startswith("bridge="):
            overrides += bridge_overrides(argument)
        elif argument.startswith("cache.low="):  # short for an option of its own
            overrides.append(f"+cache@{argument}")
        elif argument.startswith("cache.low."):  # says only what differs
            overrides.append(f"++{quoted_override(argument)}")
        elif argument.startswith("switch."):  # a chunk's own prompt
            key, _, text = argument.partition("=")
            overrides.append(f"++{key}={quote(strip_quotes(text))}")
        elif OVERRIDE.match(argument):
            overrides.append(quoted_override(argument))
        elif DELETION.match(argument):
            overrides.append(argument)
        else:
            prompts.append(argument)
    if prompts and any(override.startswith("prompt=") for override in overrides):
        raise DitcacheError(f"prompt: given twice, as prompt=... and as '{prompts[0]}'")
    if prompts:
        overrides.append(f"prompt=[{','.join(quote(prompt) for prompt in prompts)}]")
    return flags + overrides


def bridge_overrides(argument: str) -> list[str]:
    """`+bridge=<option>`, or `+bridge=<file>` short for the option `saved` with that path."""
    from ditcache.cli import options

    value = argument.partition("=")[2]
    if value in options("bridge"):
        return [f"+bridge={value}"]
    return ["+bridge=saved", quoted_override(f"bridge.path={value}")]


def read_flag(argument: str, rest) -> list[str]:  # type: ignore[no-untyped-def]
    """One flag with its value, which is taken from `rest` if it stands apart."""
    flag, attached, value = argument.partition("=")
    if flag in {*SWITCHES, *SWITCHES.values()} - {""}:
        return [argument]
    if flag not in {*FLAGS_WITH_VALUE, *FLAGS_WITH_VALUE.values()} - {""}:
        key = flag.lstrip("-").replace("-", "_")
        raise DitcacheError(
            f"no flag '{flag}'; a setting is written {key}=..., a prompt that begins with '-' as "
            f"prompt='...'. {one_of(flag, [*SWITCHES, *FLAGS_WITH_VALUE])}"
        )
    if not attached:
        value = next(rest, "")
    if not value:
        raise DitcacheError(f"{flag}: needs a value")
    if value not in CHOICES.get(flag, (value,)):
        raise DitcacheError(f"{flag}: no '{value}'. {one_of(value, CHOICES[flag])}")
    return [flag, value]


def quoted_override(argument: str) -> str:
    """The override with its value quoted where it is text or a path."""
    key, _, value = argument.partition("=")
    if is_quoted_list(value):
        return argument
    if key in TEXT_KEYS:
        return f"{key}={quote(strip_quotes(value))}"
    if key == "bridge.path" and value.startswith("["):  # several files
        files = (quote(strip_quotes(file.strip())) for file in value.strip("[]").split(","))
        return f"{key}=[{','.join(files)}]"
    if key in PATH_KEYS and SPECIAL.search(value) and not is_quoted(value):
        return f"{key}={quote(value)}"
    return argument


def is_quoted_list(value: str) -> bool:
    """Whether a value is several quoted texts: `['a','b']`, or `'a','b'` for a sweep."""
    one = r"""(?:'[^']*'|"[^"]*")"""
    return bool(re.fullmatch(rf"\[{one}(?:,\s*{one})*\]|{one}(?:,\s*{one})+", value))


def is_quoted(value: str) -> bool:
    """Whether a value stands in one pair of quotes that does not occur inside."""
    return len(value) > 1 and value[0] in "'\"" and value.find(value[0], 1) == len(value) - 1


def strip_quotes(value: str) -> str:
    """Undo the second pair of quotes of somebody who knows Hydra."""
    return value[1:-1] if is_quoted(value) else value


def quote(text: str) -> str:
    """Any text as one quoted Hydra value that OmegaConf will not interpolate."""
    text = escape_interpolation(text)
    text = re.sub(r"(\\+)('|$)", lambda m: m[1] * 2 + m[2], text)
    return "'" + text.replace("'", r"\'") + "'"


def escape_interpolation(text: str) -> str:
    """`${` as OmegaConf wants it where no interpolation is meant."""
    return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", text)
