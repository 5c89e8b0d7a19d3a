"""The trial that decides between lax's own ragged exchange and the padded one, on stand-ins for lax's own."""

from typing import Any

import pytest
from jax import lax

from cmjax.mesh import fabric, fabric_ragged


def test_a_working_ragged_exchange_passes_its_trial(devices: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    padded = fabric_ragged._padded_ragged

    def working(*operands: Any, axis_name: str) -> Any:
        return padded(*operands, axis_name=(axis_name,))

    monkeypatch.setattr(lax, "ragged_all_to_all", working)
    assert fabric_ragged.trial_failure(devices[:4]) is None


def test_wrong_rows_fail_the_trial(devices: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lax, "ragged_all_to_all", lambda operand, output, *rest, axis_name: output)
    assert fabric_ragged.trial_failure(devices[:4]) == "gave wrong rows in its trial"


def test_an_error_fails_the_trial_with_its_first_line(devices: list[Any]) -> None:
    # XLA:CPU has no such op: the real failure, as an accelerator's compiler would give it.
    failure = fabric_ragged.trial_failure(devices[:4])
    assert failure is not None
    assert failure.startswith("failed its trial: ")
    assert "\n" not in failure


def test_status_gives_the_reason_for_the_padded_form() -> None:
    try:
        fabric.configure(collectives="lax")
        status = fabric.status()["ragged_all_to_all"]
        assert status.form == "lax padded"
        assert "not implemented on XLA:CPU" in status.reason
    finally:
        fabric.configure(collectives="auto")
