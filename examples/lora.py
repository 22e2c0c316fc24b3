"""LoRA in a small GPT-2 over clients: only adapters train, and only adapters travel.

A GPT-2 of characters, made from its config without a download, is trained on the first 70 speakers of Shakespeare. Then
adapters of rank 4 (Hu et al. 2022, https://arxiv.org/abs/2106.09685) fit it to the 71 who come later, mostly in other
plays: in one place; federated; federated with A frozen as it was drawn (FFA-LoRA, Sun et al. 2024,
https://arxiv.org/abs/2403.12313); and at each speaker alone. All make as many passes over the data. Needs
``pip install "lightning_fed[lora]"``::

    python examples/lora.py --data-dir data --seed 0 1 2
"""

import copy

from command_line import FRACTION, speaker_options

if __name__ == "__main__":  # before the imports that take seconds
    args = speaker_options(__doc__, rounds=40)

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
import torch
from language import QUIET, Curve, draw_loss
from peft import LoraConfig, get_peft_model
from shakespeare import ShakespeareData
from torch.utils.data import DataLoader, Subset
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import History, PartialParticipation, Partition, Personal, TrainableOnly

GPT2 = {"vocab_size": 65, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "use_cache": False}
GPT2 |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0, "eos_token_id": 0}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
WAYS = ("central", "federated", "FFA-LoRA", "local only")


class Writer(L.LightningModule):
    """Trains what of a model of transformers is not frozen. Nothing in it knows of clients, rounds or adapters."""

    def __init__(self, model, lr):
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch, batch_idx):
        logits = self.model(input_ids=batch[0]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", Writer.training_step(self, batch, batch_idx))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def trainer_of(way, args, curve, history):
    """Return what trains in one of the ways, all of them for as many passes over the data."""
    shared = {"check_val_every_n_epoch": args.every, **QUIET}
    if way == "central":
        return L.Trainer(max_epochs=args.rounds, limit_train_batches=FRACTION, callbacks=curve, **shared)
    callbacks = [Partition(by="speaker")]
    if way == "local only":
        shared |= {"max_rounds": 1, "local_epochs": args.passes, "limit_val_batches": 0}
        return FederatedTrainer(callbacks=[*callbacks, Personal("*lora_*")], **shared)
    callbacks += [PartialParticipation(FRACTION), TrainableOnly(), curve, history]
    return FederatedTrainer(max_rounds=args.rounds, callbacks=callbacks, **shared)


def with_adapters(way, base):
    """Return the model with adapters, of which FFA-LoRA trains B alone."""
    module = Writer(get_peft_model(copy.deepcopy(base), LORA), lr=5e-3)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_B" in name or ("lora_A" in name and way != "FFA-LoRA"))
    return module


def adapt(way, base, args, seed, data):
    """Return the losses from the first to the last, the bytes for a client in a round, and each speaker's results."""
    L.seed_everything(seed, verbose=False)
    module = with_adapters(way, base)
    curve, history = Curve(), History(per_client=True)
    curve.loss[0] = L.Trainer(**QUIET).validate(module, data, verbose=False)[0]["val_loss"]
    trainer = trainer_of(way, args, curve, history)
    trainer.fit(module, datamodule=data)
    if way == "central":
        return curve.loss, 0, None
    said = np.array(data.val.speaker)  # np.unique is sorted, as are the clients of Partition(by="speaker")
    own = [DataLoader(Subset(data.val, np.flatnonzero(said == one)), batch_size=100) for one in np.unique(said)]
    results = trainer.test_clients(dataloaders=own)
    if way == "local only":
        return {args.passes: results.merged["val_loss"]}, 0, results
    size = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    assert sum(history["bytes/down"]) == sum(history["bytes/up"]) == size * len(history.clients)  # and nothing else
    return curve.loss, size, results


def compare(args, seed):
    """Return what each way gives, from the same pre-trained weights."""
    L.seed_everything(seed, verbose=False)
    first, second = (ShakespeareData(args.data_dir, speakers=half) for half in args.halves)
    base = GPT2LMHeadModel(GPT2Config(**GPT2))
    L.Trainer(max_epochs=1 if args.fast else 2, limit_val_batches=0, **QUIET).fit(Writer(base, lr=4e-3), first)
    return {way: adapt(way, base, args, seed, second) for way in WAYS}


def main(args):
    found = [compare(args, seed) for seed in args.seed]
    figure, (losses, speakers) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    print(f"\nValidation loss of the second half, seeds {args.seed}; bytes to a client, and from it, in a round:")
    print("  before     ", *(f"{one['central'][0][0]:.4f}" for one in found))
    for way in WAYS:
        curves, sizes, _ = zip(*(one[way] for one in found), strict=True)
        ends = [list(curve.values())[-1] for curve in curves]
        print(f"  {way:<11}", *(f"{end:.4f}" for end in ends), f"{sizes[0]:>9,}" if sizes[0] else "")
        draw_loss(losses, way, curves)
    for seed, one in zip(args.seed, found, strict=True):
        alone, shared = one["local only"][2], one["federated"][2]
        gain = np.subtract(alone["val_loss"], shared["val_loss"])
        print(f"  federated is better than local only for {(gain > 0).sum()} of {len(gain)} speakers")
        speakers.scatter([row["num_examples"] for row in alone.rows], gain, s=12, label=f"seed {seed}")
    losses.legend()
    speakers.legend()
    speakers.axhline(0, color="black", linewidth=0.8)
    speakers.set(xlabel="validation passages of a speaker", ylabel="loss local only - loss federated", xscale="log")
    path = args.output_dir / "lora.png"
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(args)
