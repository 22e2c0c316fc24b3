"""A copied record of a logged number is one that Lightning constructs."""

import pytest
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_fed._compat.results import result_metric, same_metadata


def metadata(reduce_fx="mean", **how):
    made = _Metadata("training_step", "loss", reduce_fx=reduce_fx, **how)
    made.sync = _Sync()
    return made


def plain(held):
    """What a record holds, as something to compare; what leads to itself by its name."""
    if isinstance(held, Tensor):
        return held.tolist(), held.dtype, held.device, held.is_inference(), held.requires_grad
    if isinstance(held, dict):
        return type(held), {name: plain(value) for name, value in held.items()}
    return held.__name__ if callable(held) else held


@pytest.mark.parametrize("reduce_fx", ["mean", "sum", "min", "max", max])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", [{}, {"on_step": True}, {"on_step": True, "on_epoch": False}])
def test_copied_record_is_as_constructed(reduce_fx, inference, dtype, how):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.inference_mode(inference):
            result_metric(metadata(reduce_fx), True).update(torch.tensor(5.0), 3)  # which the next must not see
            meta = metadata(reduce_fx, **how)
            copied, constructed = result_metric(meta, True), _ResultMetric(meta, True)
            assert type(copied) is type(constructed)
            assert list(vars(copied)) == list(vars(constructed))
            assert {n: plain(v) for n, v in vars(copied).items()} == {n: plain(v) for n, v in vars(constructed).items()}
            for step, value in enumerate((1.0, 3.0, 2.0)):
                for one in (copied, constructed):
                    one.forward(torch.tensor(value), step + 1)
            assert plain(copied.compute()) == plain(constructed.compute())
            assert plain(vars(copied)) == plain(vars(constructed))
            for one in (copied, constructed):
                one.reset()
            assert plain(vars(copied)) == plain(vars(constructed))
    finally:
        torch.set_default_dtype(before)


def test_records_share_nothing_that_is_written_to():
    meta = metadata()
    one, other = result_metric(meta, True), result_metric(meta, True)
    for name, held in vars(one).items():
        if isinstance(held, (Tensor, dict, set)):
            assert held is not vars(other)[name], name
    one.update(torch.tensor(2.0), 4)
    assert float(other.value) == 0


def test_record_of_a_metric_is_lightnings():
    assert vars(result_metric(metadata(), False)).keys() == vars(_ResultMetric(metadata(), False)).keys()
    metric = MeanMetric()
    record = result_metric(metadata(), False)
    metric.update(3.0)
    record.update(metric, 1)
    assert record.value is metric


@pytest.mark.parametrize("reduce_fx", ["mean", "sum", "min", "max", max])
@pytest.mark.parametrize("sync", [{}, {"_should": True}, {"rank_zero_only": True}])
def test_metadata_of_another_fit_are_those_that_lightning_would_make(reduce_fx, sync):
    def logged(fn):
        made = _Metadata("training_step", "loss", prog_bar=True, on_step=True, reduce_fx=reduce_fx)
        made.sync = _Sync(fn=fn, **sync)
        return made

    def reduce(value, reduce_op=None, group=None):
        return value + 1, reduce_op, group

    kept = same_metadata(logged(len), None)
    again, lightnings = same_metadata(kept, reduce), logged(reduce)
    assert again == lightnings
    assert again.sync.op == lightnings.sync.op == {max: "max"}.get(reduce_fx, reduce_fx)
    assert again.sync.__call__(1.0) == lightnings.sync.__call__(1.0)
    assert kept.sync.fn is None
