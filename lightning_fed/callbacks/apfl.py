"""APFL: each client evaluates a mixture of the model that all train and one of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_fed.callbacks.base import FederatedCallback
from lightning_fed.callbacks.local_steps import is_skipped, parameters_of, refuse_unheard, trainable_in, unheard
from lightning_fed.checks import switch_faults
from lightning_fed.client.local.method import LocalMethod
from lightning_fed.errors import ClientError, ConfigurationError, require
from lightning_fed.values.trajectory import Trajectory


class APFL(FederatedCallback):
    """A client mixes a model ``v`` of its own with its copy ``w`` of the global one (Deng et al. 2020, Algorithm 1).

    https://arxiv.org/abs/2003.13461. The mixture is ``v_bar = alpha v + (1 - alpha) w``. In each step ``w`` steps by
    ``grad F(w)``, ``v`` by ``grad_v F(v_bar) = alpha grad F(v_bar)``, and they are mixed anew. ``v`` and ``alpha`` stay
    with the client; ``v`` begins with the first weights that it receives. It evaluates the mixture with ``w`` as it was
    at the end of its last round: ``clients/...`` are each client's with its own, ``trainer.personal_module(client)``
    gives it. What the client sends and logs in training is of ``w``, which is trained as without APFL, so it goes with
    any aggregation; the paper's is ``FedAvg(weighting="uniform")``.

    With ``adaptive=True`` a client moves its ``alpha`` by ``-eta <v - w, grad F(v_bar)>``, which is ``-eta`` times the
    derivative of ``F(v_bar)`` by ``alpha``, to at least 0 and at most 1. As in the authors' code
    (github.com/MLOPTPSU/FedTorch) that is once a round, at its first step, with ``eta`` the optimizer's learning rate
    then. Theirs takes a mean of the two models' gradients for ``grad F(v_bar)``, ``v`` and ``w`` after the step, and
    adds ``0.02 alpha``; here it is the paper's equation.

    ``w`` and ``v_bar`` are trained in two fits, on the same batches. The first notes ``w`` after each step: that is
    memory for the parameters times the steps of a round; beyond 256 MiB it is a temporary file. The second has the same
    optimizers, epochs and schedules, and of client callbacks those that the module's ``configure_callbacks`` gives. It
    begins with a new optimizer in each round; with ``client_state="carry"`` it goes on with its own, and with its
    schedules. Weight decay acts on ``v``, and momentum is ``v``'s. BatchNorm's statistics, and all buffers, are the
    mixture's own. It takes as long again.

    Args:
        alpha: The share of a client's own model, from 0 to 1; with ``adaptive`` that with which each client begins.
        adaptive: Whether clients move it.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[APFL(alpha=0.5)])
    """

    def __init__(self, alpha: float = 0.5, adaptive: bool = True) -> None:
        require(self, alpha=(alpha, lambda number: 0 <= number <= 1, "from 0 to 1"))
        if faults := switch_faults({"adaptive": adaptive}):
            raise ConfigurationError(f"APFL: {faults[0]}")
        self.alpha, self.adaptive = alpha, adaptive

    def local_callbacks(self) -> Sequence[Callback]:
        """Return what notes ``w``."""
        return [NotesSteps()]

    def second_fit(self, received: Mapping[str, Tensor], first: Sequence[Callback]) -> Sequence[Callback]:
        """Return the callbacks of the mixture's fit."""
        [notes] = [callback for callback in first if isinstance(callback, NotesSteps)]
        return [Mixture(self.alpha, self.adaptive, notes.steps)]


