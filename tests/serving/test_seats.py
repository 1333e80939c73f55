"""What one user of a page has before them: an answer stands beside the image that it is about."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from uhr_bat.serving.showing import Seat

THREADS = ThreadPoolExecutor(8)


class Held:
    """Work that ends when it is told to, on a thread of its own."""

    def __init__(self, work, value):
        self.begun, self.go_on, self.value, self.names = threading.Event(), threading.Event(), value, []
        self.result = THREADS.submit(work, self)
        self.begun.wait(0.3)

    def __call__(self, *names):
        self.names += names
        self.begun.set()
        self.go_on.wait()
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    def end(self):
        self.go_on.set()
        return self.result.result(10)


def seated(name):
    seat = Seat()
    assert seat.open(lambda: name) == name == seat.image_name
    return seat


def test_an_answer_about_an_image_that_is_no_longer_shown_is_dropped():
    seat = seated("a")
    question = Held(seat.ask, "about a")
    seat.open(lambda: "b")
    assert question.end() is None and seat.ask(lambda name: f"about {name}") == "about b"


def test_a_question_waits_for_the_image_that_is_being_seated():
    seat = seated("a")
    opening = Held(seat.open, "b")
    question = Held(seat.ask, "an answer")
    assert not question.begun.is_set()
    assert opening.end() == "b" and question.end() == "an answer" and question.names == ["b"]


def test_an_answer_that_comes_while_another_image_is_opened_is_shown_if_that_fails():
    for other, shown in (("b", None), (OSError("torn"), "about a")):
        seat = seated("a")
        question = Held(seat.ask, "about a")
        opening = Held(seat.open, other)
        question.go_on.set()
        if isinstance(other, str):
            assert opening.end() == other
        else:
            with pytest.raises(OSError, match="torn"):
                opening.end()
        assert question.end() == shown


def test_of_two_images_or_questions_the_last_one_is_shown():
    seat = seated("a")
    slow = Held(seat.open, "b")
    assert seat.open(lambda: "c") == "c" and slow.end() is None and seat.image_name == "c"
    slow = Held(seat.ask, ValueError("an old mistake"))
    assert seat.ask(lambda name: name) == "c" and slow.end() is None


def test_every_user_has_a_seat_of_their_own():
    seat = seated("a")
    assert copy.deepcopy(seat).image_name is None
