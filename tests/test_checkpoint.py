import hashlib

import pytest
import torch

from mscs.checkpoint import KEPT, load_checkpoint, lock, read_weights, save_checkpoint, save_weights
from mscs.errors import MscsError, UsageError
from mscs.results import read_json, write_json, write_text


def test_the_last_two_are_kept_and_the_newest_comes_back(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, {"weight": torch.tensor([float(step)])}, {"lr": 0.1})
    assert [p.name for p in sorted(tmp_path.glob("*.pt"))] == ["step-00000020.pt", "step-00000030.pt"]
    assert len(list(tmp_path.glob("*.json"))) == KEPT
    step, state = load_checkpoint(tmp_path, {"lr": 0.1})
    assert step == 30
    assert state["weight"].item() == 30


@pytest.mark.parametrize("damage", ["cut", "flip", "no json"])
def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(tmp_path, damage):
    for step in (10, 20):
        save_checkpoint(tmp_path, step, {"weight": torch.arange(100.0)}, {})
    newest = tmp_path / "step-00000020.pt"
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[-50] ^= 1
        newest.write_bytes(content)
    else:
        newest.with_suffix(".json").unlink()
    with pytest.warns(UserWarning, match="damaged"):
        step, _ = load_checkpoint(tmp_path, {})
    assert step == 10


def test_damaged_checkpoints_do_not_push_out_new_ones(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, {}, {})
    for broken in tmp_path.glob("*.pt"):
        broken.write_bytes(b"")
    save_checkpoint(tmp_path, 15, {}, {})
    assert load_checkpoint(tmp_path, {}) == (15, {})
    assert "step-00000030.pt" not in [path.name for path in tmp_path.iterdir()]


def test_other_settings_are_refused_with_the_differing_keys(tmp_path):
    save_checkpoint(tmp_path, 5, {}, {"lr": 0.1, "steps": 40})
    with pytest.raises(UsageError, match=r"lr: 0\.1 -> 0\.2"):
        load_checkpoint(tmp_path, {"lr": 0.2, "steps": 40})


def test_another_version_of_the_code_is_refused_unless_accepted(tmp_path):
    before = {"lr": 0.1, "numerics": {"optimizer": 1}}
    now = {"lr": 0.1, "numerics": {"optimizer": 2}}
    save_checkpoint(tmp_path, 5, {"weight": torch.ones(1)}, before)
    with pytest.raises(UsageError, match=r"numerics: .*--fresh .*--accept-changed"):
        load_checkpoint(tmp_path, now)
    step, state = load_checkpoint(tmp_path, now, accept_changed=True)
    assert (step, state) == (5, {"weight": torch.ones(1)})
    with pytest.raises(UsageError, match=r"lr: 0\.1 -> 0\.2"):
        load_checkpoint(tmp_path, {**now, "lr": 0.2}, accept_changed=True)


def test_what_stands_beside_a_checkpoint_is_not_believed(tmp_path):
    save_checkpoint(tmp_path, 5, {}, {"lr": 0.1})
    note = tmp_path / "step-00000005.json"
    write_json(note, {**read_json(note), "step": 40, "settings": {"lr": 0.2}})
    assert load_checkpoint(tmp_path, {"lr": 0.1}) == (5, {})


@pytest.mark.parametrize("missing", ["sha256", "step", "settings"])
def test_a_missing_key_is_one_line_and_the_checkpoint_before_is_used(tmp_path, missing):
    for step in (10, 20):
        save_checkpoint(tmp_path, step, {}, {"lr": 0.1})
    path = tmp_path / "step-00000020.pt"
    note = path.with_suffix(".json")
    facts = read_json(note)
    if missing == "sha256":
        del facts["sha256"]
    else:
        content = torch.load(path, weights_only=True)
        del content[missing]
        torch.save(content, path)
        facts["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_json(note, facts)
    with pytest.warns(UserWarning, match=f"00000020.pt is damaged .*{missing}") as caught:
        assert load_checkpoint(tmp_path, {"lr": 0.1}) == (10, {})
    assert "\n" not in str(caught[0].message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    save_weights(tmp_path / "w.safetensors", {"a": torch.ones(2), "b": torch.tensor([1.0, value])}, {})
    with pytest.raises(MscsError, match=r"w\.safetensors: b holds values that are not finite"):
        read_weights(tmp_path / "w.safetensors")


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert load_checkpoint(tmp_path, {}) is None


def test_a_second_trainer_is_refused(tmp_path):
    path = tmp_path / "seed-0.lock"
    with lock(path), pytest.raises(UsageError, match="another process"), lock(path):
        pass
    with lock(path), lock(tmp_path / "seed-1.lock"):
        pass


def test_weights_come_back_with_their_header(tmp_path):
    save_weights(tmp_path / "w.safetensors", {"a": torch.ones(2, 3).t()}, {"run": "x"})
    tensors, info = read_weights(tmp_path / "w.safetensors")
    assert torch.equal(tensors["a"], torch.ones(3, 2))
    assert info == {"run": "x"}
    written = (tmp_path / "w.safetensors").read_bytes()
    for _ in range(5):
        save_weights(tmp_path / "w.safetensors", tensors, {"run": "x", "digest": "y", "seed": "0"})
    first = (tmp_path / "w.safetensors").read_bytes()
    save_weights(tmp_path / "w.safetensors", tensors, {"seed": "0", "digest": "y", "run": "x"})
    assert (tmp_path / "w.safetensors").read_bytes() == first != written
    with pytest.raises(UsageError, match="train the run first"):
        read_weights(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(MscsError, match="cannot be read"):
        read_weights(tmp_path / "bad.safetensors")


def test_writing_into_an_impossible_place_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(MscsError, match="cannot write"):
        write_json(tmp_path / "file" / "below.json", {})
    assert (tmp_path / "file").read_text() == "kept"


def test_a_failing_writer_leaves_the_old_file(tmp_path):
    from mscs.results import atomic_path

    write_text(tmp_path / "a", "old")

    def fail():
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("content", [b"", b"[[", b"\x02\0\0\0\0\0\0\0[["])
def test_a_broken_weights_file_is_named(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(MscsError, match=r"w\.safetensors cannot be read"):
        read_weights(path)
    with pytest.raises(MscsError, match="cannot be read"):
        read_weights(tmp_path)
