"""Requests made from the API's own schema, well-formed and not: each is answered, and none brings the server down."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from tests.http.serving import PATIENCE

OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("POST", "/reset_prefix_cache"),
]
MOST_TOKENS, MOST_CHOICES = 4, 4


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_request_is_answered(address, method, path, mode):
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operation = schema[path][method]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("takes nothing that could be wrong")

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=20, suppress_health_check=list(HealthCheck), deadline=None)
    def check(case):
        if isinstance(case.body, dict):  # as valid as before, and quicker
            case.body.setdefault("max_tokens", MOST_TOKENS)
            for name, most in (
                ("max_tokens", MOST_TOKENS),
                ("max_completion_tokens", MOST_TOKENS),
                ("n", MOST_CHOICES),
            ):
                if type(case.body.get(name)) is int:
                    case.body[name] = min(case.body[name], most)
        answer = case.call(base_url=address, timeout=PATIENCE)
        assert answer.status_code in (200, 400, 404, 405, 413, 415, 429), answer.text
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]

    check()
    assert httpx.get(f"{address}/health", timeout=PATIENCE).status_code == 200
