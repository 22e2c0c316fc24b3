"""One round of toy clients on a grid that is not ours."""

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from lightning_fed.callbacks import FederatedCallback
from lightning_fed.callbacks.base import CohortOwner, FailureOwner
from lightning_fed.errors import ClientError
from lightning_fed.server import roster
from lightning_fed.server.rounds import Rounds
from lightning_fed.strategies import WeightedMean
from lightning_fed.testing import counting_client, toy_weights
from lightning_fed.wire import messages
from tests.helpers import SuperLinkLike, in_flower

NODES = {9_000_000_017: 2, 31: 0, 5_555_555_555_555: 3, 77: 1}  # address -> client


def grid_of(app: ClientApp, nodes: dict[int, int] = NODES, **kwargs) -> SuperLinkLike:
    return SuperLinkLike(app, {node: {messages.CLIENT: client} for node, client in nodes.items()}, **kwargs)


class Diary(FederatedCallback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.errors: list[ClientError] = []
        self.logged: dict[str, float] = {}

    def on_round_start(self, trainer, round, stage, cohort):
        self.lines.append(f"{round} {stage} starts {list(cohort)}")

    def on_client_end(self, trainer, round, stage, report):
        self.lines.append(f"{round} {stage} client {report.client} x{report.num_examples:g}")

    def on_client_error(self, trainer, round, stage, error):
        self.lines.append(f"{round} {stage} client {error.client} fails")
        self.errors.append(error)

    def on_round_end(self, trainer, round, metrics):
        self.lines.append(f"{round} ends")
        metrics["added"] = 1.0
        self.logged = metrics


def rounds_on(grid, strategy=None, **kwargs) -> Rounds:
    defaults = {
        "callbacks": [],
        "cohorts": CohortOwner(),
        "failures": FailureOwner(),
        "trainer": None,
        "module": nn.Module(),
        "seed": 0,
        "timeout": 60.0,
    }
    arguments = {**defaults, **kwargs}
    known = roster.RollCall(grid, arguments["timeout"], arguments["cohorts"].min_available_clients)
    return Rounds(grid, known, strategy or WeightedMean(), **arguments)


def run(app, strategy=None, round=1, weights=None, evaluate=False, grid=None, **kwargs):
    """One round on a grid that is not ours."""
    grid = grid or grid_of(app)
    weights = toy_weights() if weights is None else weights
    return in_flower(lambda: rounds_on(grid, strategy, **kwargs).run(round, weights, evaluate))


def unchanged(client: int, message: Message) -> Message:
    """Replies with the weights that came."""
    return messages.train_reply(message, messages.read_instruction(message).weights, 1, {})


def client(train, evaluate=None) -> ClientApp:
    """An app of two functions ``f(client, message) -> reply`` that also answers the roll call."""
    app = ClientApp()
    for kind, function in (("train", train), ("evaluate", evaluate)):
        if function is not None:

            def serve(message, context, function=function):
                return function(int(context.node_config[messages.CLIENT]), message)

            getattr(app, kind)()(serve)
    return with_query(app)


def with_query(app: ClientApp) -> ClientApp:
    """The public toys do not answer the roll call; now they do."""

    @app.query()
    def who(message, context):
        record = ConfigRecord({messages.CLIENT: context.node_config[messages.CLIENT]})
        return Message(RecordDict({messages.CONFIG: record}), reply_to=message)

    return app


COUNTING = with_query(counting_client())


class Gives(FedAvg):
    """Aggregates to what it is told to."""

    def __init__(self, gives):
        super().__init__()
        self.gives = gives

    def aggregate_train(self, server_round, replies):
        list(replies)
        return self.gives(), None
