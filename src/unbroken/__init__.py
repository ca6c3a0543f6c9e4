"""unbroken: a training run killed at any moment and started again is the same run, bit for bit.

The public names are loaded when first used (PEP 562), so that `import unbroken` and the
commands that only look at files do not pay for importing torch.
"""

from __future__ import annotations

__version__ = "0.1.0"
