"""Work for clients behind a SuperLink: sent to where they are, sent again when their site was lost, and collected."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, Message, Metadata
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed._compat.flower import make_message
from lightning_fed._compat.flower_link import readdress
from lightning_fed._compat.flower_server import ReplyUnderWay
from lightning_fed.engines.members import Place
from lightning_fed.engines.remote import AHEAD, TimeLimit
from lightning_fed.engines.sigterm import Sigterm
from lightning_fed.errors import ClientError
from lightning_fed.wire import messages, packing, roll_call

if TYPE_CHECKING:
    from lightning_fed.engines.superlink_grid import SuperLinkGrid

# Seconds between two questions whether there are replies.
POLL = 0.1
# Bytes of a reply beside its weights: the states of metrics that keep all predictions.
BESIDE = 1 << 27
# How often a client's work is sent before its site counts as one that cannot do it.
TRIES = 3
_LOST = f"was lost {TRIES} times at this work: does its process run out of memory?"
_STRANGERS = f"was sent its work {TRIES} times, and a site that does not have it has answered."
_UNKNOWN = (
    f"was sent its work {TRIES} times, and the SuperLink, or somebody in its name, says that it does not have it."
)


@dataclass
class Work:
    """One client's work.

    Attributes:
        client: The client.
        message: As the loop sent it.
        place: Where it is, or was when it was lost.
        sent: The message as it is sent there, until the SuperLink has all of it: what is sent again is the same.
        names: Flower's names of the messages that are under way; an answer to any will do.
        coming: By these names, the answers of which parts are missing.
        outages: How often the SuperLink had not answered when it was sent.
        kept: What it begins with and leaves.
        group: The ``group_id`` of all messages that were sent, which a reply has to have.
        tries: How often it was sent.
        strangers: How many replies had another.
        unknown: How often the SuperLink, or somebody in its name, did not know it.
        reply: What came of it, until somebody takes it.
        is_over: Whether something came of it.
    """

    client: int
    message: Message
    place: Place | None = None
    sent: Message | None = None
    names: set[str] = field(default_factory=set)
    coming: dict[str, ReplyUnderWay] = field(default_factory=dict)
    outages: int = 0
    kept: roll_call.WorkMarks | None = None
    group: str = ""
    tries: int = 0
    strangers: int = 0
    unknown: int = 0
    reply: Message | None = None
    is_over: bool = False

    def end(self, reply: Message) -> None:
        """Note that something came of it."""
        self.reply, self.is_over = reply, True
        self.names.clear()
        self.coming.clear()


class SiteDelivery:
    """One ``send_and_receive``: sends work to where the clients are, and collects the replies.

    Args:
        grid: Whose clients work.
        works: Their work.
        timeout: Seconds for all of it.
    """

    def __init__(self, grid: SuperLinkGrid, works: Sequence[Work], timeout: float | None) -> None:
        self.grid, self.works, self.deadline = grid, works, TimeLimit(timeout)
        self.packer = packing.Packer()
        self.most = grid.max_reply_bytes or max([_most(work.message) for work in works], default=0)

    def replies(self) -> Iterator[Message]:
        """Give the replies in the order of the messages; those that do not come in time are left out.

        Raises:
            SIGTERMException: If this process is asked to end while it waits.
        """
        sigterm = Sigterm()
        with sigterm.listening():
            with sigterm.ends():
                self.grid.patiently(lambda: self.grid.members.look(at_once=True))
            for index, work in enumerate(self.works):
                with sigterm.ends():
                    self._wait_for(index)
                if work.reply is not None:
                    reply, work.reply = work.reply, None
                    yield reply
                    del reply

    def _wait_for(self, index: int) -> None:
        work = self.works[index]
        while not work.is_over:
            came = self.grid.patiently(lambda: self.turn(index))
            if work.is_over or self.deadline.is_up:
                break
            if not came:
                time.sleep(POLL)

    def turn(self, first: int) -> bool:
        """Send what is to be sent, and take in what is there, of the first works that are missing.

        Returns:
            Whether something came.
        """
        if not self.deadline.is_up:  # else a site would be busy in the next round with what nobody waits for
            self._send()
        works = self.works[first : first + AHEAD]
        waiting = {name: work for work in works for name in work.names - work.coming.keys()}
        for name, coming in self.grid.served.pull(list(waiting), self.most) if waiting else ():
            waiting[name].coming[name] = coming
        came = [self._take(work, name) for work in works for name in list(work.coming)]
        self.grid.members.look()
        return any(came)

    def _send(self) -> None:
        members, ready = self.grid.members, []
        for work in self.works:
            place = members.place_of(work.client)
            is_under_way = bool(work.names) and place in (work.place, None)
            if work.is_over or (is_under_way and (place is None or work.outages == self.grid.outages)):
                continue  # if its node is lost, Flower says so; but a SuperLink that was away may have lost the message
            if place is None:
                if members.is_lost(work.client, self.grid.patience.back):
                    self._fail(work, "is not here: no site has joined as this client, or the one that did has left.")
            elif work.tries == TRIES:
                self._fail(work, _STRANGERS if work.strangers else _UNKNOWN if work.unknown else _LOST)
            else:
                if work.sent is None or work.place != place:
                    work.place, work.sent = place, self._addressed(work, place)
                ready.append(work)
        if not ready:
            return
        names = self.grid.served.push([work.sent for work in ready if work.sent is not None])
        for work, name in zip(ready, names, strict=True):
            work.tries += not work.names or work.outages == self.grid.outages
            work.sent, work.outages = None, self.grid.outages
            work.names |= {name} - {""}

    def _addressed(self, work: Work, place: Place) -> Message:
        work.kept = self.grid.kept_by(work.client, work.message)
        work.group = work.group or roll_call.group_of(work.kept.mark)
        content = self.packer.pack(roll_call.with_kept(work.message.content, work.kept))
        of = work.message.metadata
        metadata = Metadata(
            run_id=self.grid.served.run.run_id,
            message_id="",
            src_node_id=of.src_node_id,
            dst_node_id=place.node_id,
            reply_to_message_id="",
            group_id=work.group,
            created_at=time.time(),
            ttl=of.ttl,
            message_type=of.message_type,
        )
        return make_message(metadata=metadata, content=content)

    def _take(self, work: Work, name: str) -> bool:
        """Take in a reply, unless parts of it are missing; return whether it was taken."""
        if (coming := work.coming.get(name)) is None or (reply := coming.take()) is None:  # another of the same is here
            return False
        work.names.discard(name)
        del work.coming[name]
        # The SuperLink's own words have the group of the message, or none where it does not know that.
        if coming.group in (work.group, "") and roll_call.is_lost(reply):
            work.unknown += not coming.group
            self.grid.members.look(at_once=True)
            return True
        if coming.group != work.group:
            self._leave_out(work)
            return True
        try:
            if isinstance(reply, Exception):
                raise reply
            if not reply.has_error():
                if roll_call.takes_kept(reply.content) and work.kept is not None:
                    self.grid.keep(work.client, work.kept.mark)
                packing.unpack_content(reply.content)
        except Exception as error:
            self._fail(work, messages.unreadable(error))
            return True
        of = work.message.metadata
        work.end(readdress(reply, sender=of.dst_node_id, group=of.group_id))
        return True

    def _leave_out(self, work: Work) -> None:
        """Leave out a reply of a site that does not have the work; the SuperLink takes no other to that message."""
        work.strangers += 1
        rank_zero_warn(
            f"A site that does not have client {work.client}'s work has answered it: that reply is left out, and the"
            " work is sent again."
        )

    def _fail(self, work: Work, why: str) -> None:
        work.end(messages.error_reply(work.message, ClientError(why)))


def _most(message: Message) -> int:
    """Return how many bytes a reply may have: twice the weights that were sent, as of floats in twice the width."""
    records = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
    return BESIDE + 2 * sum(messages.tensor_of(array).nbytes for record in records for array in record.values())
