"""JSON without `json`, and with it where the accelerator is not a known one: the same answers."""

import json

import pytest

from microguest.guest import plainjson

DOCUMENTS = [
    "{}",
    ' {"a":[1,-2.5,true,null,"\\u00e9\\ud800"],"b":{"c":""}}\n',
    "[[[]]]",
    '"text"',
    "12345678901234567890",
]
BROKEN = ["", " ", "{", '{"a"}', "[1,]", "1 2", "nul", '"\n"', '{"a":1}x', b"\xff"]


@pytest.fixture(params=[True, False], ids=["accelerator", "json"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plainjson, "KNOWN", plainjson.KNOWN and request.param)


@pytest.mark.parametrize("text", DOCUMENTS)
def test_documents_are_read_and_written_as_json_does(text: str) -> None:
    value = plainjson.loads(text)
    assert value == json.loads(text)
    assert plainjson.loads(text.encode()) == value
    assert plainjson.dumps(value) == json.dumps(value, separators=(",", ":"))


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_document_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  the sentence is json's own
        plainjson.loads(text)


@pytest.mark.parametrize("value", [float("nan"), {"a": float("inf")}])
def test_what_json_cannot_say_is_not_written(value: object) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        plainjson.dumps(value)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError):
        plainjson.dumps({"a": object()})
