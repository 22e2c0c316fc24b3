"""MOON: a client's features stay near those of the round's weights, and move away from what it had before."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.utils.hooks import RemovableHandle

from lightning_fed._compat.lightning import optimizes_automatically
from lightning_fed._compat.torch import tree_flatten
from lightning_fed.callbacks.base import FederatedCallback
from lightning_fed.client.local.method import LocalMethod
from lightning_fed.errors import ClientError, ConfigurationError, require

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer


class Moon(FederatedCallback):
    """Adds a contrastive term on features to every client's objective (Li et al. 2021, equation 3).

    https://arxiv.org/abs/2103.16257. ``mu`` times the mean over the batch of ``-log(e^(s(z, z_x) / T) /
    (e^(s(z, z_x) / T) + e^(s(z, z_p) / T)))``: ``z`` are the features of the weights that train, ``z_x`` of the
    round's, ``z_p`` of those that the client ended its last round with (in its first, of the round's), ``s`` is the
    cosine and ``T`` the temperature. The term's gradient is added to that of the features where the loss goes back
    through them; losses that the user logs stay without it. It goes with any aggregation.

    The module stays as it is. Its ``training_step`` calls the representation once, on inputs in which nothing that
    trains has a part, and optimizes automatically. The other two sets of features are made in ``eval`` mode, so
    BatchNorm's statistics move once.

    Args:
        mu: The strength of the term, >= 0.
        temperature: > 0.
        representation: The module's submodule that gives the features, by its dotted name. Its output is a tensor,
            (batch, ...).

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[Moon(mu=1.0, representation="net.0")])
    """

    def __init__(self, mu: float = 5.0, temperature: float = 0.5, representation: str = "encoder") -> None:
        require(
            self,
            mu=(mu, lambda number: number >= 0, ">= 0"),
            temperature=(temperature, lambda number: number > 0, "> 0"),
        )
        self.mu, self.temperature, self.representation = mu, temperature, representation

    def local_callbacks(self) -> Sequence[Callback]:
        """Return the client's part."""
        return [ContrastiveTerm(self.mu, self.temperature, self.representation)]

    def on_federation_start(self, trainer: FederatedTrainer) -> None:
        """Check that the term can be added."""
        module = trainer.lightning_module
        if not optimizes_automatically(module):
            raise ConfigurationError(
                f"Moon: {type(module).__name__} optimizes manually, and which of its backward passes the term belongs"
                " to nobody tells. Let training_step return the loss, or add the term to it there."
            )
        find(module, self.representation)


