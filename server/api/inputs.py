"""What a request is about: a text, several texts, token ids, or several lists of token ids. Read by hand, with one message.

A union of four types would try all of them on every item and keep a complaint for each: seconds of work for a body of nonsense.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

MAX_TOKEN_ID = 1 << 31

Item = str | tuple[int, ...]


def inputs_type(max_items: int) -> Any:
    """The type of a field that holds 1 to ``max_items`` inputs; its value is a tuple of texts and tuples of token ids."""

    def read(value: Any) -> tuple[Item, ...]:
        if isinstance(value, list) and value and type(value[0]) is int:
            return (_token_ids(value, ""),)
        if isinstance(value, str):
            return (_text(value, ""),)
        if not isinstance(value, list):
            raise ValueError(f"must be a text, a list of texts, token ids, or a list of lists of token ids, not {_kind(value)}")
        if not 0 < len(value) <= max_items:
            raise ValueError(f"must have 1 to {max_items} items, not {len(value)}")
        kind = type(value[0])
        if kind not in (str, list) or any(type(item) is not kind for item in value):
            odd = next(item for item in value if kind not in (str, list) or type(item) is not kind)
            raise ValueError(f"all items must be texts, or all token ids, or all lists of token ids; one is {_kind(odd)}")
        read_item = _text if kind is str else _token_ids
        return tuple(read_item(item, f"item {index}: ") for index, item in enumerate(value))

    return Annotated[tuple[Item, ...], PlainValidator(read), WithJsonSchema(_schema(max_items))]


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}the text holds half of a surrogate pair") from error
    return value


def _token_ids(value: list[Any], where: str) -> tuple[int, ...]:
    if not value:
        raise ValueError(f"{where}a list of token ids needs at least one")
    odd = next((item for item in value if type(item) is not int or not 0 <= item < MAX_TOKEN_ID), None)
    if odd is not None or None in value:
        found = str(odd)[:40] if type(odd) is int else _kind(odd)
        raise ValueError(f"{where}token ids are integers from 0 on; one is {found}")
    return tuple(value)


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a fraction", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def _schema(max_items: int) -> dict[str, Any]:
    text = {"type": "string"}
    ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": MAX_TOKEN_ID}}
    many = {"type": "array", "minItems": 1, "maxItems": max_items}
    return {"anyOf": [text, {**many, "items": text}, ids, {**many, "items": ids}]}
