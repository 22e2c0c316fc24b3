"""Private names of third parties stand in ``_compat/`` only, and each is still there, as we rely on it."""

import ast
import importlib
import inspect
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import flwr
import flwr_datasets
import lightning.pytorch
import numpy as np
import pytest
import torch
import torchmetrics
from flwr.app import Array, Message, RecordDict
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner
from torch import nn

from lightning_fed._compat.flower import server_identity
from lightning_fed.state.generators import is_global
from lightning_fed.views import View

ROOT = Path(__file__).parents[2] / "lightning_fed"
MODULES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
COMPAT = [name for name in MODULES if name.startswith("_compat/")]
# Where private names come from.
SOURCES = {
    lightning.pytorch: ("**/*.py",),
    torchmetrics: ("metric.py", "collections.py"),
    torch: ("_tensor.py", "nn/modules/module.py", "nn/parameter.py", "optim/**/*.py", "utils/data/**/*.py"),
    flwr: ("app/**/*.py", "common/*.py", "serverapp/**/*.py", "clientapp/**/*.py", "supercore/task_identity.py"),
    flwr_datasets: ("partitioner/*.py",),
}


def is_private(name: str) -> bool:
    # IPython's ways to show an object (``_repr_png_``) are documented, and written by whoever is shown.
    is_shown = name.startswith("_repr_") and name.endswith("_")
    return name.startswith("_") and not name.startswith("__") and name != "_" and not is_shown


def defined(source: str) -> frozenset[str]:
    """The private attributes, methods and variables that a source makes."""
    return frozenset(name for name in _defined(ast.parse(source)) if is_private(name))


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        for target in [part for one in targets for part in (one.elts if isinstance(one, ast.Tuple) else [one])]:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) in ("self", "cls"):
                yield target.attr
            elif isinstance(target, ast.Name):
                yield target.id
                if target.id == "__slots__" and isinstance(node, ast.Assign):
                    yield from ast.literal_eval(node.value)


@cache
def of_others() -> frozenset[str]:
    """All private names in the sources of those that we build upon."""
    files = [path for party, patterns in SOURCES.items() for p in patterns for path in Path(party.__path__[0]).glob(p)]
    assert len(files) > 200
    return frozenset().union(*(defined(path.read_text(encoding="utf-8")) for path in files))


@cache
def our_own() -> frozenset[str]:
    return frozenset().union(*(defined(path.read_text()) for path in MODULES.values()))


