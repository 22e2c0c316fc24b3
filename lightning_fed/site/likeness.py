"""Whether a site is set up as the server is: else it would train another run, and nobody would know."""

from __future__ import annotations

from flwr.app import Message

from lightning_fed.client.local.work import LocalTask
from lightning_fed.client.setup import differences, setup_of
from lightning_fed.client.side import ClientSide
from lightning_fed.errors import ClientError
from lightning_fed.seeding import random_states_kept
from lightning_fed.values.module_form import Form, difference, form_of
from lightning_fed.wire import messages, roll_call


class Likeness:
    """Compares a site with what the server's question tells of it.

    Args:
        side: All that the site's client works with; its module is set up for the first question.
        client: Which client it is.
    """

    def __init__(self, side: ClientSide, client: int) -> None:
        self._side, self._client = side, client

    def require(self, question: Message) -> None:
        """Compare.

        Raises:
            ClientError: If something is not alike.
        """
        told = messages.read_told(question)
        setup, form = roll_call.take_setup(question.content), roll_call.take_form(question.content)
        if setup and (found := differences(setup, self._setup(told))):
            raise ClientError(
                f"client {self._client} would train otherwise than the server's script says: {'; '.join(found)}. Write"
                " the same in both scripts."
            )
        if form and (differs := difference(form, self._form(told))):
            raise ClientError(
                f"client {self._client} has another module than the server: {differs}. Both have to build the"
                " same module, with the same pretrained weights where some are not trained."
            )

    def _setup(self, told: messages.Told) -> dict[str, str]:
        side = self._side
        return setup_of(side.options, side.methods, side.mods, -1 if told.rounds is None else told.rounds)

    def _form(self, told: messages.Told) -> Form:
        side = self._side
        with random_states_kept():
            side.set_up(side.work(LocalTask(self._client, 1, told.seed, {}, rounds=told.rounds)))
        return form_of(side.module, side.options.staying)
