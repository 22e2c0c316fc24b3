"""What Lightning keeps private and a federation needs: its loops, its record of what is logged, its calls of hooks."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, RichProgressBar
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher as DataFetcher
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher as IterDataFetcher
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher as PrefetchDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop as LightningFitLoop
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization as LightningAutomaticOptimization
from lightning.pytorch.loops.optimization.manual import _ManualOptimization as LightningManualOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop as LightningEpochLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.configuration_validator import _verify_loop_configurations as verify_loops
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection as ResultCollection
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric as ResultMetric
from lightning.pytorch.utilities import CombinedLoader

__all__ = [
    "DataFetcher",
    "IterDataFetcher",
    "LightningAutomaticOptimization",
    "LightningEpochLoop",
    "LightningFitLoop",
    "LightningManualOptimization",
    "PrefetchDataFetcher",
    "ResultCollection",
    "ResultMetric",
    "verify_loops",
]

# What Lightning sets on a module that it trains, or evaluates.
SET_ON_MODULES = frozenset({"_trainer", "trainer", "_fabric", "_current_fx_name", "_metric_attributes"})
# What leads from a module back to its trainer.
TO_TRAINER = frozenset({"_trainer", "trainer", "_fabric"})
# What it sets while the module's hooks run.
WHILE_HOOKS_RUN = frozenset({"_current_fx_name", "_metric_attributes"})
# What callbacks of its own keep of the server.
SET_ON_CALLBACKS = frozenset({"_logger", "_param_requires_grad_state"})
# Where ``module.compile()`` keeps what cannot be pickled.
COMPILER = "_compiler_ctx"

# ------------------------------------------------------------------------------------------------- modules


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the trainer that a module is attached to; ``module.trainer`` raises where there is none."""
    return module._trainer


def running_hook(module: Any) -> str | None:
    """Return the hook in which a module is, by which Lightning tells what may be logged."""
    return module._current_fx_name


def set_running_hook(module: Any, name: str | None) -> None:
    """Say in which hook a module is, without the search of ``nn.Module.__setattr__``."""
    module.__dict__["_current_fx_name"] = name


def optimizes_automatically(module: LightningModule) -> bool:
    """Return ``automatic_optimization`` as the user set it, whatever a view makes of it."""
    return module._automatic_optimization


def on_before_transfer(module: LightningModule, batch: Any) -> Any:
    """Call the module's hook of that name, or the datamodule's."""
    return module._on_before_batch_transfer(batch, dataloader_idx=0)


