"""Independent references, a few lines each, from the papers' equations.

Nothing here comes from lightning_fed. Weights are dicts of tensors by name. All sums are in float64; a result has the
dtype of the global weights.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]
State = dict[str, dict[str, Tensor]]
# (global weights, the clients' mean, the moments of the round before) -> (new weights, new moments)
ServerStep = Callable[[Weights, Weights, State], tuple[Weights, State]]


def weighted_mean(clients: Sequence[Weights], coefficients: Sequence[float]) -> Weights:
    """``sum_k n_k w_k / sum_k n_k`` (McMahan et al. 2017, Algorithm 1); integers and bools rounded, halves up."""
    total = float(sum(coefficients))
    mean = {}
    for name, like in clients[0].items():
        value = sum(n / total * _double(client[name]) for client, n in zip(clients, coefficients, strict=True))
        whole = not (like.is_floating_point() or like.is_complex())
        mean[name] = ((value + 0.5).floor() if whole else value).to(like.dtype)
    return mean


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _wide(x: Weights, mean: Weights) -> tuple[Weights, Weights]:
    return {k: _double(v) for k, v in x.items()}, {k: _double(mean[k]) - _double(v) for k, v in x.items()}


def squared(delta: Tensor) -> Tensor:
    """``D^2``; of complex numbers the squared modulus ``re^2 + im^2``, which is real as a second moment must be."""
    return delta.real**2 + delta.imag**2 if delta.is_complex() else delta**2


def fedavgm(lr: float, momentum: float) -> ServerStep:
    """Hsu et al. 2019, section 3: ``v <- beta v + dw``, ``w <- w - lr v`` with ``dw = w - mean``; ``v_0 = 0``."""

    def step(x: Weights, mean: Weights, state: State) -> tuple[Weights, State]:
        wide, delta = _wide(x, mean)
        v = {k: momentum * state["v"][k] - delta[k] if state else -delta[k] for k in x}
        return {k: (wide[k] - lr * v[k]).to(x[k].dtype) for k in x}, {"v": v}

    return step


def _adaptive(lr: float, beta_1: float, tau: float, second_moment: Callable[[Tensor, Tensor], Tensor]) -> ServerStep:
    """Reddi et al. 2021, Algorithm 2, with ``m_{-1} = 0``, ``v_{-1} = tau^2`` and no bias correction.

    Lines 10 to 13: ``m_t = beta_1 m_{t-1} + (1 - beta_1) D_t``, ``v_t`` by method,
    ``x_{t+1} = x_t + eta m_t / (sqrt(v_t) + tau)``.
    """

    def step(x: Weights, mean: Weights, state: State) -> tuple[Weights, State]:
        wide, delta = _wide(x, mean)
        if not state:
            state = {
                "m": {k: torch.zeros_like(d) for k, d in delta.items()},
                "v": {k: torch.full_like(squared(d), tau**2) for k, d in delta.items()},
            }
        m = {k: beta_1 * state["m"][k] + (1 - beta_1) * d for k, d in delta.items()}
        v = {k: second_moment(state["v"][k], d) for k, d in delta.items()}
        return {k: (wide[k] + lr * m[k] / (v[k] ** 0.5 + tau)).to(x[k].dtype) for k in x}, {"m": m, "v": v}

    return step


def fedadagrad(lr: float, beta_1: float, tau: float) -> ServerStep:
    """``v_t = v_{t-1} + D_t^2``."""
    return _adaptive(lr, beta_1, tau, lambda v, d: v + squared(d))


def fedadam(lr: float, beta_1: float, beta_2: float, tau: float) -> ServerStep:
    """``v_t = beta_2 v_{t-1} + (1 - beta_2) D_t^2``."""
    return _adaptive(lr, beta_1, tau, lambda v, d: beta_2 * v + (1 - beta_2) * squared(d))


def fedyogi(lr: float, beta_1: float, beta_2: float, tau: float) -> ServerStep:
    """``v_t = v_{t-1} - (1 - beta_2) D_t^2 sign(v_{t-1} - D_t^2)``."""
    return _adaptive(lr, beta_1, tau, lambda v, d: v - (1 - beta_2) * squared(d) * torch.sign(v - squared(d)))


def run_rounds(
    x: Weights, clients: Callable[[int, Weights], Sequence[tuple[float, Weights]]], step: ServerStep, rounds: int
) -> list[Weights]:
    """The global weights after each of several rounds.

    Args:
        x: The weights at the start.
        clients: ``clients(round, x)`` gives ``(n_k, w_k)`` of each client; rounds count from 1.
        step: The server's step.
        rounds: How many.
    """
    state: State = {}
    after = []
    for round in range(1, rounds + 1):
        sizes, updates = zip(*clients(round, x), strict=True)
        x, state = step(x, weighted_mean(updates, sizes), state)
        after.append(x)
    return after


def fedprox_gradient(gradient: Weights, w: Weights, w_t: Weights, mu: float) -> Weights:
    """The gradient of ``F_k(w) + mu/2 ||w - w_t||^2`` (Li et al. 2020, equation 2): ``grad F_k + mu (w - w_t)``."""
    return {k: g + mu * (w[k] - w_t[k]) for k, g in gradient.items()}


def plain_federated_sgd(
    module: nn.Module,
    batches: Sequence[Sequence[Sequence[Any] | None]],
    sizes: Sequence[float],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    mu: float = 0.0,
    server_step: ServerStep | None = None,
) -> list[Weights]:
    """Federated SGD in plain torch; the state dict after each round.

    Each round, every client of the cohort starts from the global weights with a fresh momentum buffer, makes one SGD
    step a batch (``v = momentum v + g``, ``w = w - lr v``, as torch's SGD) in train mode, and the server takes the mean
    weighted by ``sizes`` over the cohort. Buffers (BatchNorm's statistics) always take the mean.

    Args:
        module: The model; it is trained in place and ends with the last global weights.
        batches: ``batches[round][client]`` is the list of batches in the order in which the client sees them (a second
            local epoch is simply appended), or ``None`` where the client is not in the round's cohort.
        sizes: Each client's number of training examples, whatever its batches.
        loss: ``loss(module, batch)`` gives the scalar to differentiate.
        lr: The clients' learning rate.
        momentum: The clients' momentum.
        mu: Strength of FedProx's term ``mu/2 ||w - w_t||^2``.
        server_step: What the server does with the parameters' mean, such as ``fedadam(...)``; by default it takes it.
    """
    x = {k: v.detach().clone() for k, v in module.state_dict().items()}
    parameters = {k for k, _ in module.named_parameters(remove_duplicate=False)}
    state: State = {}
    after = []
    for round in batches:
        cohort = [(own, size) for own, size in zip(round, sizes, strict=True) if own is not None]
        updates = [_local_sgd(module, x, own, loss, lr, momentum, mu) for own, _ in cohort]
        new = weighted_mean(updates, [size for _, size in cohort])
        if server_step is not None:
            stepped, state = server_step({k: x[k] for k in parameters}, {k: new[k] for k in parameters}, state)
            new = {**new, **stepped}
        x = {k: new[k] for k in x}
        after.append(x)
    module.load_state_dict(x)
    return after


def _local_sgd(
    module: nn.Module, x: Weights, batches: Sequence[Any], loss: Any, lr: float, momentum: float, mu: float
) -> Weights:
    module.load_state_dict(x)
    module.train()
    parameters = dict(module.named_parameters())
    start = {k: p.detach().clone() for k, p in parameters.items()}
    velocity: Weights = {}
    for batch in batches:
        trained = {k: p for k, p in parameters.items() if p.requires_grad}
        gradients = torch.autograd.grad(loss(module, batch), list(trained.values()), allow_unused=True)
        with torch.no_grad():
            for (k, p), g in zip(trained.items(), gradients, strict=True):
                if g is None:
                    continue
                g = g + mu * (p - start[k])
                velocity[k] = momentum * velocity[k] + g if k in velocity else g
                p -= lr * velocity[k]
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def scaffold(
    module: nn.Module,
    batches: Sequence[Sequence[Sequence[Any] | None]],
    loss: Callable[[nn.Module, Any], Tensor],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    option_i: Sequence[Any] | None = None,
    option_ii: float | None = None,
    server_lr: float = 1.0,
    server: Callable[[Weights, Weights], Weights] | None = None,
) -> list[Weights]:
    """Karimireddy et al. 2020, Algorithm 1; the state dict after each round. Buffers take the mean.

    Args:
        module: The model; it is trained in place.
        batches: ``batches[round][client]`` is the list of batches, or ``None`` where the client is not in the cohort.
        loss: ``loss(module, batch)`` gives the scalar to differentiate.
        optimizer: Makes the clients' optimizer, new in each round.
        option_i: For line 12's option I, all data of each client as one batch.
        option_ii: The learning rate for line 12's option II; by default ``c_i+`` is the mean of the recorded gradients.
        server_lr: The server's step.
        server: ``server(x, mean)`` in its place, of parameters.
    """
    x = {k: v.detach().clone() for k, v in module.state_dict().items()}
    names = [k for k, _ in module.named_parameters()]
    c = {k: torch.zeros_like(x[k]) for k in names}
    own = [dict(c) for _ in batches[0]]
    after = []
    for round in batches:
        ys, changes = [], []
        for i, steps in enumerate(round):
            if steps is None:
                continue
            module.load_state_dict(x)
            module.train()
            parameters, local, recorded = dict(module.named_parameters()), optimizer(module.parameters()), []
            for batch in steps:
                local.zero_grad()
                loss(module, batch).backward()
                recorded.append({k: p.grad.clone() for k, p in parameters.items()})
                for k, p in parameters.items():
                    p.grad += c[k] - own[i][k]
                local.step()
            y = {k: v.detach().clone() for k, v in module.state_dict().items()}
            if option_i is not None:
                module.load_state_dict(x)
                module.zero_grad()
                loss(module, option_i[i]).backward()
                new = {k: p.grad.clone() for k, p in module.named_parameters()}
            elif option_ii is None:
                new = {k: sum(g[k].double() for g in recorded).to(x[k].dtype) / len(steps) for k in names}
            else:
                new = {k: own[i][k] - c[k] + (x[k] - y[k]) / (len(steps) * option_ii) for k in names}
            changes.append({k: new[k] - own[i][k] for k in names})
            own[i] = new
            ys.append(y)
        mean = weighted_mean(ys, [1.0] * len(ys))
        if server is None:
            stepped = {k: x[k] + server_lr * (mean[k] - x[k]) for k in names}
        else:
            stepped = server({k: x[k] for k in names}, {k: mean[k] for k in names})
        x = {k: stepped.get(k, mean[k]) for k in x}
        c = {k: c[k] + sum(change[k] for change in changes) / len(round) for k in names}
        after.append(x)
    return after


def fednova_normalizer(steps: int, lr: float, momentum: float, mu: float) -> float:
    """``a_i`` (Wang et al. 2020, section 4): the sum of the coefficients with which a client's gradients count.

    With momentum and a proximal term at once: where one weight would be, from 0, if every gradient were -1.
    """
    a = counter = 0.0
    for _ in range(steps):
        if not momentum:
            a = (1 - lr * mu) * a + 1
            continue
        counter = momentum * counter + 1 - lr * mu * a
        a += counter
    return a


def fednova(
    module: nn.Module,
    batches: Sequence[Sequence[Sequence[Any] | None]],
    sizes: Sequence[float],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    mu: float = 0.0,
) -> list[Weights]:
    """``x + (sum_i p_i a_i) sum_i p_i delta_i / a_i``; arguments and result as ``plain_federated_sgd``.

    In front is with a proximal term what ``a_i`` would be without: the number of steps, where there is no momentum.
    """
    x = {k: v.detach().clone() for k, v in module.state_dict().items()}
    names = [k for k, _ in module.named_parameters()]
    after = []
    for round in batches:
        cohort = [(own, size) for own, size in zip(round, sizes, strict=True) if own is not None]
        total = sum(size for _, size in cohort)
        ys = [_local_sgd(module, x, own, loss, lr, momentum, mu) for own, _ in cohort]
        a = [fednova_normalizer(len(own), lr, momentum, mu) for own, _ in cohort]
        effective = sum(size / total * fednova_normalizer(len(own), lr, momentum, 0.0) for own, size in cohort)
        new = weighted_mean(ys, [size for _, size in cohort])
        for k in names:
            direction = sum(
                size / total * (y[k].double() - x[k].double()) / own
                for y, own, (_, size) in zip(ys, a, cohort, strict=True)
            )
            new[k] = (x[k].double() + effective * direction).to(x[k].dtype)
        x = new
        after.append(x)
    module.load_state_dict(x)
    return after


def feddyn(
    module: nn.Module,
    batches: Sequence[Sequence[Sequence[Any] | None]],
    loss: Callable[[nn.Module, Any], Tensor],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    alpha: float,
    mu: float = 0.0,
    personal: Callable[[str], bool] = lambda name: False,
) -> tuple[list[Weights], list[Weights]]:
    """Acar et al. 2021, Algorithm 1: the clients' mean after each round, and what clients were sent in each.

    The terms stand in the objective, and autograd has their gradients. Buffers take the mean.

    Args:
        module: The model; it is trained in place.
        batches: ``batches[round][client]`` is the list of batches, or ``None`` where the client is not in the cohort.
        loss: ``loss(module, batch)`` gives the scalar to differentiate.
        optimizer: Makes the clients' optimizer, new in each round.
        alpha: The strength of the terms.
        mu: Strength of FedProx's term, in addition.
        personal: Whether a tensor of that name is each client's own, which no term concerns.
    """
    state = {k: v.detach().clone() for k, v in module.state_dict().items()}
    mean = {k: v for k, v in state.items() if not personal(k)}
    own = [{k: v for k, v in state.items() if personal(k)} for _ in batches[0]]
    names = [k for k, _ in module.named_parameters() if not personal(k)]
    h = {k: torch.zeros_like(mean[k]) for k in names}
    linear = [dict(h) for _ in batches[0]]
    after, sent = [], []
    for round in batches:
        x = {k: v - h[k] / alpha if k in h else v for k, v in mean.items()}
        ys = []
        for i, steps in enumerate(round):
            if steps is None:
                continue
            module.load_state_dict({**x, **own[i]})
            module.train()
            local = optimizer(module.parameters())
            for batch in steps:
                objective = loss(module, batch)
                for k, p in ((k, p) for k, p in module.named_parameters() if k in h):
                    objective = objective - (linear[i][k] * p).sum() + (alpha + mu) / 2 * ((p - x[k]) ** 2).sum()
                local.zero_grad()
                objective.backward()
                local.step()
            y = {k: v.detach().clone() for k, v in module.state_dict().items()}
            linear[i] = {k: linear[i][k] - alpha * (y[k] - x[k]) for k in names}
            own[i] = {k: y[k] for k in own[i]}
            ys.append({k: y[k] for k in mean})
        h = {k: h[k] - alpha / len(round) * sum(y[k] - x[k] for y in ys) for k in names}
        mean = weighted_mean(ys, [1.0] * len(ys))
        after.append(mean)
        sent.append(x)
    return after, sent


def personal_sgd(
    module: nn.Module,
    batches: Sequence[Sequence[Sequence[Any] | None]],
    sizes: Sequence[float],
    loss: Callable[[nn.Module, Any], Tensor],
    personal: Callable[[str], bool],
    optimizer: Callable[[Any], torch.optim.Optimizer],
) -> tuple[list[Weights], list[Weights]]:
    """FedAvg over the tensors that are not personal (Arivazhagan et al. 2019, Algorithm 1; Li et al. 2021, FedBN).

    Args:
        module: The model; it is trained in place.
        batches: ``batches[round][client]`` is the list of batches, or ``None`` where the client is not in the cohort.
        sizes: Each client's number of training examples.
        loss: ``loss(module, batch)`` gives the scalar to differentiate.
        personal: Whether a tensor of that name is each client's own.
        optimizer: Makes the clients' optimizer, new in each round.

    Returns:
        The shared tensors after each round, and each client's own tensors at the end.
    """
    x = {k: v.detach().clone() for k, v in module.state_dict().items()}
    own = [{k: v for k, v in x.items() if personal(k)} for _ in sizes]
    shared = {k: v for k, v in x.items() if not personal(k)}
    after = []
    for round in batches:
        updates, counts = [], []
        for i, steps in enumerate(round):
            if steps is None:
                continue
            module.load_state_dict({**shared, **own[i]})
            module.train()
            local = optimizer(module.parameters())
            for batch in steps:
                local.zero_grad()
                loss(module, batch).backward()
                local.step()
            y = {k: v.detach().clone() for k, v in module.state_dict().items()}
            own[i] = {k: y[k] for k in own[i]}
            updates.append({k: y[k] for k in shared})
            counts.append(sizes[i])
        shared = weighted_mean(updates, counts)
        after.append(shared)
    return after, own


def apfl(
    module: nn.Module,
    batches: Sequence[Sequence[Sequence[Any] | None]],
    sizes: Sequence[float],
    loss: Callable[[nn.Module, Any], Tensor],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    alpha: float,
    adaptive: bool = True,
) -> tuple[Weights, list[Weights], list[float]]:
    """Deng et al. 2020, Algorithm 1, over FedAvg; autograd differentiates ``F(alpha v + (1 - alpha) w)``.

    ``alpha`` is moved at a round's first step alone, by the learning rate, and clipped to [0, 1].

    Args:
        module: The model; it is trained in place.
        batches: ``batches[round][client]`` is the list of batches, or ``None`` where the client is not in the cohort.
        sizes: Each client's number of training examples.
        loss: ``loss(function, batch)`` gives the scalar to differentiate.
        optimizer: Makes the clients' optimizers, new in each round.
        alpha: That of all clients at the start.
        adaptive: Whether it is moved.

    Returns:
        The global state dict, each client's mixture (with buffers of its own), and each client's ``alpha``.
    """
    x = {k: v.detach().clone() for k, v in module.state_dict().items()}
    names = [k for k, _ in module.named_parameters()]
    alphas, own, mixtures = [alpha] * len(sizes), [None] * len(sizes), [x] * len(sizes)
    for round in batches:
        updates, counts = [], []
        for i, steps in enumerate(round):
            if steps is None:
                continue
            module.load_state_dict(x)
            module.train()
            first = own[i] or {k: x[k] for k in names}
            v = {k: first[k].clone().requires_grad_() for k in names}
            buffers = {k: t.clone() for k, t in mixtures[i].items() if k not in v}
            buffers = buffers if own[i] else {k: x[k].clone() for k in buffers}
            of_w, of_v = optimizer(module.parameters()), optimizer(list(v.values()))
            for step, batch in enumerate(steps):
                a = torch.tensor(alphas[i], dtype=torch.float64, requires_grad=True)
                bar = {k: a * v[k] + (1 - a) * p.detach() for k, p in module.named_parameters()}
                of_v.zero_grad()
                loss(partial(_with, module, {**bar, **buffers}), batch).backward()
                of_w.zero_grad()
                loss(module, batch).backward()
                of_v.step()
                of_w.step()
                if adaptive and step == 0:
                    alphas[i] = min(max(alphas[i] - of_v.param_groups[0]["lr"] * float(a.grad), 0.0), 1.0)
            y = {k: t.detach().clone() for k, t in module.state_dict().items()}
            own[i] = {k: t.detach().clone() for k, t in v.items()}
            mixtures[i] = {**buffers, **{k: alphas[i] * own[i][k] + (1 - alphas[i]) * y[k] for k in names}}
            updates.append(y)
            counts.append(sizes[i])
        x = weighted_mean(updates, counts)
    return x, mixtures, alphas


def asynchronous(
    x: Weights,
    train: Callable[[Weights, int], Weights],
    update: Callable[[Weights, list[tuple[Weights, Weights, int]]], Weights],
    duration: Callable[[int, int], float],
    choose: Callable[[int], Callable[[list[int]], int]],
    *,
    clients: int,
    concurrency: int,
    buffer_size: int,
    updates: int,
    max_staleness: float = float("inf"),
) -> tuple[Weights, list[tuple[int, int, int]], list[float]]:
    """A server that acts on events, one after the other; clients train when they begin.

    At one instant replies arrive in the order in which their clients began, and updates are made, before others begin.

    Args:
        x: The weights.
        train: ``train(x, client)`` gives what a client makes of them.
        update: ``update(x, [(y, x_began, staleness)])`` gives the new weights.
        duration: ``duration(version + 1, client)``.
        choose: ``choose(version)(idle)`` gives one of the idle clients, ascending: who begins.
        clients, concurrency, buffer_size, updates, max_staleness: Their numbers.

    Returns:
        The weights, ``(client, version, staleness)`` of all replies that are in an update, the times of updates.
    """
    on_their_way: list[tuple[float, int, int, int, Weights, Weights]] = []
    idle, buffer, said, times = set(range(clients)), [], [], []
    now, begun, version, choice = 0.0, 0, 0, choose(0)
    while version < updates:
        arriving = min(on_their_way, default=None, key=lambda work: work[:2])
        if arriving is None or arriving[0] > now:
            while len(on_their_way) < concurrency and idle:
                client = choice(sorted(idle))
                idle.remove(client)
                ends = now + duration(version + 1, client)
                on_their_way.append((ends, begun, client, version, x, train(x, client)))
                begun += 1
            now = min(work[0] for work in on_their_way)
            continue
        on_their_way.remove(arriving)
        _, _, client, began, before, y = arriving
        if version - began > max_staleness:
            idle.add(client)
            continue
        buffer.append((y, before, version - began))
        said.append((client, began, version - began))
        if len(buffer) == buffer_size:
            x, version = update(x, buffer), version + 1
            idle |= {client for client, *_ in said[-buffer_size:]}
            buffer, choice = [], choose(version)
            times.append(now)
    return x, said, times


def fedbuff(discount: Callable[[int], float], lr: float = 1.0) -> Callable[..., Weights]:
    """Nguyen et al. 2022, Algorithm 1: ``x + lr / K sum_i s(tau_i) (y_i - x_i)``."""

    def update(x: Weights, buffer: list[tuple[Weights, Weights, int]]) -> Weights:
        mean = {k: sum(discount(tau) * (y[k] - began[k]) for y, began, tau in buffer) / len(buffer) for k in x}
        return {k: x[k] + lr * mean[k] for k in x}

    return update


def fedasync(discount: Callable[[int], float], alpha: float) -> Callable[..., Weights]:
    """Xie et al. 2019, Algorithm 1: ``(1 - alpha s(tau)) x + alpha s(tau) y``."""

    def update(x: Weights, buffer: list[tuple[Weights, Weights, int]]) -> Weights:
        [(y, _, tau)] = buffer
        part = alpha * discount(tau)
        return {k: (1 - part) * x[k] + part * y[k] for k in x}

    return update


def _with(module: nn.Module, weights: Weights, data: Tensor) -> Tensor:
    return torch.func.functional_call(module, weights, (data,))


def moon(
    module: nn.Module,
    batches: Sequence[Sequence[Sequence[Any] | None]],
    sizes: Sequence[float],
    features: Callable[[nn.Module, Any], Tensor],
    loss: Callable[[nn.Module, Tensor, Any], Tensor],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    mu: float,
    temperature: float,
) -> list[Weights]:
    """Li et al. 2021, Algorithm 1, over FedAvg; the state dict after each round.

    Args:
        module: The model; it is trained in place.
        batches: ``batches[round][client]`` is the list of batches, or ``None`` where the client is not in the cohort.
        sizes: Each client's number of training examples.
        features: ``features(module, batch)`` gives the representation, (batch, size).
        loss: ``loss(module, features, batch)`` gives the supervised loss.
        optimizer: Makes the clients' optimizer, new in each round.
        mu: The strength of the term.
        temperature: Its temperature.
    """
    x = {k: v.detach().clone() for k, v in module.state_dict().items()}
    before: list[Weights | None] = [None for _ in batches[0]]
    after = []
    for round in batches:
        ys = []
        for i, steps in enumerate(round):
            if steps is None:
                continue
            ends, y = [x, before[i] or x], x
            module.load_state_dict(x)
            local = optimizer(module.parameters())
            for batch in steps:
                z_x, z_p = [_without_training(module, end, features, batch) for end in ends]
                module.load_state_dict(y)
                z = features(module.train(), batch)
                near, far = [(nn.functional.cosine_similarity(z, o) / temperature).exp() for o in (z_x, z_p)]
                local.zero_grad()
                (loss(module, z, batch) - mu * (near / (near + far)).log().mean()).backward()
                local.step()
                y = {k: v.detach().clone() for k, v in module.state_dict().items()}
            before[i] = y
            ys.append((sizes[i], y))
        x = weighted_mean([y for _, y in ys], [size for size, _ in ys])
        after.append(x)
    return after


def _without_training(module: nn.Module, weights: Weights, function: Any, batch: Any) -> Tensor:
    module.load_state_dict(weights)
    with torch.no_grad():
        return function(module.eval(), batch)
