"""Where clients run: an engine gives the loop a Flower Grid."""

from lightning_fed.engines.base import Engine
from lightning_fed.engines.in_process import InProcess
from lightning_fed.engines.processes import Processes
from lightning_fed.engines.ray import Ray
from lightning_fed.engines.superlink import SuperLink

__all__ = ["ENGINES", "Engine", "InProcess", "Processes", "Ray", "SuperLink", "made"]

ENGINES: dict[str, type[Engine]] = {"in_process": InProcess, "processes": Processes, "ray": Ray}


def made(engine: str | Engine, cuda: list[int], num_workers: int | None, clients_per_device: int) -> Engine:
    """Return an engine by its name; one that is made already is given back.

    Args:
        engine: The name or the engine.
        cuda: The CUDA devices to use, by index.
        num_workers: How many processes or actors; ``None`` for a number that fits the machine.
        clients_per_device: How many clients train at a time on one CUDA device.
    """
    if engine == "processes":
        return Processes(num_workers or len(cuda) * clients_per_device or None, devices=cuda)
    if engine == "ray":
        return Ray(num_workers, {"num_gpus": 1 / clients_per_device} if cuda else None)
    return ENGINES[engine]() if isinstance(engine, str) else engine
