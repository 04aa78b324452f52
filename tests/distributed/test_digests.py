"""Digests of sharded tensors equal those of the whole tensors."""

from __future__ import annotations

import pytest

from tests.distributed.processes import together
from tests.distributed.works import digests_of_parts


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_parts_have_the_digest_of_the_whole(size: int) -> None:
    for whole, divided in together(size, digests_of_parts):
        assert whole == divided
        assert len(set(whole)) == len(whole)
