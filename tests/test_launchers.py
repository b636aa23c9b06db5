"Which process one is, as a launcher says it."
import pytest

from diffusion_model.processes import _place


@pytest.mark.parametrize("told, place", [
    ({}, (0, 1)), ({"WORLD_SIZE": "1", "RANK": "0"}, (0, 1)),
    ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, (3, 4)),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, (0, 2))])
def test_rank_and_size_are_the_launchers(told, place, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"): monkeypatch.delenv(name, raising=False)
    for name, value in told.items(): monkeypatch.setenv(name, value)
    assert _place() == place
