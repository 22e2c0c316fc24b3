"""Which data a client has, found when it is asked for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_fed.callbacks import ClientData
from lightning_fed.callbacks.base import PartitionOwner
from lightning_fed.client.local.isolation import making_data
from lightning_fed.client.local.work import LocalOptions
from lightning_fed.errors import ConfigurationError
from lightning_fed.seeding import seed_for, seeded
from lightning_fed.server.view import user_train_dataloader
from lightning_fed.state.snapshot import DataSnapshot
from lightning_fed.values.data import ClientLoaders
from lightning_fed.views import overrides


class Deal:
    """A client's data on demand: opens the user's train loader once and lets the partition's owner deal it out.

    Args:
        owner: Decides which data each client has.
        module: The module, which may bring its own loader.
        train: The loader that the user gave, or ``None``.
        datamodule: The user's; set up first where no server has done so (a client in a process of its own).
        seed: The run's seed.
        options: Those of the local fits: how many local epochs a round has, and when loaders are opened anew.
    """

    def __init__(
        self,
        owner: PartitionOwner,
        module: LightningModule,
        train: Any,
        datamodule: LightningDataModule | None,
        seed: int,
        options: LocalOptions,
    ) -> None:
        self.owner, self._module, self._train, self._datamodule = owner, module, train, datamodule
        self._seed, self._options = seed, options
        self._opened: int | None = None
        self._makers: DataSnapshot | None = None

    def roots(self) -> dict[str, Any]:
        """Return what clients' data depends on, by name."""
        return {"train": self._train, "clients": self.owner.source}

    def open(self, round: int = 1) -> None:
        """Open the loader for a round, if it is not open.

        Raises:
            ConfigurationError: If there is none to deal out.
        """
        every = int(self._options.trainer.get("reload_dataloaders_every_n_epochs") or 0)
        due = self._options.first_epoch(round) // every if every else 0
        if due != self._opened:
            # Whenever, and in whichever process, the data is opened: what that draws is the run's.
            with self._making():
                self.owner.prepare(self._loader(), self._seed)
            self._opened = due

    def __call__(self, client: int, round: int) -> ClientLoaders:
        """One client's loaders in a round; everybody's generators are the caller's to keep."""
        if self._opened is None and self._datamodule is not None:
            with seeded(seed_for(self._seed, "setup")):  # as at the server: a split at random must be the same one
                self._datamodule.prepare_data()
                self._datamodule.setup("fit")
        self.open(round)
        with self._making(client, keeps=False):
            return self.owner.client(client, round=round)

    def _making(self, client: int = -1, keeps: bool = True) -> AbstractContextManager[None]:
        if self._makers is None:
            self._makers = DataSnapshot({"data": self._datamodule, "clients": self.owner.source})
        return making_data(self._makers, self._seed, client, keeps)

    def _loader(self) -> Any:
        deals = self.owner.deals_out
        if self._train is not None:
            return self._train
        if self._datamodule is not None:
            return user_train_dataloader(self._datamodule) if deals else None
        if overrides(self._module, LightningModule, "train_dataloader"):
            return user_train_dataloader(self._module)
        if deals:
            raise ConfigurationError(
                "fit() got no training data to deal out. Pass train_dataloaders= or datamodule=, write the module's"
                " train_dataloader, or give each client its own: callbacks=[ClientData(fn, num_clients=...)]."
            )
        return None


def own_data(train: Any, val: Any, client: int, owner: PartitionOwner) -> PartitionOwner:
    """Decide who gives the data of a site, which has none but its own.

    Args:
        train: The site's datamodule or train loader; ``None`` if there is none.
        val: Its loader for the client-side evaluation, or ``None``.
        client: Which client it is.
        owner: Who decides which data each client has in the federation.

    Raises:
        ConfigurationError: If there is nothing that is this client's own.
    """
    if train is not None:
        return ClientData([train if val is None else (train, val)] * max(client + 1, owner.num_clients))
    if owner.deals_out:
        raise ConfigurationError(
            f"join(client={client}) got no data. Pass this site's own, train_dataloaders= or datamodule=, or let the"
            " trainer have callbacks=[ClientData(fn, num_clients=...)]. A Partition deals one data set out, and here"
            " each site has its own."
        )
    return owner
