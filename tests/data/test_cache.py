"""What the token cache leaves on the disk."""

import os
import time
from pathlib import Path

from prefopt.data.cache import Entry, load, save
from prefopt.trees import Completion, PromptTree, token_ids

TREE = PromptTree(token_ids([1, 2]), (Completion(token_ids([3])), Completion(token_ids([4, 5]))))


def test_what_a_killed_process_left_goes_after_a_day(tmp_path: Path):
    for name, age_s in (("old", 25 * 3600), ("new", 60)):  # the new one may be another process's, which is still writing
        (tmp_path / f"{name}.partial").write_bytes(b"half")
        os.utime(tmp_path / f"{name}.partial", (time.time() - age_s,) * 2)
    save(tmp_path, "key", Entry((TREE,), {"about": 1}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.trees", "new.partial"]
    found = load(tmp_path, "key")
    assert found is not None
    assert (found.about, found.trees[0].completions[1].ids.tolist()) == ({"about": 1}, [4, 5])
