"""The forms of the kernels' inner loops that this CPU runs, and a fixture of each."""

from collections.abc import Iterator

import pytest

from cmjax.kernels.native import build


def _use(form: str) -> bool:
    """Have the kernels run in a form, "" for their own choice; False where there is none such here."""
    library = build.load().library
    return library is not None and bool(library.cmjax_kernels_use(form.encode()))


_FORMS = [form for form in build.FORMS if _use(form)]
_use("")


@pytest.fixture(params=_FORMS)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each form of the inner loops that this CPU runs."""
    assert _use(request.param)
    yield request.param
    _use("")


def skip_without_kernels() -> None:
    """For a module of tests that compare them with something: where there is no compiler there are none."""
    loaded = build.load()
    if loaded.library is None:
        pytest.skip(f"no kernels: {loaded.reason}", allow_module_level=True)
