"""Who is behind a SuperLink, by nodes that come, answer, answer badly, and go."""

from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from torch import nn

from lightning_fed._compat.flower import make_message
from lightning_fed._compat.flower_address import LinkLost
from lightning_fed.engines.in_process import InProcessGrid
from lightning_fed.engines.members import Members, Place
from lightning_fed.engines.superlink_grid import Patience, SuperLinkGrid
from lightning_fed.errors import ClientError, ConfigurationError
from lightning_fed.testing import counting_client
from lightning_fed.values.module_form import form_of
from lightning_fed.wire import messages, roll_call
from tests.engines.link import Came
from tests.helpers import in_flower

NOTHING = roll_call.question({}, seed=1)


class Run:
    """A SuperLink with some nodes; ``says`` is what each says when asked: a client's number, a reply, or a function."""

    def __init__(self, **says):
        self.says = {int(name[1:]): said for name, said in says.items()}
        self.since = dict.fromkeys(self.says, "2026-01-01")
        self.asked: list[Message] = []
        self.is_away = False
        self.admits_strangers = True

    def nodes(self):
        return [SimpleNamespace(node_id=node, last_activated_at=self.since[node], name="") for node in self.says]

    def push(self, sent):
        if self.is_away:
            raise LinkLost("away")
        self.asked += sent
        return [str(len(self.asked) - 1)]

    def pull(self, names, most):
        for name in names:
            message = self.asked[int(name)]
            said = self.says.get(message.metadata.dst_node_id, Error(5, "gone"))
            if callable(said):
                said = said(message)
            if isinstance(said, int | str):
                said = client(said)
            reply = said if isinstance(said, Exception | Message | None) else Message(said, reply_to=message)
            of = (reply if isinstance(reply, Message) else message).metadata
            yield name, Came(reply, of.group_id)


def client(number) -> RecordDict:
    return RecordDict({messages.CONFIG: ConfigRecord({messages.CLIENT: number})})


def looked(run: Run, clients: int = 2, times: int = 1) -> Members:
    def main():
        members = Members(run, clients, roll_call.question(form_of(nn.Linear(1, 1)), seed=1))
        for _ in range(times):
            members.look(at_once=True)
        return members

    return in_flower(main)


def test_each_node_is_asked_once_and_is_the_client_that_it_says():
    members = looked(run := Run(n7=1, n9=0), times=3)
    assert members.place_of(1) == Place("2026-01-01", 7)
    assert members.place_of(0) == Place("2026-01-01", 9)
    assert members.missing() == []
    assert len(run.asked) == 2
    assert roll_call.take_form(run.asked[0].content) == form_of(nn.Linear(1, 1))


def test_an_answer_of_a_site_that_was_not_asked_does_not_count_and_the_node_is_asked_again():
    """Flower does not check whose name stands in a reply."""
    run, groups = Run(n7=0), []

    def answer(message):
        groups.append(message.metadata.group_id)
        reply = Message(client(min(len(groups), 2) - 1), reply_to=message)
        if len(groups) == 1:
            reply.metadata.group_id = "/" + 32 * "0"
        return reply

    run.says[7] = answer
    members = looked(run, times=3)
    assert members.missing() == [0]
    assert members.place_of(1) == Place("2026-01-01", 7)
    assert len(set(groups)) == 2


def test_the_node_that_came_last_counts_and_that_is_said_once():
    run = Run(n7=1, n9=1)
    run.since[7] = "2026-01-02"
    with pytest.warns(UserWarning, match="Client 1 is at two nodes, 9 and 7") as said:
        members = looked(run, times=3)
    assert members.place_of(1) == Place("2026-01-02", 7)
    assert len(said) == 1


def test_where_nodes_are_known_by_their_keys_a_client_is_the_first_that_was_it():
    """A site that says that it is another's client is refused by its name, also where the other has left."""
    run = Run(n7=0)
    run.admits_strangers = False

    def nodes():
        names = {7: "hospital-a", 9: "hospital-b"}
        return [SimpleNamespace(node_id=n, last_activated_at=run.since[n], name=names[n]) for n in run.says]

    run.nodes = nodes

    said = r"The site at node 9 \(hospital-b\) says that it is client 0, which node 7 \(hospital-a\), with another key"

    def main():
        members = Members(run, 2, NOTHING)

        def place():
            members.look(at_once=True)
            return members.place_of(0)

        assert place() == (first := Place("2026-01-01", 7))
        run.says[9], run.since[9] = 0, "2026-01-02"
        assert place() == place() == first
        del run.says[7]
        assert place() is None
        run.says[7], run.since[7] = 0, "2026-01-03"
        assert place() == Place("2026-01-03", 7)
        with pytest.raises(ConfigurationError, match=f"(?s)waiting for client 1, .*{said}"):
            members.wait(2, 0.0)

    with pytest.warns(UserWarning, match=said) as warned:
        in_flower(main)
    assert len(warned) == 1


def test_a_node_that_comes_anew_is_asked_anew():
    run = Run(n7=0)

    def main():
        members = Members(run, 1, NOTHING)
        members.look(at_once=True)
        run.since[7] = "2026-01-02"
        members.look(at_once=True)
        assert members.place_of(0) == Place("2026-01-02", 7)
        run.says.clear()
        members.look(at_once=True)
        assert members.place_of(0) is None
        assert members.is_lost(0, 0.0)
        assert not members.is_lost(0, 60.0)

    in_flower(main)