class NotesSteps(Callback):
    """Notes all parameters as a fit begins with them, and after each step those that had a gradient.

    Attributes:
        steps: What was noted, by the module's names of the parameters; frozen ones that do not travel are left out.
    """

    acts_elementwise = True

    def __init__(self) -> None:
        self.steps = Trajectory()
        self._names: dict[nn.Parameter, str] = {}
        self._stepped: list[nn.Parameter] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the fit begins with."""
        self._names = {p: name for name, p in travelling(trainer, pl_module).items()}
        self._begin, self._is_heard = {p: p.detach().clone() for p in self._names}, False
        self.steps.append({name: self._begin[p] for p, name in self._names.items()})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note what the step before has given, now that all who act after it have done so."""
        self._is_heard = True
        self._note()
        self._stepped = [p for p in parameters_of(optimizer) if p in self._names and p.grad is not None]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the last step."""
        refuse_unheard("APFL", self._is_heard, self._begin)
        self._note()
        self._names, self._begin, self._stepped = {}, {}, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Forget it."""
        self.steps.close()

    def _note(self) -> None:
        if self._stepped is not None:
            self.steps.append({self._names[p]: p for p in self._stepped})


class Mixture(LocalMethod):
    """Trains ``v`` where the module is ``v_bar``; its memory is ``alpha`` and ``v``.

    At a step the module has ``v``, with ``alpha grad F(v_bar)``, and after it the mixture again.

    Args:
        alpha, adaptive: As for ``APFL``.
        steps: What ``NotesSteps`` has noted of ``w``.
    """

    def __init__(self, alpha: float, adaptive: bool, steps: Trajectory) -> None:
        self.alpha, self.adaptive, self._steps = alpha, adaptive, steps
        self._handles: list[RemovableHandle] = []

    def initial_memory(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return the ``alpha`` of a client that has none yet; its ``v`` is what it received."""
        wide = any(torch.finfo(p.dtype).bits == 64 for p in trainable_in(pl_module).values())
        return {"alpha": torch.tensor(self.alpha, dtype=torch.float64 if wide else torch.float32)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mix, and listen to the optimizers."""
        self._parameters = travelling(trainer, pl_module)
        self.alpha, self._rest = float(self.memory["alpha"]), iter(self._steps)
        self._stepping: list[nn.Parameter] | None = None
        # What the round's first step adds to alpha: the parameters that have had their part in it, and the sum.
        self._part_of_alpha: tuple[set[nn.Parameter], float] | None = (set(), 0.0) if self.adaptive else None
        self._w: dict[nn.Parameter, Tensor] = {}
        self._follow()
        first = {name: self.memory.get(f"v/{name}", self._w[p]) for name, p in self._parameters.items()}
        self._v = {p: first[name].to(p, copy=True) for name, p in self._parameters.items()}
        self._mix(self._v)
        self._begin, self._is_heard = {p: p.detach().clone() for p in self._v}, False
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in trainer.optimizers]

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Put ``v`` and its gradient where the optimizer takes them."""
        if self._stepping is not None:
            raise ClientError(
                f"trains with {type(optimizer).__name__}, which asks for the loss more than once a step, of weights"
                " that it is looking for: APFL's v steps where the loss is that of a mixture. Write"
                " configure_optimizers with one that asks once, or leave APFL out."
            )
        self._is_heard = True
        trained = [p for p in parameters_of(optimizer) if p in self._v and p.grad is not None]
        self._refuse_moved(trained)
        if is_skipped(trainer, [p.grad for p in parameters_of(optimizer)]):
            self._go_on(())
            return
        self._move_alpha_by(optimizer)
        for p in trained:
            assert p.grad is not None
            p.grad.mul_(self.alpha)
            p.copy_(self._v[p])
        self._stepping = trained

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if self._stepping is None:
            raise unheard("APFL")
        for p in self._stepping:
            self._v[p].copy_(p)
        stepped, self._stepping = self._stepping, None
        self._go_on(stepped)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Move ``alpha``, once a round: in the first batch that has steps, all optimizers' at once."""
        if self._part_of_alpha is not None and self._part_of_alpha[0]:
            self.alpha = min(max(self.alpha + self._part_of_alpha[1], 0.0), 1.0)
            self._part_of_alpha = None
            self._mix(self._v)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep ``alpha`` and ``v``."""
        refuse_unheard("APFL", self._is_heard, self._begin)
        self._refuse_moved(self._v)
        if next(self._rest, None) is not None:
            raise ClientError(_UNEQUAL.format("fewer"))
        alpha = torch.full_like(self.memory["alpha"], self.alpha)
        self.memory = {"alpha": alpha, **{f"v/{name}": self._v[p] for name, p in self._parameters.items()}}
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening, and forget the steps."""
        self._release()
        self._steps.close()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._parameters, self._begin, self._v, self._w = [], {}, {}, {}, {}

    def _follow(self) -> list[nn.Parameter]:
        """Take ``w`` to its next step; return what has moved."""
        if (step := next(self._rest, None)) is None:
            raise ClientError(_UNEQUAL.format("more"))
        moved = {self._parameters[name]: w for name, w in step.items()}
        self._w.update({p: w.to(p) for p, w in moved.items()})
        return list(moved)

    def _go_on(self, stepped: Sequence[nn.Parameter]) -> None:
        """Mix what has moved in a step, of ``v`` or of ``w``."""
        self._mix(dict.fromkeys([*stepped, *self._follow()]))

    @torch.no_grad()
    def _mix(self, parameters: Mapping[nn.Parameter, object]) -> None:
        for p in parameters:
            p.copy_(self._mixed(p))

    def _mixed(self, p: nn.Parameter) -> Tensor:
        # Exact where v and w are equal, and for alpha 0 and 1.
        return torch.lerp(self._w[p], self._v[p], self.alpha)

    @torch.no_grad()
    def _refuse_moved(self, parameters: Sequence[nn.Parameter] | Mapping[nn.Parameter, object]) -> None:
        for p in parameters:
            if not torch.allclose(p, self._mixed(p), rtol=0, atol=0, equal_nan=True):
                name = next(name for name, other in self._parameters.items() if other is p)
                raise ClientError(
                    f"changes {name!r} beside its optimizer's steps (it clamps or sets weights), and APFL cannot tell"
                    " what of the mixture's change is its own model's. Let the optimizer do it, or leave APFL out.",
                    tensor=name,
                )

    def _move_alpha_by(self, optimizer: Optimizer) -> None:
        """Add this optimizer's part of ``-eta <v - w, grad F(v_bar)>``, of each parameter's first gradient."""
        if self._part_of_alpha is None:
            return
        counted, change = self._part_of_alpha
        for group in optimizer.param_groups:
            own = [p for p in group["params"] if p in self._v and p not in counted and p.grad is not None]
            if own and not isinstance(group.get("lr"), float | int | Tensor):
                raise ClientError(
                    f"trains with {type(optimizer).__name__}, whose groups have no learning rate for APFL's alpha to"
                    " step by: write APFL(adaptive=False)."
                )
            for p in own:
                gradient = p.grad.to_dense() if p.grad.is_sparse else p.grad
                change -= float(group["lr"]) * _inner(self._v[p] - self._w[p], gradient)
            counted.update(own)
        self._part_of_alpha = counted, change


_UNEQUAL = (
    "takes {} steps in the fit of its own model than in that of the global one, and APFL mixes them step by step: a"
    " client callback that ends a fit early, or a loader that gives other batches in each pass, does not go with it."
)


def travelling(trainer: Trainer, module: LightningModule) -> dict[str, nn.Parameter]:
    """Return a client's parameters by the module's names, without those that nobody trains and that do not travel."""
    frozen = getattr(trainer, "frozen", ())
    return {name: p for name, p in trainable_in(module).items() if name not in frozen}


def _inner(one: Tensor, other: Tensor) -> float:
    """Return the inner product, over real and imaginary parts alike, in float32 or wider."""
    wide = torch.promote_types(one.dtype, torch.float32)
    return float(torch.vdot(one.to(wide).flatten(), other.to(wide).flatten()).real)
