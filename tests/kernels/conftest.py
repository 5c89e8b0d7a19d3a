"""Each test of a kernel for each form of its inner loops."""

import pytest

from tests import forms

form = forms.form
_MADE = {}


@pytest.fixture
def once(request):
    """`once(make)`: what a test has made for one form of the inner loops, for the others too: the form is chosen when a
    program runs, and compiling is most of a test's time."""
    parameters = {name: value for name, value in request.node.callspec.params.items() if name != "form"}
    key = request.node.nodeid.split("[")[0], repr(parameters)

    def made(make):
        if key not in _MADE:
            _MADE[key] = make()
        return _MADE[key]

    return made
