"""What the process holds that fresh ones are forked from: modules, and nothing that training does.

Frozen: what the garbage collector need not look at stays shared with the forks, too. Without that
each would go through a million objects of torch's whenever somebody asks it for all objects.
"""

from __future__ import annotations

import gc
import os

import torch._dynamo  # each optimizer imports it
import torch.distributed.checkpoint  # DistributedDataParallel imports it
import torch.distributed.elastic.agent.server  # noqa: F401

import scenarios  # noqa: F401
import unbroken.testing.failing_storage  # noqa: F401

os.environ["PYTHONPATH"] = os.environ.pop("PYTHONPATH_OF_FRESH")
if not os.environ["PYTHONPATH"]:
    del os.environ["PYTHONPATH"]
gc.freeze()
