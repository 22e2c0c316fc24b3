"""The batches of vectorized clients: each client's own, in its own order, stacked."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_fed._compat.torch import tree_flatten, tree_unflatten
from lightning_fed.client.local.fast_loop import PlacedBatch
from lightning_fed.client.vectorized.rng import NotStackable, Streams
from lightning_fed.values.data import Gathered, TensorBatches, gathering


@dataclass
class StackedBatch(PlacedBatch):
    """Clients whose batches have the same shapes.

    Attributes:
        rows: Which they are, (clients,) int64; ``None`` for all.
        batch: Their batches, every tensor (clients, ...).
    """

    rows: Tensor | None
    batch: Any

    def is_at(self, device: torch.device) -> bool:
        """See ``PlacedBatch``."""
        return type(self.batch) is list and all(type(p) is Tensor and p.device == device for p in self.batch)

    def to(self, *args: Any, **kwargs: Any) -> StackedBatch:
        """Return the same on a device."""
        leaves, tree = tree_flatten(self.batch)
        moved = [leaf.to(*args, **kwargs) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return StackedBatch(None if self.rows is None else self.rows.to(*args, **kwargs), tree_unflatten(moved, tree))


class StackedLoader(DataLoader[Any]):
    """Goes through the loaders of several clients at once; each draws from its client's stream what it draws alone.

    Args:
        loaders: The clients' loaders, all with the same number of batches.
        streams: The clients' random streams.
    """

    def __init__(self, loaders: Sequence[Any], streams: Streams) -> None:
        # Lightning asks anything but a DataLoader for an iterator to see whether it can, and loaders would draw.
        super().__init__(range(len(loaders[0])), batch_size=1)  # type: ignore[arg-type]
        self._own, self._streams = [gathering(loader) for loader in loaders], streams
        self._batches: Generator[list[StackedBatch], None, None] | None = None
        self._are_tensors = all(
            type(loader) is DataLoader
            and type(loader.dataset) is Gathered
            and type(loader.batch_sampler) is TensorBatches
            for loader in self._own
        )

    def __len__(self) -> int:
        return len(self._own[0])

    def __iter__(self) -> Iterator[list[StackedBatch]]:  # type: ignore[override]
        # Not a generator: what a loader draws when it is asked for an iterator, it draws now.
        iterators = []
        for client, loader in enumerate(self._own):
            with self._streams.torch_of(client) if self._are_tensors else self._streams.of(client):
                iterators.append(iter(loader))
        self._batches = self._of_tensors() if self._are_tensors else self._of_anything(iterators)
        return self._batches

    def release(self) -> None:
        """Let the last batch go, which a trainer that is over would keep."""
        if self._batches is not None:
            self._batches.close()

    def _of_tensors(self) -> Generator[list[StackedBatch], None, None]:
        """Tensor data sets: an epoch's order is drawn at once, and a batch is one indexing call."""
        gather = _Gather([loader.dataset.whole for loader in self._own])
        orders = []
        for client, (loader, begin) in enumerate(zip(self._own, gather.begins, strict=True)):
            with self._streams.torch_of(client):
                order = loader.dataset.where(loader.batch_sampler.order()) + begin
            orders.append(order.to(loader.dataset.whole[0].device).split(loader.batch_sampler.batch_size))
        for step in range(len(self)):
            yield [
                StackedBatch(rows, gather(clients, [orders[client][step] for client in clients]))
                for rows, clients in _alike([len(order[step]) for order in orders])
            ]

    def _of_anything(self, iterators: list[Iterator[Any]]) -> Generator[list[StackedBatch], None, None]:
        for _ in range(len(self)):
            batches = []
            for client, iterator in enumerate(iterators):
                with self._streams.of(client):
                    batches.append(tree_flatten(next(iterator)))
            kinds = [repr((tree, [_kind(leaf) for leaf in leaves])) for leaves, tree in batches]
            yield [
                StackedBatch(
                    rows, tree_unflatten(_stack([batches[client][0] for client in clients]), batches[clients[0]][1])
                )
                for rows, clients in _alike(kinds)
            ]


