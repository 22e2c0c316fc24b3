"""A message as the objects of bytes in which Flower sends it."""

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects


def parts_of(message: Message) -> tuple[str, dict[str, bytes]]:
    """The message's name, and all parts by name."""
    parts = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    return message.object_id, parts
