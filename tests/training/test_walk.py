"""The order of the text: epochs, mixtures and streams, each the same however it is cut and wherever it is taken up."""

from __future__ import annotations

import json
from itertools import chain

import pytest
import torch

from fastdistill.training.blocks import Blocks
from fastdistill.training.tokens import Tokens
from fastdistill.training.walk import MixedWalk, ShuffledWalk, StreamedWalk, Walk


def numbered(first: int, count: int) -> Blocks:
    """Blocks of one token each, whose ids are their numbers."""
    tokens = Tokens(torch.arange(first, first + count, dtype=torch.int32), torch.tensor([0, count]), None, None)
    places = torch.arange(count)
    return Blocks((tokens,), torch.stack([places, places + 1, torch.zeros_like(places)], 1)[:, None], "stream")


def numbers(blocks) -> list[int]:
    return [int(block[0].ids[0]) for block in blocks]


def portions(position):
    """A stream of three portions of 5, 3 and 4 blocks, over and over."""
    number = position or 0
    return numbered(100 * number, (5, 3, 4)[number]), (number + 1) % 3 or None


WALKS = {
    "shuffled": lambda seed: ShuffledWalk(numbered(0, 10), seed),
    "streamed": lambda seed: StreamedWalk(portions, seed),
    "mixed": lambda seed: MixedWalk(
        [ShuffledWalk(numbered(0, 10), seed + "/0"), StreamedWalk(portions, seed + "/1")], [0.3, 0.7]
    ),
}


@pytest.mark.parametrize("kind", WALKS)
def test_a_walk_does_not_depend_on_how_it_is_cut(kind):
    whole = numbers(WALKS[kind]("3").take(0, 40))
    walk = WALKS[kind]("3")
    pieces = [numbers(walk.take(start, count)) for start, count in ((0, 1), (1, 13), (14, 0), (14, 26))]
    assert list(chain(*pieces)) == whole
    assert numbers(walk.take(0, 7)) == whole[:7]  # and it can be begun again
    assert numbers(WALKS[kind]("4").take(0, 40)) != whole


@pytest.mark.parametrize("kind", WALKS)
def test_a_walk_taken_up_is_the_walk_that_never_stopped(kind):
    whole = numbers(WALKS[kind]("3").take(0, 60))
    for stopped in (0, 1, 7, 12, 13, 29):
        first = WALKS[kind]("3")
        first.take(0, stopped)
        second = WALKS[kind]("3")
        second.seek(json.loads(json.dumps(first.state())))
        assert numbers(second.take(stopped, 60 - stopped)) == whole[stopped:]


def test_each_epoch_is_a_permutation():
    order = ShuffledWalk(numbered(0, 10), "0").order(0, 30)
    assert [sorted(epoch.tolist()) for epoch in order.split(10)] == [list(range(10))] * 3
    assert not torch.equal(order[:10], order[10:20])


def test_a_stream_loses_nothing_and_is_read_only_as_far_as_needed():
    read = []

    def counted(position):
        read.append(position)
        return portions(position)

    walk = StreamedWalk(counted, "0")
    first = numbers(walk.take(0, 12))
    assert sorted(first) == [0, 1, 2, 3, 4, 100, 101, 102, 200, 201, 202, 203]
    assert read == [None, 1, 2]
    again = numbers(walk.take(12, 12))
    assert sorted(again) == sorted(first)
    assert again != first  # shuffled anew


@pytest.mark.parametrize("mixed", [False, True])
def test_a_stream_taken_up_does_not_read_what_came_before(mixed):
    read = []

    def counted(position):
        read.append(position)
        return portions(position)

    def walk(portion) -> Walk:
        stream = StreamedWalk(portion, "0")
        return MixedWalk([stream, ShuffledWalk(numbered(0, 10), "1")], [0.9, 0.1]) if mixed else stream

    earlier, later = walk(portions), walk(counted)
    earlier.take(0, 9)
    later.seek(earlier.state())
    assert len(later.take(9, 2)) == 2
    assert read
    assert None not in read


@pytest.mark.parametrize("shares", [[1.0, 1.0], [0.9, 0.1], [2.0, 5.0, 1.0]])
def test_a_mixture_keeps_its_shares_at_any_time(shares):
    walk = MixedWalk([ShuffledWalk(numbered(100 * i, 7), str(i)) for i in range(len(shares))], shares)
    taken = numbers(walk.take(0, 1000))
    for upto in (20, 100, 999):
        for i, share in enumerate(shares):
            counted = sum(number // 100 == i for number in taken[:upto])
            assert abs(counted - upto * share / sum(shares)) <= 3
    for i in range(len(shares)):  # and each part is walked through before it repeats
        own = [number for number in taken if number // 100 == i]
        assert sorted(own[:7]) == list(range(100 * i, 100 * i + 7))