def test_an_answer_of_which_parts_are_missing_holds_up_nobody_and_is_taken_when_it_is_here():
    run = Run(n7=None, n9=1)

    def main():
        members = Members(run, 2, NOTHING)
        members.look(at_once=True)
        assert members.missing() == [0]
        members.look(at_once=True)
        assert len(run.asked) == 2
        members._coming["0"] = Came(Message(client(0), reply_to=run.asked[0]), run.asked[0].metadata.group_id)
        members.look(at_once=True)
        assert members.missing() == []

    in_flower(main)


def test_a_node_that_could_not_be_asked_is_asked_when_the_superlink_answers_again():
    run = Run(n7=0)
    run.is_away = True

    def main():
        members = Members(run, 1, NOTHING)
        with pytest.raises(LinkLost):
            members.look(at_once=True)
        run.is_away = False
        members.look(at_once=True)
        assert members.missing() == []

    in_flower(main)


def unreadable(question: Message) -> Message:
    reply = make_message(question.metadata, content=RecordDict())
    reply.__dict__["_content"] = 5
    return reply


def refusing(question: Message) -> Message:
    """A site of ours; it is raised for the traceback, which is the site's business."""
    try:
        raise ClientError("client 1 has another module")
    except ClientError as error:
        return messages.error_reply(question, error)


MISTAKES = {
    "a refusal of its own": (refusing, "node 7 cannot take part: client 1 has another module$"),
    "a client that the run does not have": (5, "says that it is client 5, and the run has clients 0 to 1"),
    "an error": (Error(2, "another module"), "cannot take part: another module"),
}
STRANGE = {
    "no client": ("zero", "says that it is client 'zero'"),
    "a client below 0": (-1, "says that it is client -1"),
    "a truth": (True, "says that it is client True"),
    "nothing": (RecordDict(), "says that it is client None"),
    "terminal escapes": ("\x1b[2J" * 100_000, r"says that it is client '\\x1b\[2J"),
    "no message": (ValueError("garbage\x1b[2J\n" * 100_000), "gives an answer that cannot be read: ValueError: garb"),
    "no records": (unreadable, "gives an answer that cannot be read: AttributeError"),
}
REFUSED = {**MISTAKES, **STRANGE}


@pytest.mark.parametrize(("says", "said"), REFUSED.values(), ids=REFUSED)
def test_a_site_is_refused_in_one_line_and_the_others_are_taken(says, said):
    def main():
        members = Members(run := Run(n7=says, n9=1), 2, NOTHING)
        for _ in range(2):
            members.look(at_once=True)
        assert members.missing() == [0]
        members.wait(1, 0.0)
        run.says[8], run.since[8] = 0, "2026-01-02"
        members.look(at_once=True)
        assert members.missing() == []
        members.wait(2, 0.0)

    with pytest.warns(UserWarning, match=said) as warned:
        in_flower(main)
    [line] = [str(one.message) for one in warned]
    assert line.isprintable()
    assert len(line) < 450


@pytest.mark.parametrize(("says", "said"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.filterwarnings("ignore:The site at node")
def test_the_start_ends_at_once_where_the_missing_client_is_the_one_that_is_set_up_otherwise(says, said):
    members = looked(Run(n7=says, n9=1))
    with pytest.raises(ConfigurationError, match=said):
        in_flower(lambda: members.wait(2, 600.0))


@pytest.mark.parametrize(
    ("says", "said", "clients"),
    [*((*case, 2) for case in STRANGE.values()), (5, "says that it is client 5, and the run has clients 0 to 2", 3)],
    ids=[*STRANGE, "a client that the run does not have, among two missing"],
)
@pytest.mark.filterwarnings("ignore:The site at node")
def test_where_others_can_come_the_start_waits_for_them_and_says_in_the_end_who_was_refused(says, said, clients):
    members = looked(Run(n7=says, n9=1), clients)
    with pytest.raises(ConfigurationError, match=f"(?s)1 of {clients} clients are here: .* by now.*{said}") as error:
        in_flower(lambda: members.wait(2, 0.2))
    assert len(str(error.value)) < 1000


def test_a_site_that_was_refused_and_left_is_forgotten():
    run = Run(n7=5, n9=1)

    def main():
        members = Members(run, 2, NOTHING)
        with pytest.warns(UserWarning, match="says that it is client 5"):
            members.look(at_once=True)
        del run.says[7]
        members.look(at_once=True)
        with pytest.raises(ConfigurationError, match="waiting for client 0") as error:
            members.wait(2, 0.0)
        assert "client 5" not in str(error.value)

    in_flower(main)


def test_states_of_one_kind_of_engine_are_none_of_the_others():
    mark = roll_call.mark_of("0123456789abcdef", 3, "train")
    network = SuperLinkGrid(SimpleNamespace(run=None), lambda: 2, None, Patience(1, 1))
    network.load_client_states({1: roll_call.as_state(mark)})
    assert network.client_states() == {1: roll_call.as_state(mark)}
    network.begin_round()
    network.keep(0, mark)
    assert list(network.client_states()) == [0, 1]
    assert list(network.client_states(before_round=True)) == [1]
    with pytest.raises(ConfigurationError, match="What client 0 keeps is in the checkpoint"):
        network.load_client_states({0: RecordDict({"fit": ConfigRecord({"bytes": b"1"})})})
    local = InProcessGrid(counting_client(), lambda: 2)
    with pytest.raises(ConfigurationError, match="What client 1 keeps is on its site's own disk"):
        local.load_client_states(network.client_states(before_round=True))
