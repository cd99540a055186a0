"""The ledger: where the sources disagree, what each recipe takes, and which entries touch a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Entry:
    """One disagreement.

    `runs` holds patterns of run ids; `setting` names the setting of params.yaml, or `option` the model
    option, that switches it; `take` the value under each recipe. An entry with neither is a decision in code.
    """

    id: str
    runs: str | list[str]
    why: str
    values: Mapping[str, str]
    setting: str | None = None
    option: str | None = None
    take: Mapping[str, Any] = field(default_factory=dict)

    def touches(self, run: str) -> bool:
        """Return whether the entry applies to a run, by its id."""
        patterns = [self.runs] if isinstance(self.runs, str) else self.runs
        return any(fnmatchcase(run, pattern) for pattern in patterns)


@cache
def entries() -> tuple[Entry, ...]:
    """Return reproduce/ledger.yaml."""
    text = Path(__file__).with_name("ledger.yaml").read_text()
    return tuple(
        Entry(**block) for block in yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    )


def switched(recipe: str) -> list[str]:
    """Return the entries, by id, that a recipe takes otherwise than recipe `paper`."""
    return [entry.id for entry in entries() if entry.take and entry.take[recipe] != entry.take["paper"]]


def rows(run: str | None = None, recipe: str = "paper") -> list[dict[str, str]]:
    """Return the entries that touch `run` (None: all) as text: id, sources, what is taken, why."""
    return [
        {
            "id": entry.id,
            "sources": "; ".join(f"{source}: {value}" for source, value in entry.values.items()),
            "taken": str(entry.take[recipe]) if entry.take else "see why",
            "switch": entry.setting or (f"model_options.{entry.option}" if entry.option else ""),
            "why": entry.why,
        }
        for entry in entries()
        if run is None or entry.touches(run)
    ]


def text(found: Sequence[Mapping[str, str]], recipe: str) -> str:
    """Return entries, as `rows` gives them, for people."""
    lines = [f"entries taken otherwise than by recipe paper: {', '.join(switched(recipe)) or 'none'}\n"]
    for row in found:
        switch = f" ({row['switch']})" if row["switch"] else ""
        lines += [row["id"], f"  {row['sources']}", f"  taken by recipe {recipe}: {row['taken']}{switch}"]
        lines.append(f"  {row['why']}\n")
    return "\n".join(lines)
