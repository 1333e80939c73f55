"""The cache of what was computed: bytes, order, threads."""

import threading

import pytest
import torch
from uhr_bat.modeling_outputs_uhr_bat import TokenMaps, UHRBatImageFeatures
from uhr_bat.serving.cache import ContentCache, count_bytes

KIB = 256  # numbers of 4 bytes


def numbers(kib=1):
    return torch.zeros(kib * KIB)


def never():
    raise AssertionError("this was kept")


def test_memory_that_tensors_share_is_counted_once():
    whole = numbers(4)
    assert count_bytes([whole, {"a": (whole[:10], numbers())}, "text", None]) == 5 * 1024
    image = UHRBatImageFeatures(numbers(), numbers(), [numbers(), numbers()], [numbers()], [8], [(2, 2)])
    assert count_bytes(TokenMaps([numbers()], [numbers()], [(2, 2)], 0)) == 2 * 1024
    assert count_bytes(image) == 5 * 1024


def test_a_value_is_made_once():
    cache = ContentCache(10 * 1024)
    made = cache.get(("image", "a"), numbers)
    assert cache.get(("image", "a"), never) is made
    assert (cache.made, cache.found) == ({"image": 1}, {"image": 1})


def test_the_least_recently_used_value_goes_first():
    cache = ContentCache(2 * 1024)
    cache.get(("image", "a"), numbers)
    cache.get(("image", "b"), numbers)
    cache.get(("image", "a"), never)
    cache.get(("image", "c"), numbers)
    cache.get(("image", "a"), never)
    assert len(cache) == 2 and cache.num_bytes == 2 * 1024
    assert cache.get(("image", "b"), lambda: "made again") == "made again"


def test_a_value_over_the_limit_is_handed_out_and_not_kept():
    cache = ContentCache(2 * 1024)
    cache.get(("image", "a"), numbers)
    assert len(cache.get(("image", "large"), lambda: numbers(3))) == 3 * KIB
    assert len(cache) == 1 and cache.num_bytes == 1024


def test_a_value_that_grew_is_counted_anew_when_it_is_asked_for():
    cache = ContentCache(3 * 1024)
    cache.get(("image", "a"), numbers)
    value = cache.get(("image", "b"), lambda: {"tokens": numbers()})
    value["regions"] = numbers(2)
    cache.get(("image", "b"), never)
    assert len(cache) == 1 and cache.num_bytes == 3 * 1024


def ask_at_once(cache, make, num_threads=4):
    """What each of several threads gets that ask for one key while the first of them makes it."""
    results, started, done = [], threading.Barrier(num_threads), threading.Event()

    def slow():
        done.wait(10)
        return make()

    def ask():
        started.wait(10)
        try:
            results.append(cache.get(("image", "a"), slow))
        except ValueError as error:
            results.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    while sum(cache.found.values()) < num_threads - 1:
        pass
    done.set()
    for thread in threads:
        thread.join(10)
    return results


def test_threads_that_ask_at_once_share_one_computation():
    made = []
    results = ask_at_once(ContentCache(1024), lambda: made.append(1) or numbers())
    assert len(made) == 1 and len(results) == 4
    assert all(value is results[0] for value in results)


def test_an_error_reaches_all_who_wait_and_is_not_kept():
    def fail():
        raise ValueError("no image")

    cache = ContentCache(1024)
    assert ask_at_once(cache, fail) == ["no image"] * 4
    assert cache.get(("image", "a"), lambda: "an image") == "an image"


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="at least 0. Got -1"):
        ContentCache(-1)
