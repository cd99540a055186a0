"""Locks: held once, refused where the file system has none, and told apart from locks of one machine only."""

import fcntl
import subprocess
import sys

import pytest

from mscs.errors import UsageError
from mscs.locks import check_shared, locked

HOLD = """
import sys
from pathlib import Path
from mscs.locks import locked
with locked(Path(sys.argv[1]), **eval(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(path, **options):
    command = [sys.executable, "-c", HOLD, str(path), repr(options)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, text=True, **pipes)


@pytest.mark.parametrize("name", ["file", "."])
def test_one_process_holds_a_file_or_a_folder_and_the_next_waits_if_told_to(tmp_path, name):
    with hold(tmp_path / name) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), locked(tmp_path / name):
            pass
        with hold(tmp_path / name, waiting="waits") as second:
            assert second.stderr.readline() == "waits\n"
            first.stdin.write("\n")
            first.stdin.flush()
            assert second.stdout.readline() == "held\n"
            second.stdin.write("\n")


def test_a_file_system_without_locks_is_refused_with_what_to_do(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(UsageError, match=r"has no locks \(Function not implemented\); .*Lustre: flock"):
        locked(tmp_path / "file").__enter__()
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(UsageError, match="gives one lock to two; mount it with locks"):
        locked(tmp_path / "file").__enter__()


def test_a_mount_whose_locks_hold_on_one_machine_only_is_refused(tmp_path):
    mounts = tmp_path / "mounts"
    inner = tmp_path / "a b"
    (inner / "work").mkdir(parents=True)
    escaped = str(inner).replace(" ", "\\040")
    lines = ["disk / ext4 rw 0 0", f"server:/x {tmp_path} nfs4 rw,nolock 0 0"]
    mounts.write_text("\n".join([*lines, f"lustre {escaped} lustre rw,flock 0 0\n"]))
    check_shared(inner / "work", mounts)
    with pytest.raises(UsageError, match="mounted with nolock"):
        check_shared(tmp_path, mounts)
    mounts.write_text("\n".join([*lines, f"lustre {escaped} lustre rw,localflock 0 0\n"]))
    with pytest.raises(UsageError, match="mounted with localflock: mount it with locks"):
        check_shared(inner / "work", mounts)
