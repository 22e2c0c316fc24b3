"""What a server and its sites tell each other beside the work."""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from torch import nn

from lightning_fed._compat.flower_address import LinkLost, LinkUntrusted
from lightning_fed.errors import ConfigurationError
from lightning_fed.values.module_form import difference, form_of
from lightning_fed.wire import messages, roll_call
from lightning_fed.wire.address import Where, untrusted
from tests.helpers import in_flower

RUN = "0123456789abcdef"


def test_a_question_carries_the_form_of_the_servers_module():
    form = form_of(nn.BatchNorm1d(2))
    content = roll_call.question(form, seed=7, rounds=9)
    told = in_flower(lambda: messages.read_told(Message(content, 1, "query")))
    assert (told.seed, told.rounds) == (7, 9)
    assert roll_call.take_form(content) == form
    assert roll_call.take_form(content) is None


def test_modules_differ_in_names_shapes_kinds_and_in_what_is_frozen():
    def frozen(value: float) -> nn.Module:
        layer = nn.Linear(1, 1)
        layer.weight.data.fill_(value)
        return layer.requires_grad_(False)

    one = nn.Linear(2, 1)
    assert not difference(form_of(one), form_of(nn.Linear(2, 1)))
    assert not difference(form_of(one), form_of(nn.Linear(2, 1).bfloat16()))
    said = difference(form_of(one), form_of(nn.Linear(3, 1)))
    assert said == "'weight' is float [1, 2] at the server and float [1, 3] at the site"
    assert "'bias' (float [1]) is at the server and not" in difference(
        form_of(one), form_of(nn.Linear(2, 1, bias=False))
    )
    assert "float [1, 2] frozen at the site" in difference(form_of(one), form_of(nn.Linear(2, 1).requires_grad_(False)))
    same, other = frozen(1.0), frozen(2.0)
    same.bias.data.zero_()
    other.bias.data.zero_()
    assert not difference(form_of(same), form_of(same))
    assert "not trained have other values" in difference(form_of(same), form_of(other))


def test_marks_become_names_of_files_and_are_looked_at_before():
    mark = roll_call.mark_of(RUN, 3, "train")
    content = roll_call.with_kept(RecordDict({"config": ConfigRecord({"a": 1})}), roll_call.WorkMarks("", mark))
    assert roll_call.take_kept(content) == roll_call.WorkMarks("", mark)
    assert roll_call.take_kept(content) is None
    for bad in ("../../etc/passwd", f"{RUN}-3-train/..", "", f"{RUN}-3-query"):
        with pytest.raises(ValueError, match="no marks of work"):
            roll_call.take_kept(roll_call.with_kept(RecordDict(), roll_call.WorkMarks("", bad)))


def test_a_checkpoint_has_where_a_client_keeps_what_it_keeps():
    state = roll_call.as_state(f"{RUN}-3-train")
    assert roll_call.from_state(state) == f"{RUN}-3-train"
    assert roll_call.from_state(RecordDict({"fit": ConfigRecord({"bytes": b""})})) is None
    for bad in ("../../etc/passwd", ""):
        with pytest.raises(ValueError, match="is no mark of work"):
            roll_call.from_state(roll_call.as_state(bad))
    empty = roll_call.as_state("")
    next(iter(empty.values())).clear()
    with pytest.raises(ValueError, match="'None' is no mark of work"):
        roll_call.from_state(empty)


def test_a_server_that_goes_on_has_given_up_what_came_before_in_its_run():
    def mark(round, stage="train", run=RUN):
        return roll_call.mark_of(run, round, stage)

    assert roll_call.is_overtaken(mark(9), mark(10))
    assert roll_call.is_overtaken(mark(9), mark(9, "evaluate"))
    assert roll_call.is_overtaken(mark(9, "evaluate"), mark(10))
    for earlier, later in [(9, 9), (10, 9)]:
        assert not roll_call.is_overtaken(mark(earlier), mark(later))
    assert not roll_call.is_overtaken(mark(9, "evaluate"), mark(9))
    assert not roll_call.is_overtaken(mark(9, run=RUN[::-1]), mark(10))
    assert not roll_call.is_overtaken("", mark(10))
    assert not roll_call.is_overtaken(mark(9), "")


def test_what_flower_says_of_a_lost_node_is_no_reply():
    from flwr.app import Error

    def main():
        message = Message(RecordDict(), 3, "train")
        return [Message(Error(code, "said"), reply_to=message) for code in (5, 3, 2)]

    lost, gone, raised = in_flower(main)
    assert roll_call.is_lost(lost)
    assert roll_call.is_lost(gone)
    assert not roll_call.is_lost(raised)
    assert roll_call.is_lost(LinkLost())
    assert not roll_call.is_lost(ValueError())


BAD = ["localhost", "http://localhost:8000", "localhost:", ":80", 8000, "::1:8000", "a:²", "a:0", "a:99999", "a b:1"]


@pytest.mark.parametrize("server", BAD)
def test_what_is_no_address_is_refused(server):
    with pytest.raises(ConfigurationError, match="write 'host:port'"):
        Where("join", server)


def test_an_address_may_be_one_of_ipv6_in_brackets():
    assert Where("join", "[::1]:8000", True).address().server == "[::1]:8000"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"nonsense", b"0\x82\x01\x0a"])
def test_certificates_that_are_none_are_named(tmp_path, content):
    (tmp_path / "ca.pem").write_bytes(content)
    with pytest.raises(
        ConfigurationError, match=r"join\(root_certificates='.*ca.pem'\): .*no certificates in PEM form"
    ):
        Where("join", "a:1", False, tmp_path / "ca.pem").address()


def test_an_expired_certificate_is_said_first():
    expired = LinkUntrusted("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired")
    assert untrusted(expired).startswith("the SuperLink's certificate has expired, or this machine's clock is wrong (")
    early = LinkUntrusted("certificate verify failed: certificate is not yet valid")
    assert untrusted(early).startswith(
        "the SuperLink's certificate is not valid yet, or this machine's clock is wrong ("
    )
    other = LinkUntrusted("self-signed certificate")
    assert untrusted(other).startswith(
        "there is no trusted connection: self-signed certificate. Write root_certificates="
    )


def test_certificates_without_tls_are_refused_and_missing_ones_named(tmp_path):
    with pytest.raises(ConfigurationError, match="no certificates without TLS"):
        Where("join", "a:1", True, tmp_path)
    with pytest.raises(ConfigurationError, match=r"join\(root_certificates='.*none.pem'\): it cannot be read"):
        Where("join", "a:1", False, tmp_path / "none.pem").address()


def test_what_only_the_receiver_is_told_does_not_change_which_work_is_overtaken():
    earlier, later = roll_call.mark_of(RUN, 7, "train"), roll_call.mark_of(RUN, 8, "train")
    assert roll_call.group_of(earlier) != roll_call.group_of(earlier)
    assert roll_call.is_overtaken(roll_call.group_of(earlier), roll_call.group_of(later))
    assert not roll_call.is_overtaken(roll_call.group_of(later), roll_call.group_of(earlier))
    assert not roll_call.is_overtaken(roll_call.group_of(), roll_call.group_of(later))
