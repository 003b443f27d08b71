"""Methods replaced on an instance, and put back in any order."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from grace_ds.utils.methods import replace_method


class Owner:
    def say(self, word: str) -> str:
        return word


def adding(letter: str) -> Callable[..., str]:
    return lambda original, word: original(word) + letter


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_replacements_are_undone_in_any_order(order: tuple[int, ...]) -> None:
    owner = Owner()
    undo = [replace_method(owner, "say", adding(letter)) for letter in "abc"]
    left = "abc"
    for index in order:
        undo[index]()
        left = left.replace("abc"[index], "")
        assert owner.say("-") == f"-{left}"
        undo[index]()  # a second time: nothing
    assert vars(owner) == {}


def test_what_somebody_else_has_put_over_or_under_stays() -> None:
    owner = Owner()
    theirs_below = owner.say = lambda word: word + "x"  # type: ignore[method-assign]
    undo = replace_method(owner, "say", adding("a"))
    ours = owner.say

    @functools.wraps(ours)
    def theirs_above(word: str) -> str:
        return ours(word) + "y"

    owner.say = theirs_above  # type: ignore[method-assign]
    undo_second = replace_method(owner, "say", adding("b"))
    assert owner.say("-") == "-xayb"
    undo()
    assert owner.say("-") == "-xyb"
    undo_second()
    assert owner.say is theirs_above and owner.say("-") == "-xy"
    del owner.say
    owner.say = theirs_below  # type: ignore[method-assign]
    both: list[Any] = [replace_method(owner, "say", adding(letter)) for letter in "ab"]
    for undo in both:
        undo()
    assert owner.say is theirs_below