def private_uses(source: str) -> Iterator[str]:
    """What a source uses that is private to others."""
    tree, own = ast.parse(source), defined(source)
    words = {id(arg) for call in ast.walk(tree) if isinstance(call, ast.Call) for arg in call.args if _is_of_text(call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            is_own = ast.unparse(node.value) in ("self", "cls", "super()") and node.attr in own
            if not is_own and (node.attr in of_others() or node.attr not in our_own()):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("lightning_fed", "__")):
            yield from (n for n in (*(node.module or "").split("."), *(a.name for a in node.names)) if is_private(n))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in words:
            is_name = node.value.isidentifier() and is_private(node.value)
            if is_name and node.value in of_others() and node.value not in own:
                yield node.value


def _is_of_text(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr in ("endswith", "removesuffix", "startswith")


@pytest.mark.parametrize("name", [name for name in MODULES if name not in COMPAT])
def test_private_names_of_others_stand_in_compat_only(name):
    assert sorted(private_uses(MODULES[name].read_text())) == []


@pytest.mark.parametrize("name", [name for name in MODULES if name not in COMPAT])
def test_private_methods_of_others_are_overridden_in_compat_only(name):
    path = ".".join(["lightning_fed", *name.removesuffix(".py").split("/")]).removesuffix(".__init__")
    classes = [one for one in vars(importlib.import_module(path)).values() if inspect.isclass(one)]
    for cls in (one for one in classes if one.__module__ == path):
        under = (
            (lightning.pytorch.LightningModule, lightning.pytorch.LightningDataModule) if issubclass(cls, View) else ()
        )
        others = [one for one in (*cls.__mro__, *under) if not one.__module__.startswith("lightning_fed")]
        own = {key for key, value in vars(cls).items() if inspect.isfunction(value) and is_private(key)}
        assert not any(key in vars(one) for one in others for key in own)


def test_reader_of_private_names_sees_them_in_all_their_ways():
    source = """
from torch._dynamo import OptimizedModule
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
class Mine:
    __slots__ = ("_computed",)
    def __init__(self):
        self._own = 1
        self._results = 2
    def use(self, trainer):
        trainer._results, self._own, self._results, trainer._data_connector.attach
        getattr(trainer, "_fabric"), trainer.__dict__["_trainer"], "name_step".endswith("_step"), "_computed"
"""
    found = {"_dynamo", "_request_dataloader", "_results", "_data_connector", "_fabric", "_trainer"}
    assert set(private_uses(source)) == found


# ------------------------------------------------------------------------------------------------- each of them

PL = "lightning.pytorch."
CONNECTORS = f"{PL}trainer.connectors."
# What is imported -> its parameters, or None for a class or a value.
IMPORTED = {
    f"{PL}loops.evaluation_loop._EvaluationLoop": None,
    f"{PL}loops.fetchers._DataFetcher": None,
    f"{PL}loops.fetchers._DataLoaderIterDataFetcher": None,
    f"{PL}loops.fetchers._PrefetchDataFetcher": None,
    f"{PL}loops.optimization.automatic._AutomaticOptimization": None,
    f"{PL}loops.optimization.manual._ManualOptimization": None,
    f"{PL}loops.fit_loop._FitLoop": None,
    f"{PL}loops.training_epoch_loop._TrainingEpochLoop": None,
    f"{CONNECTORS}data_connector._DataLoaderSource": None,
    f"{CONNECTORS}logger_connector.result._ResultCollection": None,
    f"{CONNECTORS}logger_connector.result._ResultMetric": None,
    f"{CONNECTORS}logger_connector.result._Sync": [*("fn", "_should", "rank_zero_only", "_op", "_group")],
    f"{PL}utilities.signature_utils.is_param_in_hook_signature": ["hook_fx", "param", "explicit", "min_args"],
    f"{CONNECTORS}data_connector._request_dataloader": ["data_source"],
    f"{PL}loops.fit_loop._request_dataloader": ["data_source"],
    f"{PL}trainer.configuration_validator._verify_loop_configurations": ["trainer"],
    f"{PL}trainer.trainer._verify_loop_configurations": ["trainer"],
    f"{PL}trainer.trainer.isolate_rng": ["include_cuda"],
    f"{CONNECTORS}callback_connector._load_external_callbacks": ["group"],
    f"{PL}trainer.setup._log_device_info": ["trainer"],
    f"{PL}trainer.call._call_callback_hooks": ["trainer", "hook_name", "args", "monitoring_callbacks", "kwargs"],
    f"{PL}trainer.call._call_lightning_module_hook": ["trainer", "hook_name", "args", "pl_module", "kwargs"],
    f"{PL}trainer.call._call_strategy_hook": ["trainer", "hook_name", "args", "kwargs"],
    f"{PL}trainer.call._call_setup_hook": ["trainer"],
    f"{PL}trainer.call._call_configure_model": ["trainer"],
    f"{PL}trainer.call._call_teardown_hook": ["trainer"],
    "numpy.random.mtrand._rand": None,
    "torch._dynamo.OptimizedModule": None,
    "torch._dynamo.config.patch": None,
    "torch._dynamo.backends.registry.lookup_backend": ["compiler_fn"],
    "torch._inductor.config.patch": None,
    "torch._C._autograd._saved_tensors_hooks_enable": None,
    "torch.autograd._profiler_enabled": None,
    "torch._C._functorch.is_functorch_wrapped_tensor": None,
    "torch.optim.optimizer._global_optimizer_pre_hooks": None,
    "torch.optim.optimizer._global_optimizer_post_hooks": None,
    "torch.utils._python_dispatch.TorchDispatchMode": None,
    "torch.utils.data.dataloader._DatasetKind": None,
    "torch.utils.data.dataloader._SingleProcessDataLoaderIter": ["loader"],
    "torch.utils._pytree.tree_flatten": ["tree", "is_leaf"],
    "torch.utils._pytree.tree_leaves": ["tree", "is_leaf"],
    "torch.utils._pytree.tree_unflatten": ["leaves", "treespec"],
    "flwr.app.message.make_message": ["metadata", "content", "error"],
    "flwr.common.constant.SUPERLINK_NODE_ID": None,
    "flwr.app.message.remove_content_from_message": ["message"],
    "flwr.cli.build.build_fab_from_files": ["files"],
    "flwr.common.constant.Status.FINISHED": None,
    "flwr.common.constant.SubStatus.COMPLETED": None,
    "flwr.common.constant.SubStatus.FAILED": None,
    "flwr.common.constant.SYSTEM_TIME_TOLERANCE": None,
    "flwr.common.constant.TIMESTAMP_TOLERANCE": None,
    "flwr.common.serde.context_from_proto": ["context_proto"],
    "flwr.common.serde.context_to_proto": ["context"],
    "flwr.common.serde.fab_to_proto": ["fab"],
    "flwr.common.serde.message_from_proto": ["message_proto"],
    "flwr.common.serde.message_to_proto": ["message"],
    "flwr.common.serde.run_from_proto": ["run_proto"],
    "flwr.common.serde.user_config_to_proto": ["user_config"],
    "flwr.supercore.constant.TaskType.SERVER_APP": None,
    "flwr.supercore.error.ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED": None,
    "flwr.supercore.error.ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED": None,
    "flwr.supercore.error.ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED": None,
    "flwr.supercore.error.ApiErrorCode.RUNTIME_AUTHENTICATION_FAILED": None,
    "flwr.supercore.error.ApiErrorCode.RUN_ID_NOT_FOUND": None,
    "flwr.supercore.error.FlowerError.from_json": ["value"],
    "flwr.supercore.fab.Fab": ["hash_str", "content", "verifications"],
    "flwr.supercore.inflatable.inflatable_object.get_all_nested_objects": ["obj"],
    "flwr.supercore.inflatable.inflatable_object.get_object_tree": ["obj"],
    "flwr.supercore.inflatable.inflatable_object.iterate_object_tree": ["tree"],
    "flwr.supercore.inflatable.inflatable_object.no_object_id_recompute": [],
    "flwr.supercore.inflatable.inflatable_protobuf_utils.make_pull_object_fn_protobuf": [
        *("pull_object_protobuf", "node", "run_id")
    ],
    "flwr.supercore.inflatable.inflatable_protobuf_utils.make_push_object_fn_protobuf": [
        *("push_object_protobuf", "node", "run_id", "session_id")
    ],
    "flwr.supercore.inflatable.inflatable_utils.ObjectPullError": None,
    "flwr.supercore.inflatable.inflatable_utils.ObjectPushError": None,
    "flwr.supercore.inflatable.inflatable_utils.ObjectUnavailableError": ["object_id"],
    "flwr.supercore.inflatable.inflatable_utils.inflate_object_from_contents": ["object_id", "object_contents"],
    "flwr.supercore.inflatable.inflatable_utils.pull_objects": ["object_ids", "pull_object_fn"],
    "flwr.supercore.inflatable.inflatable_utils.push_objects": ["objects", "push_object_fn"],
    "flwr.supercore.interceptors.RuntimeTokenHttpInterceptor": ["token"],
    "flwr.supercore.interceptors.RuntimeVersionHttpInterceptor": ["component_name"],
    "flwr.supercore.interceptors.SuperExecAuthHttpInterceptor": ["master_secret", "protected_methods"],
    "flwr.supercore.primitives.asymmetric.generate_key_pairs": [],
    "flwr.supercore.primitives.asymmetric.public_key_to_bytes": ["public_key"],
    "flwr.supercore.run.Run.create_empty": ["run_id"],
    "flwr.supernode.node_auth_http_interceptor.NodeAuthHttpInterceptor": ["private_key", "public_key"],
    "flwr.supercore.task_identity.TaskIdentity": None,
}
FLEET, RUNTIME = "flwr.supernode.fleet_http_client.FleetHttpClient", "flwr.supercore.runtime.RuntimeHttpClient"
CONTROL = "flwr.supercore.control.control_http_client.ControlHttpClient"
# The calls of Flower's APIs, by client.
CALLS = {
    CONTROL: "ListRuns StartRun StopRun",
    FLEET: "ActivateNode ConfirmMessageReceived DeactivateNode PullMessages PullObject PushMessages PushObject"
    " RegisterNode SendNodeHeartbeat UnregisterNode",
    RUNTIME: "AcquireTask ConfirmMessageReceived GetNodes PullMessages PullObject PullTaskInput PushMessages PushObject"
    " PushTaskOutput SendTaskHeartbeat",
}
# The fields of Flower's messages, by module and class.
FIELDS = {
    "control_pb2.StartRunRequest": "fab override_config",
    "control_pb2.ListRunsResponse": "run_dict",
    "control_pb2.StopRunRequest": "run_id",
    "fleet_pb2.ActivateNodeRequest": "public_key heartbeat_interval",
    "fleet_pb2.ActivateNodeResponse": "node_id",
    "fleet_pb2.DeactivateNodeRequest": "node_id",
    "fleet_pb2.PullMessagesRequest": "node",
    "fleet_pb2.PullMessagesResponse": "messages_list message_object_trees",
    "fleet_pb2.PushMessagesRequest": "node messages_list message_object_trees clientapp_runtime_list",
    "fleet_pb2.PushMessagesResponse": "objects_to_push session_id",
    "fleet_pb2.RegisterNodeFleetRequest": "public_key",
    "fleet_pb2.UnregisterNodeFleetRequest": "node_id",
    "heartbeat_pb2.SendNodeHeartbeatRequest": "node heartbeat_interval",
    "heartbeat_pb2.SendNodeHeartbeatResponse": "success",
    "message_pb2.ConfirmMessageReceivedRequest": "node run_id message_object_id",
    "message_pb2.ObjectTree": "object_id children",
    "node_pb2.NodeInfo": "node_id last_activated_at name",
    "runtime_pb2.AcquireTaskRequest": "supported_task_types",
    "runtime_pb2.AcquireTaskResponse": "task token",
    "runtime_pb2.GetNodesResponse": "nodes",
    "runtime_pb2.PullAppMessagesRequest": "message_ids",
    "runtime_pb2.PullAppMessagesResponse": "messages_list message_object_trees",
    "runtime_pb2.PullTaskInputResponse": "context run",
    "runtime_pb2.PushAppMessagesRequest": "messages_list message_object_trees",
    "runtime_pb2.PushAppMessagesResponse": "message_ids objects_to_push session_id",
    "runtime_pb2.PushTaskOutputRequest": "context sub_status details",
    "runtime_pb2.SendTaskHeartbeatResponse": "success",
}
# The methods that are called or overridden -> their parameters after ``self``.
METHODS = {
    (f"{PL}Trainer", "_run"): ["model", "ckpt_path"],
    (f"{PL}Trainer", "_run_stage"): [],
    (f"{PL}Trainer", "_run_sanity_check"): [],
    (f"{PL}LightningModule", "_on_before_batch_transfer"): ["batch", "dataloader_idx"],
    (f"{PL}LightningModule", "_apply_batch_transfer_handler"): ["batch"],
    (f"{PL}callbacks.LearningRateMonitor", "_extract_stats"): ["trainer", "interval"],
    (f"{PL}callbacks.RichProgressBar", "_update_metrics"): ["trainer", "pl_module"],
    (f"{PL}callbacks.RichProgressBar", "_get_train_description"): ["current_epoch"],
    (f"{PL}loops.evaluation_loop._EvaluationLoop", "_evaluation_step"): ["batch", "batch_idx"],
    (f"{PL}loops.training_epoch_loop._TrainingEpochLoop", "_num_ready_batches_reached"): [],
    (f"{PL}plugins.precision.Precision", "_clip_gradients"): ["model", "optimizer"],
    (f"{CONNECTORS}callback_connector._CallbackConnector", "_attach_model_logging_functions"): [],
    (f"{CONNECTORS}checkpoint_connector._CheckpointConnector", "_select_ckpt_path"): [
        "state_fn",
        "ckpt_path",
    ],
    (f"{CONNECTORS}checkpoint_connector._CheckpointConnector", "resume_end"): [],
    (f"{CONNECTORS}data_connector._DataConnector", "attach_data"): ["model", "train_dataloaders"],
    (f"{CONNECTORS}data_connector._DataConnector", "prepare_data"): [],
    (f"{CONNECTORS}logger_connector.result._ResultCollection", "_extract_batch_size"): [
        *("value", "batch_size", "meta")
    ],
    (f"{CONNECTORS}logger_connector.result._ResultMetric", "_wrap_compute"): ["compute"],
    (f"{CONNECTORS}signal_connector._SignalConnector", "register_signal_handlers"): [],
    ("torchmetrics.Metric", "_wrap_update"): ["update"],
    ("torch.nn.Module", "_load_from_state_dict"): ["state_dict", "prefix", "local_metadata", "strict"],
}


def found(path: str) -> object:
    """What stands at a path of modules, classes and attributes."""
    parts, thing = path.split("."), None
    for i in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for name in parts[i:]:
            thing = getattr(thing, name)
        return thing
    raise AssertionError(f"no module of {path}")


@pytest.mark.parametrize(("path", "parameters"), IMPORTED.items(), ids=IMPORTED)
def test_private_name_is_there_and_takes_what_it_is_given(path, parameters):
    thing = found(path)
    if parameters is not None:
        assert list(inspect.signature(thing).parameters)[: len(parameters)] == parameters


each_call = [(client, call) for client, calls in CALLS.items() for call in calls.split()]


@pytest.mark.parametrize(("client", "call"), each_call, ids=map(".".join, each_call))
def test_call_of_flowers_api_is_there(client, call):
    assert list(inspect.signature(getattr(found(client), call)).parameters) == ["self", "request"]


def test_clients_of_flowers_apis_are_made_of_an_address():
    for client in CALLS:
        taken = inspect.signature(found(client).from_server_address).parameters
        assert list(taken)[:4] == ["server_address", "insecure", "root_certificates", "interceptors"]


@pytest.mark.parametrize(("message", "fields"), FIELDS.items(), ids=FIELDS)
def test_fields_of_flowers_messages_are_there(message, fields):
    assert set(fields.split()) <= {field.name for field in found(f"flwr.proto.{message}").DESCRIPTOR.fields}


@pytest.mark.parametrize(("method", "parameters"), METHODS.items(), ids=[".".join(key) for key in METHODS])
def test_private_method_is_there_and_takes_what_it_is_given(method, parameters):
    taken = list(inspect.signature(getattr(found(method[0]), method[1])).parameters)[1:]
    assert taken[: len(parameters)] == parameters or {"args", "kwargs"} <= set(taken)


def _trainer():
    return lightning.pytorch.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False)


def _record_metadata():
    return importlib.import_module(f"{CONNECTORS}logger_connector.result")._Metadata("training_step", "loss")


def _metadata():
    with server_identity(1):
        return Message(RecordDict(), 1, "train").metadata


def _chunked():
    array = Array(np.zeros(1))
    array.deflate()
    return array


def _scheduled():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    return schedule


OBJECTS = {
    "trainer": _trainer,
    "fit_loop": lambda: _trainer().fit_loop,
    "epoch_loop": lambda: _trainer().fit_loop.epoch_loop,
    "validate_loop": lambda: _trainer().validate_loop,
    "optimization": lambda: _trainer().fit_loop.epoch_loop.automatic_optimization,
    "logger_connector": lambda: _trainer()._logger_connector,
    "loaders": lambda: lightning.pytorch.utilities.CombinedLoader([], "sequential"),
    "lightning_module": lightning.pytorch.LightningModule,
    "module": lambda: nn.Linear(1, 1),
    "state_dict": lambda: nn.Linear(1, 1).state_dict(),
    "tensor": lambda: torch.zeros(1),
    "sparse": lambda: torch.zeros(1).to_sparse(),
    "storage": lambda: torch.zeros(1).untyped_storage(),
    "operator": lambda: torch.ops.aten.add.Tensor,
    "metric": torchmetrics.MeanMetric,
    "schedule": _scheduled,
    "sequence": lambda: torch.optim.lr_scheduler.ChainedScheduler([_scheduled()]),
    "optimizer": lambda: _scheduled().optimizer,
    "sampler": lambda: torch.utils.data.RandomSampler(range(2)),
    "loader": lambda: torch.utils.data.DataLoader(range(2)),
    "batches": lambda: iter(torch.utils.data.DataLoader(range(2))),
    "record_metadata": _record_metadata,
    "record": RecordDict,
    "metadata": _metadata,
    "chunked": _chunked,
    "partitioner": lambda: IidPartitioner(2),
    "dirichlet": lambda: DirichletPartitioner(2, "label", 1.0),
}
# The attributes of objects, by whose they are.
ATTRIBUTES = {
    "trainer": "_callback_connector _checkpoint_connector _data_connector _logger_connector _signal_connector _results",
    "fit_loop": "_combined_loader _data_fetcher _data_source _last_train_dl_reload_epoch",
    "epoch_loop": "_batches_that_stepped _is_training_done _results _warning_cache",
    "validate_loop": "_combined_loader _results",
    "optimization": "_skip_backward",
    "logger_connector": "_callback_metrics _current_fx _first_loop_iter _logged_metrics _progress_bar_metrics",
    "loaders": "_iterator _mode",
    "lightning_module": "_automatic_optimization _compiler_ctx _current_fx_name _fabric _metric_attributes _trainer",
    "module": "_buffers _compiled_call_impl _load_state_dict_pre_hooks _parameters",
    "state_dict": "_metadata",
    "tensor": "_backward_hooks _post_accumulate_grad_hooks _version",
    "sparse": "_indices _nnz _values",
    "storage": "_cdata",
    "operator": "_schema",
    "metric": "_computed _defaults _forward_cache _reductions _update_count",
    "schedule": "_last_lr _step_count",
    "sequence": "_schedulers",
    "optimizer": "_opt_called _optimizer_step_post_hooks _optimizer_step_pre_hooks",
    "sampler": "_num_samples",
    "loader": "_iterator",
    "batches": "_dataset_kind _next_data _num_yielded",
    "record_metadata": "_sync",
    "record": "_data",
    "metadata": "_message_id _src_node_id",
    "chunked": "_chunks",
    "partitioner": "_num_partitions",
    "dirichlet": "_num_partitions _partition_by",
}
each_attribute = [(name, attribute) for name, held in ATTRIBUTES.items() for attribute in held.split()]


@pytest.mark.parametrize(("name", "attribute"), each_attribute, ids=map(".".join, each_attribute))
def test_private_attribute_is_there(name, attribute):
    assert hasattr(OBJECTS[name](), attribute)


def test_those_who_send_flowers_messages_are_told_by_three_variables():
    from flwr.supercore.task_identity import TaskIdentity

    assert {"_task_id", "_run_id", "_node_id"} <= vars(TaskIdentity).keys()


def test_generators_of_everybody_are_known():
    assert all(map(is_global, (random._inst, np.random.mtrand._rand, torch.default_generator)))
    assert not any(map(is_global, (random.Random(1), np.random.RandomState(1), torch.Generator())))


@pytest.mark.parametrize("name", COMPAT)
def test_every_private_name_in_compat_has_a_row_here(name):
    rows = {part for path in IMPORTED for part in path.split(".")} | {method for _, method in METHODS}
    rows |= {attribute for _, attribute in each_attribute}
    rows |= {"_task_id", "_run_id", "_node_id"}  # of Flower's TaskIdentity, above
    rows |= {"_logger", "_param_requires_grad_state"}  # no more than names that workers are not told of
    assert set(private_uses(MODULES[name].read_text())) - rows == set()
