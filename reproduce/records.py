"""What tables and report need of the files of a run, checked when they are read."""

from pathlib import Path
from typing import TypeVar

from pydantic import ConfigDict, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from mscs.errors import MscsError
from mscs.results import read_json

Form = TypeVar("Form")


class Score(TypedDict):
    """A score of one seed, in percent."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    miou: FiniteFloat


class Scores(TypedDict):
    """Scores of one mode, by seed."""

    seeds: dict[str, Score]


class Evaluation(TypedDict, total=False):
    """What tables need of an evaluation.json."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    ss: Scores
    ms: Scores
    digest: str
    numerics: dict[str, int | str]


class Record(TypedDict):
    """What tables need of a run.json."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    seconds: FiniteFloat
    gpu_hours: FiniteFloat | None
    peak_bytes: int


def read_as(path: Path, form: type[Form]) -> Form:
    """Read a JSON file; MscsError names file and place where it does not hold what `form` says.

    Other keys may be there too; a number that is not finite is refused.
    """
    try:
        return TypeAdapter(form).validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole file"
        raise MscsError(f"{path}: {place}: {first['msg']}. Delete the file and make it again") from None
