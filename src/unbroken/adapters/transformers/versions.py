"""Which versions of transformers this adapter fits."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from unbroken.errors import ConfigError

OLDEST = "5.3.0"
"""The first version whose training loop has the hooks that are used here."""

NEWEST_TESTED = "5.23.0"


def require_supported_version(found: str | None = None) -> None:
    """Raise unless this adapter knows the training loop of the transformers that is installed.

    Args:
        found: The version; None: of the one that is installed.

    Raises:
        ConfigError: It is older than 5.3.0, or of another major version than 5.

    Example:
        >>> require_supported_version("5.4.0")
    """
    found = _installed() if found is None else found
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
    oldest = tuple(int(part) for part in OLDEST.split(".")[:2])
    if numbers[:1] != oldest[:1] or numbers < oldest:
        raise ConfigError(
            "transformers",
            "its training loop is not known to this version of unbroken",
            expected=f"{OLDEST} to 5.x (tested up to {NEWEST_TESTED})",
            found=found,
            hint="install a version that is, or use transformers' own Trainer",
        )


def _installed() -> str:
    try:
        return version("transformers")
    except PackageNotFoundError:
        hint = "pip install 'unbroken[transformers]'"
        raise ConfigError("transformers", "is not installed", hint=hint) from None
