"""Whether a step that runs once for many clients changes or draws what is not each client's own."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_fed._compat.lightning import WHILE_HOOKS_RUN
from lightning_fed.client.vectorized.rng import NotStackable
from lightning_fed.client.vectorized.weights import Stack
from lightning_fed.state.content import TensorFlags
from lightning_fed.state.nodes import ATTRIBUTES, Container, Node
from lightning_fed.state.snapshot import Snapshot

# What Lightning, and whoever compiles a step, sets on a module meanwhile.
_NOT_THE_USERS = WHILE_HOOKS_RUN | {"_here"}


class StepWatch:
    """Looks, before and after steps, at all that the clients of a stack have in common.

    Args:
        stack: The clients' weights, which steps may change.
        module: The module that holds them.
    """

    def __init__(self, stack: Stack, module: LightningModule) -> None:
        self._streams = stack.streams
        self._snapshot = Snapshot({"module": module}, stack.held)
        self._is_new = True

    def begin(self) -> None:
        """Step follow; the first ones do so at once."""
        if not self._is_new:
            self._snapshot.renew()
        self._is_new = False

    def check(self) -> None:
        """Step are over.

        Raises:
            NotStackable: If they changed an attribute, a container, ..., or drew from a generator that clients share.
        """
        self._is_new = False
        self._streams.check_all()
        for node in self._snapshot.changed():
            if not _is_lightnings(node) and (path := _changed(node)) is not None:
                raise NotStackable(f"its step changes {path}, which all clients would share")


def _is_lightnings(node: Node) -> bool:
    """Return whether it belongs to an optimizer or a schedule that the module keeps, which Lightning steps."""
    return isinstance(node.thing, (Optimizer, LRScheduler)) or (node.parent is not None and _is_lightnings(node.parent))


def _changed(node: Node) -> str | None:
    """Return where something was changed that is the user's."""
    if isinstance(node, TensorFlags) and isinstance(node.thing, nn.Parameter) and not node.is_changed():
        return None  # kept beside the stack, which is refused in its own words
    if not isinstance(node, Container) or node.kind is not ATTRIBUTES:
        return node.path
    new, gone = node.changes()
    names = [name for name in (*new, *gone) if name not in _NOT_THE_USERS]
    return f"{node.path}.{names[0]}" if names else None
