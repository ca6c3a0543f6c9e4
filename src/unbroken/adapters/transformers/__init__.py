"""The Hugging Face `Trainer`, whose runs resume bit for bit.

    from unbroken.adapters.transformers import Trainer  # in place of transformers' own

Everything else in a script stays as it is.
"""

from unbroken.adapters.transformers.trainer import require_supported_version

require_supported_version()

from unbroken.adapters.transformers.trainer import Trainer as Trainer  # noqa: E402

__all__ = ["Trainer"]
