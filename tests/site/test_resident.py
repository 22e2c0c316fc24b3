"""A site's loop over connections in memory: which work it does, and when it joins again."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp

from lightning_fed._compat.flower import make_message
from lightning_fed._compat.flower_address import Address, LinkLost, LinkRefuses, LinkStuck
from lightning_fed._compat.flower_link import Traffic
from lightning_fed._compat.flower_node import Received
from lightning_fed.errors import ConfigurationError
from lightning_fed.site import resident
from lightning_fed.site.resident import Membership, Site
from lightning_fed.site.states import StateFolder
from lightning_fed.wire import messages, roll_call
from tests.helpers import in_flower

RUN = "0123456789abcdef"


def work(round: int, stage: str = "train", run: str = RUN, message: Any = None) -> Received:
    """A message to the site: what it is when it is fetched, or the exception that fetching it raises."""
    mark = roll_call.mark_of(run, round, stage)
    bare = make_message(Metadata(1, mark, 1, 7, "", mark, time.time(), 60.0, stage), content=RecordDict())
    return Received(1, mark, message, bare)


class Link:
    """A SuperLink; ``gives`` is what it answers, question by question: work, nothing, or not at all."""

    def __init__(self, *gives: Any) -> None:
        self.gives = list(gives)
        self.joined, self.left, self.done, self.refused = 0, 0, list[str](), list[str]()
        self.answers: list[Exception | None] = []  # to what is sent, one by one; then it is taken
        self.trained = 0

    def connection(self, *_: Any) -> Any:
        return Connection(self)


class Connection:
    is_lost, node_id = False, 7

    def __init__(self, link: Link) -> None:
        self.link, self.traffic = link, Traffic()

    def activate(self, left_behind: int = 0) -> None:
        self.link.joined += 1

    def next(self) -> Received | None:
        if not self.link.gives:
            raise KeyboardInterrupt
        given = self.link.gives.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    def fetch(self, received: Received) -> Message:
        if isinstance(received.tree, Exception):
            raise received.tree
        if received.tree is not None:
            return received.tree  # type: ignore[return-value]
        config = messages.round_config(int(received.group.split("-")[1]), 0)
        message = Message(RecordDict({"config": config, "mark": ConfigRecord({"mark": received.group})}), 7, "train")
        message.metadata.__dict__["_message_id"] = received.group
        return message

    def send(self, reply: Message, seconds: float) -> None:
        if self.link.answers and (error := self.link.answers.pop(0)) is not None:
            raise error
        to = reply.metadata.reply_to_message_id.removeprefix(f"{RUN}-")
        if reply.has_error():
            self.link.refused.append(f"{to}: {messages.raised(reply)[0]}")
        else:
            self.link.done.append(to)

    def close(self, *, forget: bool) -> None:
        self.link.left += 1


@pytest.fixture
def served(tmp_path, monkeypatch):
    """What a site does that gets this from its SuperLink."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        link.trained += 1
        return messages.evaluate_reply(message, 1234, {})

    link = Link()

    def served(*gives: Any, answers: Any = ()) -> Link:
        link.gives, link.answers = list(gives), list(answers)
        monkeypatch.setattr(resident, "NodeConnection", link.connection)
        monkeypatch.setattr(resident, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None))
        monkeypatch.setattr(resident, "gc", SimpleNamespace(freeze=lambda: None))
        member = Membership(Address("somewhere:1", True), 3, SimpleNamespace(), 0.0)  # type: ignore[arg-type]
        in_flower(Site(app, lambda question: None, member, StateFolder(tmp_path, 3)).serve)
        return link

    return served


def test_a_site_that_was_busy_for_long_does_what_the_server_waits_for_and_not_what_it_has_given_up(served):
    link = served(work(1), None, work(1, "evaluate"), work(2), work(2, "evaluate"), work(4), None, None)
    assert link.done == ["1-train", "4-train"]
    assert link.refused == []


