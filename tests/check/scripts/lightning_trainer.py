"""A stock Lightning Trainer; `--bug NAME` turns on what it cannot resume.

python lightning_trainer.py --out FOLDER [--bug NAME]
"""

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--bug", default="")
arguments = parser.parse_args()
BUG = arguments.bug

lightning.seed_everything(0, verbose=False)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        dropout = 0.2 if BUG == "dropout" else 0.0
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Dropout(dropout), torch.nn.Linear(16, 1)
        )

    def training_step(self, batch, _):
        return self.layers(batch).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=24)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


samples = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
loader = torch.utils.data.DataLoader(samples, batch_size=4, shuffle=BUG == "shuffle")
mid_epoch = BUG == "mid-epoch"
saver = ModelCheckpoint(
    dirpath=arguments.out,
    every_n_train_steps=4 if mid_epoch else None,
    every_n_epochs=None if mid_epoch else 1,
    save_top_k=-1,
    save_last=True,
)
trainer = lightning.Trainer(
    max_epochs=3,
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[saver],
)
last = arguments.out / "last.ckpt"
trainer.fit(Module(), loader, ckpt_path=str(last) if last.exists() else None)
