"""What control groups leave: both versions, nested groups, containers; and a real group where one can be made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cospadi.pipeline.available_memory import _left_in_groups, available_bytes

GIB = 1 << 30


def group(folder: Path, version: int, limit: int | str, used: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 12\n{names[2]} {inactive}\nslab 3\n")


def left(tmp_path: Path, membership: str) -> list[int]:
    (tmp_path / "cgroup").write_text(membership)
    return list(_left_in_groups(tmp_path / "cgroup", tmp_path / "fs"))


def test_version_2_own_group_and_those_above(tmp_path):
    group(tmp_path / "fs/slurm/job/step", 2, "max", GIB)
    group(tmp_path / "fs/slurm/job", 2, 4 * GIB, 3 * GIB, inactive=GIB // 2)
    group(tmp_path / "fs/slurm", 2, 16 * GIB, 5 * GIB)
    assert left(tmp_path, "0::/slurm/job/step\n") == [3 * GIB // 2, 11 * GIB]


def test_version_1_by_its_controller(tmp_path):
    group(tmp_path / "fs/memory/slurm/job", 1, 2 * GIB, GIB)
    group(tmp_path / "fs/memory", 1, 9223372036854771712, 8 * GIB)
    named = "3:cpuset:/\n4:hugetlb,memory:/slurm/job\n0::/\n"
    assert min(left(tmp_path, named)) == GIB


@pytest.mark.parametrize("name", ["/", "/docker/f00d", "/../../other", "/a/../../../etc"])
def test_a_group_mounted_as_root(name, tmp_path):
    group(tmp_path / "fs", 2, 2 * GIB, GIB)
    assert left(tmp_path, f"0::{name}\n") == [GIB]


def test_a_group_beyond_its_limit_has_nothing_left(tmp_path):
    group(tmp_path / "fs", 2, GIB, 2 * GIB)
    assert left(tmp_path, "0::/\n") == [0]


@pytest.mark.parametrize("membership", ["", "0::/x\n"])
def test_without_figures_the_machine_decides(membership, tmp_path):
    assert left(tmp_path, membership) == []
    (tmp_path / "cgroup").unlink()
    assert list(_left_in_groups(tmp_path / "cgroup", tmp_path / "fs")) == []


def test_a_process_in_a_real_group_is_told_what_the_group_has():
    for parent, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        folder = parent / f"cospadi-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (folder / limit).exists():
                break
        except OSError:
            pass
        folder.rmdir()
    else:
        pytest.skip("no control group of memory can be made here")
    try:
        (folder / limit).write_text(str(700 << 20))
        code = (
            f"open({str(folder / 'cgroup.procs')!r}, 'w').write('0')\n"
            "from cospadi.pipeline.available_memory import available_bytes\n"
            "print(available_bytes())"
        )
        found = int(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )
    finally:
        folder.rmdir()
    assert 100 << 20 < found <= 700 << 20 < available_bytes()
