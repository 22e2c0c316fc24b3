"""Federated methods and watchers: one method a file, all in the Trainer's list of callbacks."""

from lightning_fed.callbacks.apfl import APFL
from lightning_fed.callbacks.base import (
    Averaging,
    ClientReport,
    CohortOwner,
    FailureOwner,
    FederatedCallback,
    PartitionOwner,
)
from lightning_fed.callbacks.client_data import ClientData
from lightning_fed.callbacks.client_metrics import ClientMetrics
from lightning_fed.callbacks.deadline import Deadline
from lightning_fed.callbacks.device_speed import DeviceSpeed
from lightning_fed.callbacks.ditto import Ditto
from lightning_fed.callbacks.fault_tolerance import FaultTolerance
from lightning_fed.callbacks.fedasync import FedAsync
from lightning_fed.callbacks.fedavg import FedAvg, FedAvgM
from lightning_fed.callbacks.fedbuff import FedBuff
from lightning_fed.callbacks.feddyn import FedDyn
from lightning_fed.callbacks.fednova import FedNova
from lightning_fed.callbacks.fedopt import FedAdagrad, FedAdam, FedYogi
from lightning_fed.callbacks.fedprox import FedProx
from lightning_fed.callbacks.fedrep import FedRep
from lightning_fed.callbacks.flower_strategy import FlowerStrategy
from lightning_fed.callbacks.history import History
from lightning_fed.callbacks.moon import Moon
from lightning_fed.callbacks.over_selection import OverSelection
from lightning_fed.callbacks.participation import PartialParticipation
from lightning_fed.callbacks.partition import Partition
from lightning_fed.callbacks.personal import FedBN, FedPer, LGFedAvg, Personal, TrainableOnly
from lightning_fed.callbacks.progress import RichRoundBar, RoundPrinter, TQDMRoundBar
from lightning_fed.callbacks.sampler import Participation
from lightning_fed.callbacks.scaffold import Scaffold
from lightning_fed.client.local.method import LocalMethod

__all__ = [
    "APFL",
    "Averaging",
    "ClientData",
    "ClientMetrics",
    "ClientReport",
    "CohortOwner",
    "Deadline",
    "DeviceSpeed",
    "Ditto",
    "FailureOwner",
    "FaultTolerance",
    "FedAdagrad",
    "FedAdam",
    "FedAsync",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedBuff",
    "FedDyn",
    "FedNova",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedYogi",
    "FederatedCallback",
    "FlowerStrategy",
    "History",
    "LGFedAvg",
    "LocalMethod",
    "Moon",
    "OverSelection",
    "PartialParticipation",
    "Participation",
    "Partition",
    "PartitionOwner",
    "Personal",
    "RichRoundBar",
    "RoundPrinter",
    "Scaffold",
    "TQDMRoundBar",
    "TrainableOnly",
]
