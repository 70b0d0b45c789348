"""Memory, file handles and threads stay flat: the short form of tests/flat.py."""

import flat
import pytest


def test_a_hundred_steps_are_flat(model_folder, tmp_path):
    columns = flat.run(model_folder, tmp_path, 100)
    assert len(columns["rss_mib"]) == 100
    found, grew = flat.judge(columns)
    assert not grew, found


@pytest.mark.parametrize("name", ["rss_mib", "handles", "threads"])
def test_what_grows_is_seen(name):
    columns = {"rss_mib": [900.0] * 200, "handles": [30.0] * 200, "threads": [5.0] * 200}
    assert flat.judge(columns)[1] == []
    columns[name] = [x + 0.15 * i for i, x in enumerate(columns[name])]
    assert flat.judge(columns)[1] == [name]
