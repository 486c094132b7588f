"""schemathesis asks the service everything that its own description allows, and much that it doesn't."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection

OPERATIONS = [
    ("/client/v4/accounts/{account}/ai/run/{model}", "POST"),
    ("/client/v4/accounts/{account}/ai/v1/chat/completions", "POST"),
    ("/health", "GET"),
]


def shorten(body, may_be_null):
    """Ask for a token or two: what is tested is the service, not the model. What breaks the rules stays as it is."""
    for field in ("max_tokens", "max_completion_tokens"):
        n = body.get(field)
        if isinstance(n, int | float) and 2 < n <= 131_072 and n == int(n):  # 1e5 is whole too
            body[field] = 2
    if "max_tokens" not in body or (may_be_null and body["max_tokens"] is None):
        body["max_tokens"] = 2
    if isinstance(body.get("lora"), str):  # documented, and this model has none
        del body["lora"]


def ask_everything(url, path, method, examples, **how):
    described = schemathesis.openapi.from_url(f"{url}/openapi.json")
    assert {(path, method) for path, method in OPERATIONS} == {
        (operation.ok().path, operation.ok().method.upper()) for operation in described.get_all_operations()
    }
    for mode in GenerationMode if method == "POST" else [GenerationMode.POSITIVE]:  # nothing to get wrong in a GET

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None, **how)
        @given(case=described[path][method].as_strategy(generation_mode=mode))
        def answered(case):
            if isinstance(case.body, dict):
                shorten(case.body, may_be_null=path.endswith("completions"))
            reply = case.call(timeout=60)
            refused = (
                [negative_data_rejection] if reply.status_code == 413 else []
            )  # it doesn't take that for a refusal
            case.validate_response(reply, excluded_checks=refused)

        answered()


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_answer_is_one_that_the_description_promises(url, path, method):
    ask_everything(url, path, method, 30, derandomize=True)  # the long run draws anew each time


@pytest.mark.long
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_answer_is_one_that_the_description_promises_at_length(url, path, method):
    ask_everything(url, path, method, 3000)
