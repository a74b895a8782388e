"""Whose kernels compute, and that nobody computes slowly without saying so."""

import pytest

from moecli import backends
from quant import ops
from quant.kernels.cpu.library import NoLibrary


def test_slow_kernels_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "fallback", lambda: NoLibrary("there is no library"))
    said = backends.fallback("auto")
    assert said is not None
    assert "there is no library" in said
    assert "slower" in said
    assert "`moecli doctor`" in said


def test_kernels_that_were_asked_for_need_no_excuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "fallback", lambda: NoLibrary("there is no library"))
    assert backends.fallback("torch") is None
    monkeypatch.setattr(ops, "fallback", lambda: None)
    assert backends.fallback("auto") is None