class ChoosesBatches:
    """A base for views of modules: batch hooks of module and datamodule get what is a batch, and nothing else."""

    def _fed_is_batch(self, batch: Any) -> bool:
        """Return whether the hooks get it."""
        return True

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        return super()._on_before_batch_transfer(batch, dataloader_idx) if self._fed_is_batch(batch) else batch  # type: ignore[misc]

    def _apply_batch_transfer_handler(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._apply_batch_transfer_handler(batch, *args, **kwargs) if self._fed_is_batch(batch) else batch  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------- calls


def call_callbacks(trainer: Trainer, name: str, *args: Any) -> None:
    """Call a hook of all callbacks."""
    call._call_callback_hooks(trainer, name, *args)


def call_module(trainer: Trainer, name: str, *args: Any) -> Any:
    """Call a hook of the module."""
    return call._call_lightning_module_hook(trainer, name, *args)


def to_device(trainer: Trainer, batch: Any) -> Any:
    """Move a batch to the trainer's device by the hooks that do so."""
    return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def clip_gradients(trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
    """Clip gradients as the trainer is told to, by the module's hook."""
    clipping = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    trainer.precision_plugin._clip_gradients(module, optimizer, *clipping)


def attach_data(trainer: Trainer, module: LightningModule, **given: Any) -> None:
    """Take a fit's arguments, as a fit does first.

    Args:
        trainer: A trainer that has not begun.
        module: The module.
        **given: The loaders and the datamodule.
    """
    trainer._callback_connector._attach_model_logging_functions()
    trainer._data_connector.attach_data(module, **given)


def prepare_data(trainer: Trainer) -> None:
    """Call the hooks that prepare data and set up, as a fit does next."""
    trainer._data_connector.prepare_data()
    call._call_setup_hook(trainer)


def configure_model(trainer: Trainer) -> None:
    """Call the module's hook of that name, under the strategy's context."""
    call._call_configure_model(trainer)


def tear_down(trainer: Trainer) -> None:
    """End a fit: take its loops down and call the hooks."""
    trainer.fit_loop.teardown()
    call._call_teardown_hook(trainer)


# ------------------------------------------------------------------------------------------------- what is logged


def results_of(trainer: Any) -> Any:
    """Return what the loop that runs has logged by hook and name, or ``None`` where none runs."""
    return trainer._results


def loop_results(loop: Any) -> Any:
    """Return what one loop has logged."""
    return loop._results


def set_loop_results(loop: Any, results: ResultCollection) -> None:
    """Give a loop that has not begun what it is to log into."""
    loop._results = results


def last_value(result: Any) -> Any:
    """Return what the last call of ``log`` gave."""
    return result._forward_cache


def batch_size_for(results: ResultCollection, metric: ResultMetric, batch_size: int | None) -> Any:
    """Return the number of examples by which a logged value is weighed."""
    return results._extract_batch_size(metric, batch_size, metric.meta)


def begin_batch(trainer: Trainer, batch: Any) -> None:
    """Tell what is logged that a batch begins."""
    trainer._logger_connector.on_batch_start(batch)


def end_batch(trainer: Trainer) -> None:
    """Tell what is logged that a batch is over."""
    results = results_of(trainer)
    if any(result.meta.on_step for result in results.values()):
        trainer._logger_connector.on_batch_end()
    else:  # nothing has a value yet
        results.batch = results.batch_size = None


def is_first_log_of(trainer: Any, hook: str | None) -> bool:
    """Return whether Lightning has yet to reset, at the next ``log``, what a hook logged in the epoch before."""
    connector = trainer._logger_connector
    return connector._current_fx != hook and connector._first_loop_iter is not False


def note_log_of(trainer: Any, hook: str | None) -> None:
    """Tell what is logged that a hook has logged."""
    trainer._logger_connector._current_fx = hook


def shown_metrics(trainer: Trainer) -> tuple[dict[str, Any], ...]:
    """Return the values that stay after an epoch: for callbacks, for loggers, for the progress bar."""
    connector = trainer._logger_connector
    return connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics


# ------------------------------------------------------------------------------------------------- loops


class LightningEvaluationLoop(_EvaluationLoop):
    """Lightning's, whose step has a public name."""

    def _evaluation_step(self, *args: Any) -> None:
        self.evaluate_batch(*args)

    def evaluate_batch(self, *args: Any) -> None:
        """Evaluate one batch."""
        super()._evaluation_step(*args)


def skips_backward(optimization: LightningAutomaticOptimization) -> bool:
    """Return whether steps have no backward pass, as while weights are averaged."""
    return optimization._skip_backward


def warn_once(loop: LightningEpochLoop, message: str) -> None:
    """Warn in a loop, the first time."""
    loop._warning_cache.warn(message)


def is_last_ready_batch(loop: LightningEpochLoop) -> bool:
    """Return whether the epoch has as many batches behind it as it is to have."""
    return loop._num_ready_batches_reached()


def is_training_done(loop: LightningEpochLoop) -> bool:
    """Return whether batches or steps have come to their end."""
    return loop._is_training_done


def count_step(loop: LightningEpochLoop) -> None:
    """Count a batch that stepped, by which loggers count."""
    loop._batches_that_stepped += 1


def data_fetcher(loop: Any) -> DataFetcher | None:
    """Return what gives the batches of a fit that has begun."""
    return loop._data_fetcher


def combined_loader(loop: Any) -> CombinedLoader | None:
    """Return all loaders of a fit or of an evaluation that has begun."""
    return loop._combined_loader


def iterators_of(fetcher: DataFetcher) -> list[Any]:
    """Return the iterators of the loaders from which a fetcher that has begun takes a batch each at a time."""
    return getattr(fetcher.combined_loader._iterator, "iterators", [])


def is_in_turn(loaders: CombinedLoader) -> bool:
    """Return whether loaders come one after the other, and not a batch of each at a time."""
    return loaders._mode == "sequential"


def set_last_reload(loop: Any, epoch: int) -> None:
    """Say in which epoch the train loaders were made, for ``reload_dataloaders_every_n_epochs``."""
    loop._last_train_dl_reload_epoch = epoch


def set_train_source(trainer: Trainer, loaders: Any) -> None:
    """Give a fit its train loaders, whatever the datamodule says."""
    trainer.fit_loop._data_source.instance = loaders


# ------------------------------------------------------------------------------------------------- callbacks


def rates(monitor: LearningRateMonitor, trainer: Trainer) -> dict[str, float]:
    """Return what a monitor would log now, by name."""
    return monitor._extract_stats(trainer, "any")


def show_metrics(bar: RichProgressBar, trainer: Trainer, module: LightningModule) -> None:
    """Show a bar's metrics as they are now."""
    bar._update_metrics(trainer, module)


class LightningRichBar(RichProgressBar):
    """Lightning's, whose description has a public name."""

    def _get_train_description(self, current_epoch: int) -> str:
        return self.describe_round(current_epoch)

    def describe_round(self, current_epoch: int) -> str:
        """Return what stands before the bar."""
        return super()._get_train_description(current_epoch)
