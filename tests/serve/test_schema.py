"""schemathesis asks the service everything that its own description allows, and much that it doesn't."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

OPERATIONS = [
    ("/client/v4/accounts/{account}/ai/run/{model}", "POST"),
    ("/client/v4/accounts/{account}/ai/v1/chat/completions", "POST"),
    ("/health", "GET"),
]


def ask_everything(url, path, method, examples, **how):
    described = schemathesis.openapi.from_url(f"{url}/openapi.json")
    assert {(path, method) for path, method in OPERATIONS} == {
        (operation.ok().path, operation.ok().method.upper()) for operation in described.get_all_operations()
    }
    for mode in GenerationMode if method == "POST" else [GenerationMode.POSITIVE]:  # nothing to get wrong in a GET

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None, **how)
        @given(case=described[path][method].as_strategy(generation_mode=mode))
        def answered(case):
            if isinstance(case.body, dict):  # a token or two: what is tested is the service, not the model
                for field in ("max_tokens", "max_completion_tokens"):
                    if isinstance(case.body.get(field), int | float) and case.body[field] > 2:  # 1e5 is whole too
                        case.body[field] = 2
                if case.body.get("max_tokens") is None:
                    case.body["max_tokens"] = 2
                case.body.pop("lora", None)  # documented, and this model has none
            case.call_and_validate(timeout=60)

        answered()


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_answer_is_one_that_the_description_promises(url, path, method):
    ask_everything(url, path, method, 30, derandomize=True)  # the long run draws anew each time


@pytest.mark.long
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_answer_is_one_that_the_description_promises_at_length(url, path, method):
    ask_everything(url, path, method, 3000)
