"""A stock Lightning Trainer on tiny data: python lightning_script.py --out DIR --case NAME."""

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--case", default="")
given = parser.parse_args()
CASE = given.case

lightning.seed_everything(0, verbose=False)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 16),
            torch.nn.Dropout(0.2 if "dropout" in CASE else 0.0),
            torch.nn.Linear(16, 1),
        )

    def training_step(self, batch, _):
        return self.layers(batch).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=24)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


samples = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
loader = torch.utils.data.DataLoader(samples, batch_size=4, shuffle="shuffling" in CASE)
mid_epoch = "mid-epoch" in CASE or "window" in CASE
saver = ModelCheckpoint(
    dirpath=given.out,
    every_n_train_steps=3 if mid_epoch else None,
    every_n_epochs=None if mid_epoch else 1,
    save_top_k=-1,
    save_last=True,
)


class SaveInTheWindow(lightning.Callback):
    """Saves after five micro-batches of each epoch, inside a window of four."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 4:
            trainer.save_checkpoint(given.out / "last.ckpt")


in_window = "window" in CASE
trainer = lightning.Trainer(
    max_epochs=4 if in_window else 3,
    accumulate_grad_batches=4 if in_window else 1,
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=not in_window,
    callbacks=[SaveInTheWindow() if in_window else saver],
)
last = given.out / "last.ckpt"
trainer.fit(Module(), loader, ckpt_path=str(last) if last.exists() else None)
