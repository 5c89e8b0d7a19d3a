"""The trial that decides between lax's own ragged exchange and the padded one, on stand-ins for lax's own."""

from typing import Any

import pytest
from jax import lax

from cmjax.errors import UserError
from cmjax.mesh import fabric, fabric_ragged, settings


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


class Accelerator:
    """Stands in for a device of a platform that is not here."""

    platform = "npu"


def test_what_fails_its_trial_is_not_used_on_its_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fabric_ragged, "_TRIALS", {})
    monkeypatch.setattr(fabric_ragged, "trial_failure", lambda devices: f"failed on {len(devices)}")
    assert fabric_ragged.native_ragged_failure("npu") is None  # nothing is tried before an instance is brought up
    fabric_ragged.try_native_ragged([Accelerator()] * 12)
    assert fabric_ragged.native_ragged_failure("npu") == "failed on 8"
    assert fabric_ragged.native_ragged_failure("tpu") is None


@pytest.mark.parametrize("text", ["native", "padded", "auto"])
def test_the_environment_sets_the_form(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMJAX_FABRIC_RAGGED", text)
    assert settings.Settings(fabric_ragged.native_ragged_failure).forms.ragged == text


def test_the_environment_names_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMJAX_FABRIC_RAGGED", "dense")
    with pytest.raises(UserError, match="CMJAX_FABRIC_RAGGED must be one of auto, native, padded, got 'dense'"):
        settings.Settings(fabric_ragged.native_ragged_failure)


def test_status_gives_the_reason_for_the_padded_form() -> None:
    try:
        fabric.configure(collectives="lax")
        status = fabric.status()["ragged_all_to_all"]
        assert status.form == "lax padded"
        assert "not implemented on XLA:CPU" in status.reason
    finally:
        fabric.configure(collectives="auto")
