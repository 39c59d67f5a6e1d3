"""Snapshots come whole or not at all."""

from __future__ import annotations

import hashlib
import itertools

import pytest

from raftkv.client import SnapshotDamaged

BODY = b"x" * 5000
WHOLE = BODY + hashlib.sha256(BODY).digest()


@pytest.mark.parametrize("cuts", [(), (4990,), (5000,), (5016,), (1, 2, 3)])
async def test_a_whole_snapshot_is_saved_however_it_is_cut(cluster, make_client, tmp_path, cuts):
    edges = [0, *cuts, len(WHOLE)]
    cluster.snapshot = [WHOLE[a:b] for a, b in itertools.pairwise(edges)]
    target = tmp_path / "snap"
    saved = await make_client().maintenance.save_snapshot(target)
    assert target.read_bytes() == WHOLE
    assert saved.size_bytes == len(WHOLE)
    assert [path.name for path in tmp_path.iterdir()] == ["snap"]


@pytest.mark.parametrize("damaged", [WHOLE[:-1], BODY, b"", b"short", b"y" + WHOLE[1:]])
async def test_a_damaged_one_leaves_nothing_behind(cluster, make_client, tmp_path, damaged):
    cluster.snapshot = [damaged]
    with pytest.raises(SnapshotDamaged):
        await make_client().maintenance.save_snapshot(tmp_path / "snap")
    assert list(tmp_path.iterdir()) == []


async def test_nothing_is_overwritten(cluster, make_client, tmp_path):
    cluster.snapshot = [WHOLE]
    (tmp_path / "snap").write_text("precious")
    with pytest.raises(FileExistsError):
        await make_client().maintenance.save_snapshot(tmp_path / "snap")
    assert (tmp_path / "snap").read_text() == "precious"
