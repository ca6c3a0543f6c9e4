"""What PyTorch's mnist/main.py does, on digits that are drawn here: epochs, a test after each."""

import torch
from torch import nn, optim
from torch.nn import functional
from torch.optim.lr_scheduler import StepLR

EPOCHS, BATCH_SIZE, LOG_INTERVAL = 3, 8, 2


class Digits(torch.utils.data.Dataset):
    def __init__(self, count, *, is_train):
        generator = torch.Generator().manual_seed(int(is_train))
        self.targets = torch.randint(10, (count,), generator=generator)
        self.images = (
            torch.randn(count, 1, 8, 8, generator=generator) + self.targets[:, None, None, None]
        )
        self.is_train = is_train

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image = self.images[index]
        if self.is_train:  # augmented
            image = image + 0.1 * torch.randn_like(image)
        return image, self.targets[index]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.dropout = nn.Dropout(0.25)
        self.fc = nn.Linear(36, 10)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.conv(x)), 2)
        return functional.log_softmax(self.fc(torch.flatten(self.dropout(x), 1)), dim=1)


def train(model, train_loader, optimizer, epoch):
    model.train()
    for batch_idx, (data, target) in enumerate(train_loader):
        optimizer.zero_grad()
        loss = functional.nll_loss(model(data), target)
        loss.backward()
        optimizer.step()
        if batch_idx % LOG_INTERVAL == 0:
            print(f"Train Epoch: {epoch} [batch {batch_idx}]\tLoss: {loss.item():.6f}")


def test(model, test_loader):
    model.eval()
    test_loss, correct = 0.0, 0
    with torch.no_grad():
        for data, target in test_loader:
            output = model(data)
            test_loss += functional.nll_loss(output, target, reduction="sum").item()
            correct += (output.argmax(dim=1) == target).sum().item()
    print(f"Test: loss {test_loss / len(test_loader.dataset):.4f}, {correct} right")


def main():
    torch.manual_seed(1)
    train_loader = torch.utils.data.DataLoader(
        Digits(44, is_train=True), BATCH_SIZE, shuffle=True, num_workers=2
    )
    test_loader = torch.utils.data.DataLoader(Digits(20, is_train=False), BATCH_SIZE)
    model = Net()
    optimizer = optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
    for epoch in range(EPOCHS):
        train(model, train_loader, optimizer, epoch)
        test(model, test_loader)
        scheduler.step()
    torch.save(model.state_dict(), "mnist_cnn.pt")


if __name__ == "__main__":
    main()