class _Gather:
    """Takes clients' examples out of their tensors; batches of one shape lie in the same memory, one after the other.

    Fresh memory for each would have to be mapped page by page, which takes longer than the copy. Where all clients'
    tensors are parts of one, as those of a ``Partition`` are, a batch is one indexing call for all clients.

    Args:
        tensors: Each client's.

    Attributes:
        begins: What to add to each client's indices.
    """

    def __init__(self, tensors: Sequence[Sequence[Tensor]]) -> None:
        if len({len(own) for own in tensors}) > 1:
            raise NotStackable("clients' examples have different numbers of tensors")
        self._tensors = tensors
        self._wholes: list[Tensor] = []
        self._memory: dict[tuple[int, int, int], Tensor] = {}
        self.begins = [0] * len(tensors)
        wholes, begins = zip(*(_whole(column) for column in zip(*tensors, strict=True)), strict=True)
        if begins[0] is not None and all(begin == begins[0] for begin in begins):
            self._wholes, self.begins = list(wholes), begins[0]

    def __call__(self, clients: Sequence[int], chosen: Sequence[Tensor]) -> list[Tensor]:
        """Return the chosen examples of some clients, each tensor (clients, examples, ...)."""
        size = len(clients), len(chosen[0])
        if self._wholes:
            where = [torch.cat(list(chosen))]
            return [self._rows(number, [whole], where, size) for number, whole in enumerate(self._wholes)]
        columns = zip(*(self._tensors[client] for client in clients), strict=True)
        return [self._rows(number, column, chosen, size) for number, column in enumerate(columns)]

    def _rows(self, number: int, sources: Sequence[Tensor], chosen: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        key = number, *size
        if key not in self._memory:
            if len({(own.shape[1:], own.dtype) for own in sources}) > 1:
                raise NotStackable("clients' examples have different shapes or dtypes")
            self._memory[key] = sources[0].new_empty(*size, *sources[0].shape[1:])
        memory = self._memory[key]
        each = memory.view(len(sources), size[0] * size[1] // len(sources), *memory.shape[2:])
        for own, indices, rows in zip(sources, chosen, each, strict=True):
            torch.index_select(own, 0, indices.to(own.device), out=rows)
        return memory


def _whole(parts: Sequence[Tensor]) -> tuple[Tensor, list[int] | None]:
    """Return a tensor that all are parts of, and the row at which each begins; ``None`` if they do not lie in one."""
    first, row = parts[0], parts[0].stride(0)
    start = min(int(part.storage_offset()) for part in parts)
    apart = [int(part.storage_offset()) - start for part in parts]
    if row <= 0 or len({_layout(part) for part in parts}) > 1 or any(offset % row for offset in apart):
        return first, None
    begins = [offset // row for offset in apart]
    rows = max(begin + len(part) for begin, part in zip(begins, parts, strict=True))
    return first.as_strided((rows, *first.shape[1:]), first.stride(), start), begins


def _layout(part: Tensor) -> tuple[Any, ...]:
    """Return what parts of one tensor have in common."""
    memory = part.untyped_storage()
    return (
        *(memory.data_ptr(), memory.nbytes(), part.shape[1:], part.stride()),
        *(part.dtype, part.is_conj(), part.is_neg()),
    )


def _alike(kinds: Sequence[Any]) -> list[tuple[Tensor | None, list[int]]]:
    """Clients by kind of batch, as rows and as a list; no rows where all are of one kind."""
    by_kind: dict[Any, list[int]] = {}
    for client, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(client)
    if len(by_kind) == 1:
        return [(None, list(range(len(kinds))))]
    return [(torch.tensor(clients), clients) for clients in by_kind.values()]


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    if leaf is None or isinstance(leaf, (str, bytes, int, float, bool)):
        return leaf
    raise NotStackable(f"a batch holds a {type(leaf).__name__}")


def _stack(batches: list[list[Any]]) -> list[Any]:
    return [
        torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*batches, strict=True)
    ]


def batches_of(loader: Any) -> int:
    """Return the number of batches of a client's loader.

    Raises:
        NotStackable: If nothing tells, or the batches cannot be taken from here.
    """
    if isinstance(loader, (dict, list, tuple)) and not _is_batches(loader):
        raise NotStackable("a client has several train loaders")
    if isinstance(loader, DataLoader):
        if isinstance(loader.dataset, IterableDataset):
            raise NotStackable("its data is an IterableDataset")
        if loader.num_workers:
            raise NotStackable(
                f"its DataLoader has num_workers={loader.num_workers}, which would start that many for each client"
            )
    try:
        return len(loader)
    except TypeError:
        raise NotStackable(f"nothing tells how many batches a {type(loader).__name__} has") from None


def _is_batches(loader: Any) -> bool:
    """Return whether a list is one of batches, and not of loaders."""
    return isinstance(loader, list) and not any(
        hasattr(one, "__next__") or isinstance(one, DataLoader) for one in loader
    )
