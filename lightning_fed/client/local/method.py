"""A method's part in local training that has tensors: some come with the weights, some go back, some stay here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from lightning_fed.client.local.work import LocalTask
from lightning_fed.errors import ClientError, ConfigurationError
from lightning_fed.values.weights import Weights, load, share_weights
from lightning_fed.views import overrides


class LocalMethod(Callback):
    """A callback of a client's local fit, with tensors; ``FederatedCallback.local_callbacks`` gives at most one.

    From ``on_train_start`` on it has ``received`` and ``memory``. What is in ``sent`` and ``memory`` when the fit has
    ended goes to the server's side of the method, and into the client's next fit. Where clients are vectorized, all of
    these tensors have the clients in front, as the module's parameters have them, so code that acts element by element
    (``acts_elementwise = True``) is the same for one client and for many.

    Attributes:
        received: Copies of what the server's ``tensors_to_client`` gave, by name, on the module's device.
        memory: What the client's last fit left here, by name: it stays with the client, whatever ``client_state=`` is,
            and is in the checkpoint.
        sent: What goes to the server's ``tensors_from_client``, by name; empty when the fit begins.
        name: The name of its method in this run.

    >>> class Drift(LocalMethod):
    ...     acts_elementwise = True
    ...
    ...     def initial_memory(self, pl_module):
    ...         return {name: p.detach().clone() for name, p in pl_module.named_parameters()}
    ...
    ...     def on_train_end(self, trainer, pl_module):
    ...         new = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
    ...         self.sent = {name: p - self.memory[name] for name, p in new.items()}
    ...         self.memory = new
    """

    acts_elementwise = False
    received: dict[str, Tensor]
    memory: dict[str, Tensor]
    sent: dict[str, Tensor]
    name = ""

    def initial_memory(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return the memory of a client that has none yet; the module has the round's weights. By default empty."""
        return {}


def methods_among(callbacks: Iterable[Callback]) -> list[LocalMethod]:
    """Return those of some callbacks that have tensors."""
    return [callback for callback in callbacks if isinstance(callback, LocalMethod)]


def named(name: str, callbacks: Sequence[Callback]) -> Sequence[Callback]:
    """Return what a method has given for a local fit, its part with tensors under the method's name.

    Raises:
        ConfigurationError: If there are two.
    """
    methods = methods_among(callbacks)
    if len(methods) > 1:
        raise ConfigurationError(
            f"{name}.local_callbacks() gives {' and '.join(type(one).__name__ for one in methods)}: one LocalMethod a"
            " method has tensors. Other callbacks can hold it."
        )
    for method in methods:
        method.name = name
    return callbacks


def of_method(tensors: Mapping[str, Tensor], name: str) -> Weights:
    """Return a method's own of the tensors of all methods."""
    return {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}


def begin(methods: Sequence[LocalMethod], module: LightningModule, tasks: Sequence[LocalTask]) -> None:
    """Give methods the tensors with which a local fit begins.

    Args:
        methods: The methods.
        module: The module with the weights of the first task.
        tasks: That of one client, or of several whose tensors are stacked.
    """
    for method in methods:
        memory = [of_method(task.memory, method.name) for task in tasks]
        if not all(memory) and overrides(method, LocalMethod, "initial_memory"):
            first = tasks[0].weights
            memory = [
                one or _initial(method, module, task.weights, first) for one, task in zip(memory, tasks, strict=True)
            ]
        method.received = _of_all([of_method(task.received, method.name) for task in tasks], module.device)
        method.memory, method.sent = _of_all(memory, module.device), {}


def _initial(method: LocalMethod, module: LightningModule, weights: Weights, loaded: Weights) -> Weights:
    if share_weights([weights, loaded]):
        return method.initial_memory(module)
    load(module, weights)
    memory = {name: tensor.detach().clone() for name, tensor in method.initial_memory(module).items()}
    load(module, loaded)
    return memory


def _of_all(each: Sequence[Weights], device: torch.device) -> Weights:
    """Return copies of some clients' tensors, with the clients in front if there are several."""
    if len(each) == 1:
        return {name: tensor.detach().to(device, copy=True) for name, tensor in each[0].items()}
    forms = [{name: (tensor.shape, tensor.dtype) for name, tensor in one.items()} for one in each]
    if any(form != forms[0] for form in forms):
        raise ClientError("has tensors of a method in other names, shapes or dtypes than the clients beside it.")
    return {name: torch.stack([one[name].detach() for one in each]).to(device) for name in each[0]}


def ended(methods: Iterable[LocalMethod], clients: int | None = None) -> list[tuple[Weights, Weights]]:
    """Return what goes to the server and what stays with each client, of all methods.

    Args:
        methods: The methods.
        clients: How many there are where they were vectorized.

    Raises:
        ClientError: If something is no tensor, or has not the clients in front.
    """
    results: list[tuple[Weights, Weights]] = [({}, {}) for _ in range(clients or 1)]
    for method in methods:
        for index, what in enumerate(("sent", "memory")):
            if not isinstance(own := getattr(method, what, {}), dict):
                raise ClientError(f"has {type(method).__name__}.{what} of type {type(own).__name__}: it is a dict.")
            for name, tensor in own.items():
                for result, row in zip(results, _rows(method, what, name, tensor, clients), strict=True):
                    result[index][f"{method.name}/{name}"] = row
    return results


def _rows(method: LocalMethod, what: str, name: str, tensor: object, clients: int | None) -> Sequence[Tensor]:
    where = f"{type(method).__name__}.{what}[{name!r}]"
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        raise ClientError(f"has {where} of type {type(tensor).__name__}: it is a dict of (dense) tensors by name.")
    kept = tensor.detach().to("cpu", copy=True)
    if clients is None:
        return [kept]
    if not kept.dim() or len(kept) != clients:
        raise ClientError(f"has {where} of shape {tuple(kept.shape)}: of vectorized clients it is ({clients}, ...).")
    return [row.clone() for row in kept.unbind()]
