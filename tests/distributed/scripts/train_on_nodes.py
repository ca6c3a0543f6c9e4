"""Started by torchrun on two nodes: trains; at step 5 the second node is lost as a whole."""

import json
import os
import signal
import sys
from pathlib import Path

from distributed.training import make_trainer
from unbroken.distributed import join
from unbroken.training import Callback


class LoseNode(Callback):
    """Kills the launcher of a node, and then its only rank."""

    def on_micro_batch_end(self, trainer) -> None:
        if trainer.progress.step == 4:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


folder, node, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
group = join(timeout=20.0)
with (folder / "worlds").open("a") as file:
    file.write(f"{group.world_size}\n" if group.rank == 0 else "")
callbacks = [LoseNode()] if node == "second" else []
trainer = make_trainer(str(folder / "run"), settings, callbacks=callbacks, group=group)
trainer.checkpointer.objects["callbacks"] = {}
trainer.train()
group.close()
os._exit(0)
