"""Started by torchrun: trains, and at each of the first starts a rank is killed at random."""

import json
import os
import random
import sys

from distributed.training import make_trainer

folder, settings, deaths = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
start, world_size = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["WORLD_SIZE"])
chance = random.Random(f"{folder} {start}")
first = (1, 4, 7)[start] if start < deaths else 0
kill = (chance.randrange(world_size), first + chance.randrange(2))
trainer = make_trainer(folder, settings, kill if start < deaths else None)
trainer.train()
trainer.group.close()
os._exit(0)  # gloo may abort when the interpreter is taken down
