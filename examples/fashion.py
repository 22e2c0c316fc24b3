"""What the Fashion-MNIST examples share: module and datamodule. Nothing in here is federated."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import FashionMNIST


class FashionMLP(L.LightningModule):
    """784-100-100-10 with ReLU, trained with plain SGD."""

    def __init__(self, lr=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
        )
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.evaluate(batch, "val")

    def test_step(self, batch, batch_idx):
        self.evaluate(batch, "test")

    def evaluate(self, batch, stage):
        images, labels = batch
        logits = self.net(images)
        self.accuracy(logits, labels)
        self.log(f"{stage}_loss", nn.functional.cross_entropy(logits, labels))
        self.log(f"{stage}_acc", self.accuracy, on_step=False, on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class FashionData(L.LightningDataModule):
    """60,000 training and 10,000 test images, held as float tensors (1, 28, 28) in [0, 1].

    The test images also serve as validation data: nothing is chosen by them, they only draw the curves.
    """

    def __init__(self, data_dir, train_images=60_000, test_images=10_000):
        super().__init__()
        self.data_dir, self.train_images, self.test_images = data_dir, train_images, test_images

    def prepare_data(self):
        FashionMNIST(self.data_dir, download=True)  # only if the files are not there

    def setup(self, stage):
        self.train, self.test = self.load(True, self.train_images), self.load(False, self.test_images)

    def load(self, train, count):
        images = FashionMNIST(self.data_dir, train=train)
        return TensorDataset(images.data[:count].unsqueeze(1) / 255, images.targets[:count])  # as ToTensor does

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.test, batch_size=1000)

    test_dataloader = val_dataloader


def fashion_data(args):
    """Return the images; some of them with ``--fast``."""
    return FashionData(args.data_dir, 1200, 500) if args.fast else FashionData(args.data_dir)
