"""What PyTorch's dcgan/main.py does, on vectors: two models, two optimizers, one loop."""

import torch
from torch import nn, optim

from unbroken import Checkpointer

niter, nz, batch_size = 3, 4, 8
real_label, fake_label = 1.0, 0.0

torch.manual_seed(999)
samples = torch.randn(44, 8, generator=torch.Generator().manual_seed(0)) + 2.0
dataset = torch.utils.data.TensorDataset(samples)
dataloader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, num_workers=2)

netG = nn.Sequential(nn.Linear(nz, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
netD = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(16, 1))
criterion = nn.BCEWithLogitsLoss()
fixed_noise = torch.randn(batch_size, nz)
optimizerD = optim.Adam(netD.parameters(), lr=2e-3, betas=(0.5, 0.999))
optimizerG = optim.Adam(netG.parameters(), lr=2e-3, betas=(0.5, 0.999))

models = {"netD": netD, "netG": netG, "optimizerD": optimizerD, "optimizerG": optimizerG}
run = Checkpointer("runs/gan", data=dataloader, save_steps=4, **models)
for epoch in run.epochs(niter):
    for i, data in enumerate(run.batches(), 0):
        # (1) Update D: maximize log(D(x)) + log(1 - D(G(z)))
        netD.zero_grad()
        real = data[0]
        label = torch.full((len(real), 1), real_label)
        errD_real = criterion(netD(real), label)
        errD_real.backward()
        fake = netG(torch.randn(len(real), nz))
        label.fill_(fake_label)
        errD_fake = criterion(netD(fake.detach()), label)
        errD_fake.backward()
        errD = errD_real + errD_fake
        optimizerD.step()

        # (2) Update G: maximize log(D(G(z)))
        netG.zero_grad()
        label.fill_(real_label)
        errG = criterion(netD(fake), label)
        errG.backward()
        optimizerG.step()

        print(f"[{epoch}/{niter}][{i}] Loss_D: {errD.item():.4f} Loss_G: {errG.item():.4f}")
        if i % 100 == 0:
            torch.save(netG(fixed_noise).detach(), f"fake_samples_epoch_{epoch}.pt")

    torch.save(netG.state_dict(), f"netG_epoch_{epoch}.pth")
    torch.save(netD.state_dict(), f"netD_epoch_{epoch}.pth")
