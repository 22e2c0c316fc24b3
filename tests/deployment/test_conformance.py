"""The SuperLink engine passes the cases of every engine, with a site for each client in a process of its own."""

import multiprocessing
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from lightning_fed._compat.flower_address import Address
from lightning_fed.engines import SuperLink, superlink_grid
from lightning_fed.engines.local_link import local_link
from lightning_fed.engines.members import Members
from lightning_fed.site.resident import Membership, Site
from lightning_fed.site.states import StateFolder
from lightning_fed.testing import ENGINE_CASES
from lightning_fed.wire.messages import CLIENT, CONFIG
from tests.deployment.processes import free_port

pytestmark = [pytest.mark.landing, pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")]


@pytest.fixture(scope="module")
def port():
    with local_link(port := free_port()):
        yield port


class WithSites(SuperLink):
    """Its sites are forks of this process, made when they are first waited for: then the module has been set up."""

    def __init__(self, port: int, folder: Path):
        super().__init__(f"127.0.0.1:{port}", insecure=True)
        self.folder = folder

    def run(self, main, client_app, num_clients):
        sites = []

        def with_sites(*args):
            fork = multiprocessing.get_context("fork")
            for client in range(num_clients()):
                sites.append(fork.Process(target=self.serve, args=(client_app, client)))
                sites[-1].start()
            return Members(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(superlink_grid, "Members", with_sites)
            try:
                return super().run(main, client_app, num_clients)
            finally:
                for site in sites:
                    site.terminate()
                for site in sites:
                    site.join()

    def serve(self, client_app, client: int) -> None:
        def answer(message, context):
            if message.metadata.message_type == MessageType.QUERY:
                return Message(RecordDict({CONFIG: ConfigRecord({CLIENT: client})}), reply_to=message)
            return client_app(message, context)

        member = Membership(Address(self.where.server, insecure=True), client, None, 0.0)
        states = StateFolder(self.folder / str(client), client)
        Site(answer, lambda question: None, member, states).serve()


@pytest.mark.parametrize("case", ENGINE_CASES, ids=lambda case: case.__name__)
def test_engine_conforms(case, port, tmp_path):
    case(WithSites(port, tmp_path))
