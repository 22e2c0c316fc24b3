"""A GPT of characters over tiny Shakespeare: trained in one place, and federated over the 141 speakers.

An epoch of the central training is a twentieth of all passages; in a round a twentieth of the speakers train, each for
one pass over its own: after as many epochs as rounds both did as much work. The picture shows the validation loss by
passes over the data; with several seeds their mean, and from the least to the greatest of them::

    python examples/language_model.py --data-dir data --seed 0 1 2
"""

from command_line import FRACTION, speaker_options

if __name__ == "__main__":  # before the imports that take seconds
    args = speaker_options(__doc__, rounds=50)

import lightning as L
import matplotlib.pyplot as plt
import torch
from language import QUIET, Curve, draw_loss
from shakespeare import ShakespeareData
from torch import nn

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import PartialParticipation, Partition


class CharGPT(L.LightningModule):
    """A decoder of pre-norm transformer layers, trained with AdamW. Nothing in it knows of clients or rounds."""

    def __init__(self, alphabet=65, context=64, width=64, layers=2, heads=4, lr=4e-3):
        super().__init__()
        self.save_hyperparameters()
        self.token, self.position = nn.Embedding(alphabet, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, alphabet)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x):
        """Return logits (batch, time, alphabet) of the character after each of x (batch, time)."""
        time = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(time, device=x.device)
        return self.head(self.layers(self.token(x) + self.position.weight[:time], mask=mask, is_causal=True))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten()))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


@torch.no_grad()
def write(model, alphabet, length=200):
    """Return characters drawn one after the other, each from what the model says comes next."""
    text = torch.tensor([[alphabet.index("\n")]])
    for _ in range(length):
        logits = model(text[:, -model.hparams.context :])[0, -1]
        text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1)[None]], dim=1)
    return "".join(alphabet[i] for i in text[0, 1:])


def train(trainer_of, seed, data):
    """Return a trained module, and its validation loss by passes over the data."""
    L.seed_everything(seed, verbose=False)
    model, curve = CharGPT(), Curve()
    trainer_of(curve).fit(model, datamodule=data)
    return model, curve.loss


def main(args):
    data = ShakespeareData(args.data_dir, speakers=slice(args.halves[0].start, args.halves[1].stop))

    shared = {"check_val_every_n_epoch": args.every, **QUIET}

    def central(curve):
        return L.Trainer(max_epochs=args.rounds, limit_train_batches=FRACTION, callbacks=[curve], **shared)

    def federated(curve):
        callbacks = [Partition(by="speaker"), PartialParticipation(FRACTION), curve]
        return FederatedTrainer(max_rounds=args.rounds, callbacks=callbacks, **shared)

    found = {way.__name__: [train(way, seed, data) for seed in args.seed] for way in (central, federated)}
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    print(f"\nbefore the training:\n{write(CharGPT(), data.alphabet)}")
    for name, runs in found.items():
        print(f"\n{name}:\n{write(runs[0][0], data.alphabet)}")
        draw_loss(axes, name, [curve for _, curve in runs])
    print(f"\nValidation loss after {args.rounds * FRACTION:g} passes over the data, seeds {args.seed}:")
    for name, runs in found.items():
        print(f"  {name:<10} " + "  ".join(f"{list(curve.values())[-1]:.4f}" for _, curve in runs))
    axes.legend()
    path = args.output_dir / "language_model.png"
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(args)
