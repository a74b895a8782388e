"""Whether a run takes a graphics card: one rule, wherever it is asked."""

import pytest

from moecli.card import takes_card
from moecli.config import SIMULATED, EngineConfig
from moecli.errors import MoecliError
from offload import hardware


def machine(monkeypatch: pytest.MonkeyPatch, card: str | None) -> None:
    monkeypatch.setattr(hardware, "detect", lambda **_: hardware.Machine(gpu_name=card))


def test_a_card_that_is_here_is_taken_unless_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "RTX")
    assert takes_card(EngineConfig())
    assert takes_card(EngineConfig(device="cuda", vram_nbytes=1 << 30))
    assert not takes_card(EngineConfig(vram_nbytes=0))
    for device in ("cpu", SIMULATED):
        assert not takes_card(EngineConfig(device=device, vram_nbytes=1 << 30))


def test_one_that_is_not_is_refused_only_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, None)
    assert not takes_card(EngineConfig())
    assert not takes_card(EngineConfig(vram_nbytes=0))
    assert not takes_card(EngineConfig(device=SIMULATED, vram_nbytes=1 << 30))
    with pytest.raises(MoecliError, match="`--device cuda` asks"):
        takes_card(EngineConfig(device="cuda"))
    with pytest.raises(MoecliError, match="`--vram` asks"):
        takes_card(EngineConfig(vram_nbytes=1 << 30))
