"""schemathesis over the published document: no 5xx, and every answer is one that the document has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from griffin.serve.settings import Settings
from tests.serve.conftest import running

schemathesis = pytest.importorskip("schemathesis", reason="this fuzzes by schemathesis; pip install schemathesis")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def document(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = Settings(model=str(folder), slots=4, request_s=0.5, state_folder=tmp_path_factory.mktemp("states"))
    with running(options) as served:
        yield schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def test_every_answer_is_in_the_document(document: Any) -> None:
    checks = schemathesis.specs.openapi.checks
    wrong: list[str] = []
    seen: Counter[int] = Counter()
    operations = 0
    for found in document.get_all_operations():
        operation = found.ok()
        operations += 1

        @settings(
            max_examples=12,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            response = case.call()
            seen[response.status_code] += 1
            assert response.status_code < 500 or response.status_code in (503, 507), response.text
            case.validate_response(
                response,
                checks=[
                    checks.status_code_conformance,
                    checks.content_type_conformance,
                    checks.response_schema_conformance,
                ],
            )

        try:
            ask()
        except BaseException as error:
            wrong.append(f"{operation.label}: {error!r:.1500}")
    assert not wrong, "\n".join(wrong)
    assert operations > 15
    assert seen[200] > 20
    assert seen[400] > 20