def test_a_site_says_of_each_piece_of_work_how_many_examples_it_was(served, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(resident, "rank_zero_info", lines.append)
    assert served(work(3), None).done == ["3-train"]
    [said] = [line for line in lines if "examples" in line]
    assert said.startswith("Round 3, train: 1,234 examples in 0.")


def test_work_of_other_runs_and_the_same_once_more_is_no_work_given_up(served):
    other = "f" * 16
    link = served(work(5, run=other), work(2), work(2), work(1), None, None, None, None, None)
    assert link.done == [f"{other}-5-train", "2-train", "2-train", "1-train"]


def test_a_site_whose_question_gets_no_answer_joins_again_for_it_may_have_been_given_work(served):
    """The SuperLink sends that again where the site comes anew."""
    link = served(work(1), LinkLost("in the middle of it"), None, work(1), None, None)
    assert (link.joined, link.left) == (2, 2)
    assert link.done == ["1-train"]


def of(content: Any) -> Message:
    """A message with a content that Flower itself would not put there."""
    message = make_message(work(1).bare.metadata, content=RecordDict())
    message.__dict__["_content"] = content
    return message


UNREADABLE = {
    "parts that are no message": (IndexError("list index out of range"), "IndexError: list index out of range"),
    "a part that is missing": (KeyError("ab" * 32), "KeyError: 'abab"),
    "terminal escapes": (ValueError("\x1b[2J\n" + "x" * 10_000), r"ValueError: \?\[2J x{200}"),
    "no content": (of(None), "Message content is None"),
    "a number in place of records": (of(5), "AttributeError: 'int' object has no attribute 'values'"),
}


@pytest.mark.parametrize(("message", "said"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_message_that_cannot_be_read_is_refused_in_a_line_and_the_site_stays(served, message, said, recwarn):
    link = served(work(1, message=message), None, work(2), None)
    assert link.done == ["2-train"]
    assert link.joined == 1
    [refused] = link.refused
    assert re.match(f"1-train: .*{said}", refused)
    [line] = [str(one.message) for one in recwarn]
    assert re.search(said, line)
    assert line.isprintable()
    assert len(line) < 400


def test_what_the_superlink_gives_that_cannot_be_read_costs_a_question(served):
    with pytest.warns(UserWarning, match=r"Client 3 cannot read or answer a message: ValueError: Invalid protobuf"):
        link = served(ValueError("Invalid protobuf response payload"), work(1), None)
    assert link.done == ["1-train"]
    assert link.joined == 1


def test_what_a_client_is_refused_for_is_said_in_words_without_a_class(served, tmp_path):
    lost = RecordDict({"lightning-fed.kept": ConfigRecord({"base": f"{RUN}-1-train", "mark": f"{RUN}-2-train"})})
    said = rf"^Round 0, train: client 3 failed: has nothing of {RUN}-1-train in {tmp_path}: .* without ckpt_path\.$"
    with pytest.warns(UserWarning, match=said):
        link = served(work(2, message=of(lost)), None)
    assert len(link.refused) == 1


# ---------------------------------------------------------------------------------------- what cannot be sent


def kept(round: int) -> Received:
    """Work with marks, as a server sends it: a site that has done it gives the same reply again."""
    mark = roll_call.mark_of(RUN, round, "train")
    content = roll_call.with_kept(
        RecordDict({"config": messages.round_config(round, 0)}), roll_call.WorkMarks("", mark)
    )
    message = of(content)
    message.metadata.__dict__["_message_id"] = mark
    return work(round, message=message)


def refusing(status: int, code: int | None = None) -> LinkRefuses:
    return LinkRefuses(f"here:1 answers {status}: a proxy says no", status, code)


def test_a_reply_that_is_not_taken_for_a_while_is_sent_again(served):
    with pytest.warns(UserWarning, match="does not answer, trying again: here:1 answers 429"):
        link = served(kept(1), None, kept(2), None, answers=[LinkLost("here:1 answers 429: slowly")] * 3)
    assert link.done == ["1-train", "2-train"]
    assert (link.trained, link.joined) == (2, 1)


def test_a_reply_of_which_a_part_does_not_get_through_is_sent_anew_where_the_site_joins_again(served):
    with pytest.warns(UserWarning, match="is not there, trying again: here:1 answers 503"):
        link = served(kept(1), None, kept(1), None, answers=[LinkStuck("here:1 answers 503")])
    assert (link.done, link.trained, link.joined) == (["1-train"], 1, 2)


def test_a_reply_that_is_refused_is_the_clients_failure_with_status_and_text(served):
    """The server is told, and need not wait; where a part of the reply is there already, it asks once more."""
    with pytest.warns(UserWarning, match="trying again: here:1 answers 413"):
        link = served(kept(1), None, kept(1), None, kept(2), None, answers=[refusing(413)])
    said = "cannot be sent its work, or send its reply: here:1 answers 413: a proxy says no"
    assert link.refused == [f"1-train: lightning_fed.errors.ClientError: {said}"] * 2
    assert link.done == ["2-train"]
    assert (link.trained, link.joined) == (2, 2)


def test_where_no_reply_is_taken_the_site_joins_again_and_answers_what_it_is_sent_again_without_training(served):
    with pytest.warns(UserWarning, match="trying again: here:1 answers 403"):
        link = served(kept(1), None, kept(1), None, answers=[refusing(403), refusing(403)])
    assert (link.done, link.refused) == (["1-train"], [])
    assert (link.trained, link.joined) == (1, 2)


def test_an_answer_to_the_roll_call_that_is_refused_is_asked_for_again_where_the_site_joins_again(served):
    question = make_message(
        Metadata(1, f"{RUN}-9-query", 1, 7, "", "/9", time.time(), 60.0, "query"), content=roll_call.question({}, 0)
    )
    with pytest.warns(UserWarning, match="trying again: here:1 answers 400"):
        link = served(Received(1, "/9", question, question), None, answers=[refusing(400)])  # type: ignore[arg-type]
    assert (link.joined, link.refused) == (2, [])


def test_a_run_that_is_over_is_left_in_a_line(served, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(resident, "rank_zero_info", lines.append)
    link = served(work(1), None, work(2), None, answers=[refusing(403, resident.RUN_OVER)])
    assert (link.done, link.joined) == (["2-train"], 1)
    assert any("the run is over at the server" in line for line in lines)


# ---------------------------------------------------------------------------------------------------------- clocks


CLOCKS = "do both clocks show the same time? A site's may be at most 5 s ahead of the SuperLink's, and 300 s behind"


def test_a_signature_that_is_not_taken_is_asked_about_clocks_first(served, monkeypatch):
    def activate(self: Connection, left_behind: int = 0) -> None:
        raise LinkRefuses("here:1 answers 401: Invalid SuperNode authentication", 401)

    monkeypatch.setattr(Connection, "activate", activate)
    said = rf"^join\('somewhere:1', client=3\): {re.escape(CLOCKS)}.*answers 401"
    with pytest.raises(ConfigurationError, match=said):
        served()


def test_it_is_asked_after_a_join_too(served):
    with pytest.warns(
        UserWarning, match=rf"SuperLink at somewhere:1 refuses, trying again: here:1 .* {re.escape(CLOCKS)}"
    ):
        link = served(LinkRefuses("here:1 answers 401: Invalid SuperNode authentication", 401), work(1), None)
    assert (link.done, link.joined) == (["1-train"], 2)
