import json

import pytest

from mscs.params import FIELDS, to_plain
from reproduce.ledger import entries, rows


def test_every_entry_touches_a_run_and_explains_itself(params):
    names = [entry.id for entry in entries()]
    assert len(names) == len(set(names)) >= 30
    for entry in entries():
        assert any(entry.touches(run) for run in params.runs), entry.id
        assert entry.values
        assert entry.why
        assert entry.setting in FIELDS or entry.setting is None


@pytest.mark.parametrize("entry", [e for e in entries() if e.take], ids=lambda e: e.id)
@pytest.mark.parametrize("recipe", ["paper", "code", "upstream"])
def test_params_take_what_the_ledger_says(params, entry, recipe):
    from mscs.models.options import MODEL_OPTIONS

    for run in filter(entry.touches, params.runs):
        settings = params.resolve(run, "paper", {"recipe": recipe}).settings
        if entry.optimizer and settings.optimizer != entry.optimizer:
            continue
        if entry.option:
            found = settings.model_options.get(entry.option, MODEL_OPTIONS[settings.model][entry.option])
        else:
            found = to_plain(settings)[entry.setting]
        assert json.loads(json.dumps(found)) == entry.take[recipe], (run, recipe)


def test_rows_of_one_run():
    found = {row["id"] for row in rows("cadis-ocrnet-r50-ours")}
    assert {"cadis-padding", "pretrained", "ocr-head"} <= found
    assert "weight-decay-cityscapes" not in found
