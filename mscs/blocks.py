"""How a block of settings works: typed fields with flat keys, and from flat values to nested blocks and back.

Every key has one name in params.yaml, on the command line and in result files: its flat key. A part that can
be exchanged declares a block of its own, chosen by the value of a literal key (optimizer: sgd) or switched
on by one (contrastive: true); a run holds the blocks of the parts in use only.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from mscs.errors import UsageError, unknown_name

_NUMBER = re.compile(r"[-+]?[0-9]+([.][0-9]*)?[eE][-+]?[0-9]+")
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "mapping_type": "a mapping",
    "none_required": "null",
    "missing": "one item more",
}


def _number(value: Any) -> Any:
    """Read 1e-3, which YAML takes for text because it has no point."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        return value
    number = float(value)
    return int(number) if number.is_integer() else number


class Affects(str):
    """Marks a key by what it can change: "train", "evaluate", "both", or "nothing" that a result holds."""


TRAIN, EVALUATE, BOTH, NOTHING = map(Affects, ("train", "evaluate", "both", "nothing"))

Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
Index = Annotated[Int, Field(ge=0)]
Count = Annotated[Int, Field(ge=1)]
Side = Annotated[Int, Field(ge=16)]
Weight = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Ratio = Annotated[Float, Field(ge=0.01, le=100)]
Name = Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")]
"""Of what becomes part of paths and commands."""


class Block(BaseModel):
    """Settings of one part. `affects` holds for the keys that do not say otherwise."""

    model_config = ConfigDict(
        **_STRICT, frozen=True, extra="forbid", validate_by_name=True, protected_namespaces=()
    )
    affects: ClassVar[Affects] = BOTH

    @classmethod
    def used(cls, flat: Mapping[str, Any]) -> bool:
        """Return whether a run with these flat values uses the part: its literal keys say so."""
        literals = [
            (key_of(name, info), info) for name, info in cls.model_fields.items() if _is_literal(info)
        ]
        return all(flat.get(key) in get_args(info.annotation) for key, info in literals)

    def arguments(self, *without: str) -> dict[str, Any]:
        """Return the block's own values by field name, ready to build its part from."""
        fields = type(self).model_fields.items()
        own = [name for name, info in fields if not blocks_in(info) and not _is_literal(info)]
        return {name: getattr(self, name) for name in own if name not in without}

    def walk(self) -> Iterator[tuple[str, Affects, Any]]:
        """Yield (flat key, what it affects, JSON value) of this block and the blocks in it.

        A key with a default is left out where it has that value: a setting that is added later, with the
        default that all runs had so far, changes none of them.
        """
        plain = self.model_dump(mode="json", by_alias=True)
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Block):
                yield from value.walk()
            elif not blocks_in(info) and (info.is_required() or value != info.default):
                marks = [mark for mark in info.metadata if isinstance(mark, Affects)]
                yield key_of(name, info), marks[0] if marks else self.affects, plain[key_of(name, info)]


AnyBlock = TypeVar("AnyBlock", bound=Block)


def key_of(name: str, info: FieldInfo) -> str:
    """Return the flat key of a field."""
    return info.alias or name


def blocks_in(info: FieldInfo) -> list[type[Block]]:
    """Return the blocks that a field can hold; none for a plain value."""
    options = get_args(info.annotation) or (info.annotation,)
    return [option for option in options if isinstance(option, type) and issubclass(option, Block)]


def _is_literal(info: FieldInfo) -> bool:
    """Return whether a field has one possible value: it chooses its block."""
    return get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1


def _walk_fields(block: type[Block]) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in block.model_fields.items():
        inner = blocks_in(info)
        for option in inner:
            yield from _walk_fields(option)
        if not inner:
            yield key_of(name, info), info


@cache
def keys(block: type[Block]) -> tuple[str, ...]:
    """Return every flat key below a block, in use or not."""
    return tuple(dict.fromkeys(key for key, _ in _walk_fields(block)))


@cache
def _adapter(block: type[Block], key: str) -> TypeAdapter[Any]:
    """Return what checks one key by itself: any of the values that choose a part, or none of them."""
    hints = [info.rebuild_annotation() for name, info in _walk_fields(block) if name == key]
    if Literal[True] in hints:  # a part that can be left out
        hints.append(Literal[False])
    return TypeAdapter(reduce(or_, hints), config=_STRICT)


def check_value(block: type[Block], key: str, value: Any, where: str) -> None:
    """Raise UsageError unless `value` is possible for a flat key by itself."""
    try:
        _adapter(block, key).validate_json(json.dumps(value))
    except ValidationError as error:
        raise UsageError(f"{where}: {key}: {_explained(value, error)}") from None
    except TypeError:
        raise UsageError(f"{where}: {key}: found {value!r}, expected a plain value") from None


def _explained(value: Any, error: ValidationError) -> str:
    """Return what was found and what should have been, from pydantic's errors, one per alternative."""
    expected = []
    for item in error.errors():
        if item["type"] == "value_error":
            return item["msg"].removeprefix("Value error, ")
        expected.append(_EXPECTED.get(item["type"], item["msg"].removeprefix("Input should be ")))
    return f"found {value!r}, expected {' or '.join(dict.fromkeys(expected))}"


def from_flat(block: type[AnyBlock], values: Mapping[str, Any], where: str) -> AnyBlock:
    """Build a block from values by flat key; values of parts that are not in use are checked and dropped.

    Raises:
        UsageError: an unknown or missing key, an impossible value, or values that contradict each other.
    """
    for key, value in values.items():
        if key not in keys(block):
            raise UsageError(f"{where}: {unknown_name('key', key, keys(block))}")
        check_value(block, key, value, where)
    try:
        return block.model_validate_json(json.dumps(_nest(block, values)))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            raise UsageError(f"{where}: missing key {first['loc'][-1]!r}; set it in params.yaml") from None
        raise UsageError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None


def _nest(block: type[Block], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested form of flat values, with the blocks of the parts that they choose."""
    nested: dict[str, Any] = {}
    for name, info in block.model_fields.items():
        key, inner = key_of(name, info), blocks_in(info)
        if not inner and key in flat:
            nested[key] = flat[key]
        elif inner:
            chosen = next((option for option in inner if option.used(flat)), None)
            if chosen is not None:
                nested[key] = _nest(chosen, flat)
            elif type(None) in get_args(info.annotation):
                nested[key] = None
    return nested
