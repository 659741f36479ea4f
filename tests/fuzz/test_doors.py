"""Doors that are tried with plausible values, right and wrong: a few cases here, thousands by `make fuzz`."""

import pytest
from doors import DOORS, World
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import GENERATE, GRAVE, judge


@pytest.fixture(scope="module")
def world(tiny_random_checkpoint, tmp_path_factory) -> World:
    return World(tiny_random_checkpoint, tmp_path_factory.mktemp("damaged"))


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_what_comes_in_is_used_or_refused(door, world):
    @settings(
        max_examples=max(10, int(200 / max(1.0, door.cost))),
        derandomize=True,
        **GENERATE,
    )
    @given(case=door.cases)
    def try_all(case):
        finding = judge(door, world, case)
        assert finding is None or finding.kind not in GRAVE, finding

    try_all()


def test_a_finding_is_seen(world):
    """The judge itself: what is wrong, hangs, or is unclear does not pass."""

    def door(call):
        return DOORS[0]._replace(call=call, look=lambda world, case, result: result, cases=st.just({}))

    def raises(error):
        def call(world, case):
            raise error

        return call

    assert judge(door(lambda world, case: ""), world, {}) is None
    assert judge(door(lambda world, case: "crooked"), world, {}).kind == "wrong result"
    assert judge(door(raises(IndexError("list index out of range"))), world, {}).kind == "unclear"
    assert judge(door(raises(MemoryError())), world, {}).kind == "memory"
    assert judge(door(raises(ValueError("`height` must be positive"))), world, {"height": 0}) is None
    assert judge(door(raises(ValueError("no"))), world, {"height": 0}).kind == "unclear"
