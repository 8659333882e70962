"""The exceptions a user may see. Each is one line; the command line prints it without a traceback
and exits with 2, unless the error says otherwise.
"""

from collections.abc import Iterable


class DitcacheError(Exception):
    """Something the user can mend: a wrong value, a missing file, a model that is not there.

    exit_code: of the command line.
    """

    exit_code = 2


class ConfigError(DitcacheError):
    """A wrong value in the configuration; the message starts with its path, as in
    `cache.policy.every: ...`.
    """


class GateFailed(DitcacheError):
    """Everything ran, and what it came to is not what was asked for."""

    exit_code = 1


class Interrupted(DitcacheError):
    """Ctrl-C in the middle of something that can go on later; the message says how."""

    exit_code = 130


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the nearest allowed name, or nothing if none is near."""
    from difflib import get_close_matches

    near = get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def one_of(word: str, allowed: Iterable[str]) -> str:
    """ "Did you mean ...? One of: ..." for messages about an unknown name."""
    names = sorted(allowed)
    return f"{did_you_mean(word, names)} One of: {', '.join(names)}".strip()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
