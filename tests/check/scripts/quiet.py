"""A loop that tells at its end all that a recorder could have disturbed."""

import hashlib
import random
import sys

import numpy as np
import torch

COMPILED = "compiled" in sys.argv

random.seed(0)
np.random.seed(0)
torch.manual_seed(0)


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.randn(8) + random.random() + float(np.random.rand())


model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
run = torch.compile(model, backend="aot_eager") if COMPILED else model
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for workers in (0, 2):
    for batch in torch.utils.data.DataLoader(Samples(), 4, shuffle=True, num_workers=workers):
        optimizer.zero_grad()
        run(batch).square().mean().backward()
        optimizer.step()
weights = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
print(hashlib.sha256(weights).hexdigest())
print(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest())
print(hashlib.sha256(repr(random.getstate()).encode()).hexdigest())
print(hashlib.sha256(np.random.get_state()[1].tobytes()).hexdigest(), np.random.get_state()[2])
print(sorted(name for name in dir(torch) if "unbroken" in name), len(model._forward_hooks))
print(type(torch.__loader__).__name__, type(torch.__spec__.loader).__name__)
print([path for path in sys.path if "unbroken/check" in path], sys.gettrace())
