"""How a block of settings works: typed fields with flat keys, and from flat values to nested blocks and back.

Every key has one name in params.yaml, on the command line and in result files: its flat key. A part that can
be exchanged declares a block of its own, chosen by the value of a literal key (optimizer: sgd) or switched
on by one (contrastive: true); a run holds the blocks of the parts in use only.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, StrictBool, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from mscs.errors import UsageError, unknown_name

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_pattern_mismatch": "letters, digits, _ and -",
    "tuple_type": "a list",
    "mapping_type": "a mapping",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "none_required": "null",
    "missing": "one item more",
}


class Affects(str):
    """Marks a key by what it can change: "train", "evaluate", "both", or "nothing" that a result holds."""


TRAIN, EVALUATE, BOTH, NOTHING = map(Affects, ("train", "evaluate", "both", "nothing"))


class Block(BaseModel):
    """Settings of one part. `affects` holds for the keys that do not say otherwise."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, protected_namespaces=())
    affects: ClassVar[Affects] = TRAIN

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Give the same flat values to the blocks in this one; a part that is not in use is None."""
        nested = dict(flat)
        for name, info in cls.model_fields.items():
            if inner := blocks_in(info):
                can_be_left_out = type(None) in get_args(info.annotation)
                nested[name] = flat if not can_be_left_out or inner[0].used(flat) else None
        return nested

    @classmethod
    def used(cls, flat: Mapping[str, Any]) -> bool:
        """Return whether a run with these flat values uses a part that can be left out."""
        return all(flat.get(name) for name, info in cls.model_fields.items() if is_switch(info))

    def arguments(self, *without: str) -> dict[str, Any]:
        """Return the block's own values by field name, but for what chose it, to build its part from."""
        fields = type(self).model_fields.items()
        own = [name for name, info in fields if not blocks_in(info) and not is_switch(info)]
        return {name: getattr(self, name) for name in own if name not in ("name", *without)}

    def walk(self, *, defaults: bool = False) -> Iterator[tuple[str, Affects, Any]]:
        """Yield (flat key, what it affects, JSON value) of this block and the blocks in it.

        Without `defaults`, a key with a default is left out where it has that value: a setting that is added
        later, with the default that all runs had so far, changes none of them.
        """
        plain = self.model_dump(mode="json", by_alias=True)
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Block):
                yield from value.walk(defaults=defaults)
            elif not blocks_in(info) and (defaults or info.is_required() or value != info.default):
                marks = [mark for mark in info.metadata if isinstance(mark, Affects)]
                yield key_of(name, info), marks[0] if marks else self.affects, plain[key_of(name, info)]


AnyBlock = TypeVar("AnyBlock", bound=Block)


class Form(BaseModel):
    """A mapping that is checked and not kept; an unknown key is named with the nearest valid one."""

    model_config = ConfigDict(allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, values: Any) -> Any:
        for key in values if isinstance(values, Mapping) else ():
            if key not in cls.model_fields:
                raise ValueError(unknown_name("key", key, cls.model_fields))
        return values


def key_of(name: str, info: FieldInfo) -> str:
    """Return the flat key of a field."""
    return info.alias or name


def blocks_in(info: FieldInfo) -> list[type[Block]]:
    """Return the blocks that a field can hold; none for a plain value."""
    options = get_args(info.annotation) or (info.annotation,)
    return [option for option in options if isinstance(option, type) and issubclass(option, Block)]


def is_switch(info: FieldInfo) -> bool:
    """Return whether a field switches its block on."""
    return get_args(info.annotation) == (True,)


@cache
def flat_types(block: type[Block]) -> dict[str, Any]:
    """Return the type of every flat key below a block, in use or not."""
    types: dict[str, Any] = {}
    for name, info in block.model_fields.items():
        for inner in blocks_in(info):
            for key, hint in flat_types(inner).items():
                types[key] = types[key] | hint if key in types else hint
        if not blocks_in(info):
            types[key_of(name, info)] = StrictBool if is_switch(info) else info.rebuild_annotation()
    return types


def form(**types: Any) -> Any:
    """Return a form with keys of these types, each of which may be left out."""
    fields: dict[str, Any] = {key: (hint, None) for key, hint in types.items()}
    return create_model("Form", __base__=Form, **fields)


@cache
def _form_of(block: type[Block]) -> Any:
    return form(**flat_types(block))


def from_flat(block: type[AnyBlock], values: Mapping[str, Any], where: str) -> AnyBlock:
    """Build a block from values by flat key; values of parts that are not in use are checked and dropped.

    Raises:
        UsageError: an unknown or missing key, an impossible value, or values that contradict each other.
    """
    check(_form_of(block), values, where)
    try:
        return block.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{where}: {_explained(error, {})}") from None


def check(accepted: Any, values: Any, where: str) -> None:
    """Raise UsageError unless `values` fit a form: in which place, what was found, what is accepted."""
    try:
        accepted.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{where}: {_explained(error, values)}") from None


def _explained(error: ValidationError, found: Any) -> str:
    """Return what is wrong with the first wrong value in `found`, from pydantic's errors."""
    problems = error.errors()
    kind, location = problems[0]["type"], problems[0]["loc"]
    place: list[str] = []
    for part in location:
        if not isinstance(found, Mapping) or part not in found:
            break
        found = found[part]
        place.append(str(part))
    if kind == "value_error":
        said = problems[0]["msg"].removeprefix("Value error, ")
    elif kind == "union_tag_not_found" or (kind == "missing" and isinstance(location[-1], str)):
        said = f"missing key {location[-1]!r}"
    else:
        # one error for each of the alternatives
        here = [item for item in problems if item["loc"][: len(place)] == location[: len(place)]]
        expected = [
            _EXPECTED.get(item["type"], item["msg"].removeprefix("Input should be ")) for item in here
        ]
        shown = repr(found)
        if location[-1:] == ("[key]",):
            shown = f"the name {location[-2]!r}"
            place.pop()
        said = f"found {shown}, expected {' or '.join(dict.fromkeys(expected))}"
    return f"{'.'.join(place)}: {said}" if place else said
