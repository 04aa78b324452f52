"""Digests of sharded tensors equal those of the whole tensors."""

from __future__ import annotations

import pytest

from tests.distributed.processes import together
from tests.distributed.works import digests_of_parts


@pytest.mark.slow
def test_parts_have_the_digest_of_the_whole() -> None:
    for whole, divided in together(3, digests_of_parts):
        assert whole == divided
        assert len(set(whole)) == len(whole)
