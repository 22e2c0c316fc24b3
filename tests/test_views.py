"""A view lies over an instance for a block, and is gone after it without a trace."""

import copy
import io
import pickle
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from lightning_fed.views import View, overrides, user_class, users_own, viewed_as


class Loud(View):
    def speak(self) -> str:
        return f"loud {super().speak()}"

    def only_in_the_view(self) -> str:
        return "view"


class Quiet(View):
    def speak(self) -> str:
        return f"quiet {super().speak()}"


class User(nn.Module):
    """What the user wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def speak(self) -> str:
        return f"user {type(self).__name__}"


class Registering(User):
    made: list[type] = []

    def __init_subclass__(cls, *, needed: int) -> None:
        Registering.made.append(cls)


def test_view_acts_in_the_block_and_is_gone_after_it():
    user = User()
    with viewed_as(user, Loud):
        assert user.speak() == "loud user User"
        assert user.only_in_the_view() == "view"
    assert type(user) is User
    assert user.speak() == "user User"
    assert not hasattr(user, "only_in_the_view")


def test_view_is_gone_after_an_exception_too():
    user = User()
    before = dict(user.__dict__)
    with pytest.raises(LookupError), viewed_as(user, Loud):
        raise LookupError
    assert type(user) is User
    assert user.__dict__ == before


def test_views_class_reads_like_the_users_own():
    user = User()
    with viewed_as(user, Loud):
        assert isinstance(user, User)
        assert (type(user).__name__, type(user).__qualname__, type(user).__doc__) == ("User", "User", User.__doc__)
        assert type(user).__module__ == User.__module__
        assert user_class(user) is User
    assert user_class(user) is User


def test_same_view_of_the_same_class_is_one_class():
    # torch.compile guards on the class: another class each round would compile anew each round.
    first, second = User(), User()
    with viewed_as(first, Loud), viewed_as(second, Loud):
        assert type(first) is type(second)


def test_method_on_the_instance_does_not_shadow_the_view_and_comes_back():
    user = User()
    user.speak = lambda: "shadow"  # as module.compile() and LightningCLI do
    with viewed_as(user, Loud):
        assert user.speak() == "loud user User"
    assert user.speak() == "shadow"


def test_what_the_user_put_on_the_instance_is_the_users_own_in_every_view():
    user = User()
    assert users_own(user, "speak")() == "user User"
    assert not overrides(user, User, "speak")
    user.speak = lambda: "instance"
    for view in (Loud, Quiet):
        with viewed_as(user, view):
            assert users_own(user, "speak")() == "instance"
            assert overrides(user, User, "speak")


def test_attributes_set_in_the_block_stay():
    user = User()
    with viewed_as(user, Loud):
        user.counter = 3
        user.new_layer = nn.Linear(1, 1)
    assert user.counter == 3
    assert "new_layer.weight" in user.state_dict()


def test_inner_view_replaces_the_outer_one_and_the_outer_one_returns():
    user = User()
    with viewed_as(user, Loud):
        with viewed_as(user, Quiet):
            assert user.speak() == "quiet user User"
            assert not hasattr(user, "only_in_the_view")
        assert user.speak() == "loud user User"
    assert type(user) is User


def test_inner_view_sees_the_instances_own_attribute_that_only_the_outer_one_hides():
    user = User()
    user.only_in_the_view = lambda: "instance"
    with viewed_as(user, Loud):
        assert user.only_in_the_view() == "view"
        with viewed_as(user, Quiet):
            assert user.only_in_the_view() == "instance"
        assert user.only_in_the_view() == "view"
    assert user.only_in_the_view() == "instance"
    assert not [name for name in user.__dict__ if "lightning_fed" in name]


def test_class_with_registry_and_required_subclass_arguments_takes_a_view():
    user = Registering()
    with viewed_as(user, Loud):
        assert user.speak() == "loud user Registering"
    assert Registering.made == []


def test_pickle_made_in_a_view_is_of_the_users_class():
    user = User()
    buffer = io.BytesIO()
    with viewed_as(user, Loud):
        again = pickle.loads(pickle.dumps(user))
        torch.save(user, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    assert type(again) is User
    assert type(saved) is User
    assert torch.equal(again.layer.weight, user.layer.weight)
    assert torch.equal(saved.layer.weight, user.layer.weight)


def test_copy_made_in_a_view_has_what_the_user_put_on_the_instance_and_nothing_of_ours():
    user = User()
    user.speak = print  # hidden while the view lies over it
    before = set(user.__dict__)
    with viewed_as(user, Loud):
        copied = copy.deepcopy(user)
    assert type(copied) is User
    assert set(copied.__dict__) == before
    assert copied.speak is print


def test_other_instances_of_the_class_do_not_notice():
    user, other = User(), User()
    with viewed_as(user, Loud):
        assert other.speak() == "user User"
        assert User().speak() == "user User"


def test_what_the_instance_alone_answers_to_is_the_users_own_as_well():
    double = Mock(spec=User)
    assert users_own(double, "speak") is double.speak
    assert overrides(double, User, "speak")


def test_attributes_of_the_user_s_class_keep_their_names():
    class Named(User):
        _names = ("a", "b")
        _user_class = "theirs"

    user = Named()
    with viewed_as(user, Loud):
        assert (user._names, user._user_class) == (("a", "b"), "theirs")
        type(user)._names = ("c",)
    assert Named._names == ("c",)