class ContrastiveTerm(LocalMethod):
    """The client's part of MOON; its memory is the representation with which its last round ended.

    Args:
        mu, temperature, representation: As for ``Moon``.
    """

    adds_to_objective = True

    def __init__(self, mu: float, temperature: float, representation: str) -> None:
        self.mu, self.temperature, self.representation = mu, temperature, representation
        self._handle: RemovableHandle | None = None
        self._round: dict[str, Tensor] = {}
        self._trained: list[nn.Parameter] = []
        self._gradient: Tensor | None = None
        self._scale: float | None = None
        self._is_step = False

    def initial_memory(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return the representation of the round's weights: the term is constant then."""
        return tensors_of(find(pl_module, self.representation))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the representation."""
        encoder, personal = find(pl_module, self.representation), getattr(trainer, "personal", ())
        if personal and all(f"{self.representation}.{name}" in personal for name, _ in encoder.named_parameters()):
            raise ClientError(
                f"has {self.representation!r} for its own: there are no features of the round's weights, from which"
                " Moon's term keeps it near. Name a representation that is shared, or leave Moon out."
            )
        self._trained = list(encoder.parameters())
        if not self._trains():
            raise ClientError(f"has nothing to train in {self.representation!r}: Moon's term would change nothing.")
        self._round = tensors_of(encoder)
        self._handle = encoder.register_forward_hook(self._hear, with_kwargs=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a step."""
        self._gradient, self._is_step = None, True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let the term's gradient join that of the loss, scaled as that is."""
        if not self._trains():
            return
        if self._gradient is None:
            raise ClientError(
                f"has a training_step that does not call {self.representation!r} as a module, `self."
                f"{self.representation}(x)`, in a place where gradients are on: Moon(representation=...) names the one"
                " that gives the features."
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._scale = (1.0 if scaler is None else float(scaler.get_scale())) / trainer.accumulate_grad_batches
        self._is_step = False

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that it has, and begin anew for an optimizer that calls the step again."""
        if self._gradient is not None:
            raise ClientError(
                f"has a loss that gives {self.representation!r} no gradient, so Moon's term has no way to it: name a"
                " submodule whose output the loss depends on."
            )
        self._scale, self._is_step = None, True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the representation for the next round."""
        self.memory = tensors_of(find(pl_module, self.representation))
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._release()

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._round, self._trained = None, {}, []
        self._gradient, self._is_step = None, False

    def _trains(self) -> bool:
        """Return whether the representation trains now; in an epoch that trains a head alone it does not."""
        return any(p.requires_grad for p in self._trained)

    def _hear(self, encoder: nn.Module, args: Any, kwargs: dict[str, Any], features: Any) -> None:
        if not self._is_step or not torch.is_grad_enabled() or not self._trains():
            return
        self._check(args, kwargs, features)
        with torch.no_grad(), evaluating(encoder):
            others = [functional_call(encoder, held, args, kwargs) for held in (self._round, self.memory)]
        self._gradient = self._gradient_of(features.detach(), others)
        features.register_hook(self._join)

    def _check(self, args: Any, kwargs: dict[str, Any], features: Any) -> None:
        said = f"calls {self.representation!r}"
        if self._gradient is not None:
            raise ClientError(f"{said} more than once in a training_step: Moon's term is about one set of features.")
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_flatten((args, kwargs))[0]):
            raise ClientError(
                f"{said} on inputs that depend on what trains: those of the round's weights and of the client's last"
                " ones would be others. Moon(representation=...) names a submodule that gets the batch itself, and all"
                " layers up to the features."
            )
        if not isinstance(features, Tensor) or not features.is_floating_point() or features.dim() < 2:
            what = f"a {type(features).__name__}"
            what = f"shape {tuple(features.shape)}, {features.dtype}" if isinstance(features, Tensor) else what
            raise ClientError(f"{said}, which gives {what}: Moon wants floating features, (batch, ...).")
        if not features.requires_grad:
            raise ClientError(f"{said}, whose features have no gradient: Moon's term would change nothing.")

    def _gradient_of(self, features: Tensor, others: Sequence[Tensor]) -> Tensor:
        with torch.enable_grad():
            own = features.to(torch.promote_types(features.dtype, torch.float32)).requires_grad_()
            near = [cosine_similarity(own.flatten(1), z.to(own.dtype).flatten(1)) for z in others]
            first = torch.zeros(len(own), dtype=torch.long, device=own.device)
            term = self.mu * cross_entropy(torch.stack(near, dim=1) / self.temperature, first)
        return torch.autograd.grad(term, own)[0]

    def _join(self, gradient: Tensor) -> Tensor | None:
        if self._scale is None or self._gradient is None:  # of a derivative that the step itself takes
            return None
        own, self._gradient = self._gradient, None
        return gradient + (self._scale * own).to(gradient.dtype)


def find(module: nn.Module, name: str) -> nn.Module:
    """Return a submodule by its dotted name.

    Raises:
        ConfigurationError: If there is none; it lists near names.
    """
    names = dict(module.named_modules())
    if name in names and name:
        return names[name]
    near = difflib.get_close_matches(name, [known for known in names if known], n=5, cutoff=0.3)
    there = near or [name for name, _ in module.named_children()]
    raise ConfigurationError(
        f"Moon(representation={name!r}): {type(module).__name__} has no such submodule; it has"
        f" {', '.join(map(repr, there)) or 'none'}."
    )


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of a module's parameters and buffers by name."""
    held: Mapping[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in held.items()}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Let a module evaluate in the block; each of its parts trains again if it did."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
