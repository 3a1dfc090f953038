"""Lists shared by several processes: every pair once, one table, and nothing lost when a process dies."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_bundle import blob, random_weights, save_image

from equireg.cli import main
from equireg.shards import Shard

NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Return the options of a run on five pairs, of which the fourth has no moving image."""
    for name, seed in (("moving", 1), ("fixed", 2)):
        save_image(tmp_path / f"{name}.nii.gz", blob((26, 24), (13, 12), 8, seed))
        save_image(tmp_path / f"{name}_label.nii.gz", (blob((26, 24), (13, 12), 8, seed) > 60).astype("uint8"))
    row = {"moving": "moving.nii.gz", "fixed": "fixed.nii.gz"}
    row |= {f"{key}_label": f"{key}_label.nii.gz" for key in ("moving", "fixed")}
    pairs = [{**row, "name": name} for name in NAMES]
    pairs[3]["moving"] = "missing.nii.gz"
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    options = {"pairs": tmp_path / "pairs.json", "weights": random_weights(tmp_path / "weights.pt", 2)}
    return ["--nopicture", "--output", str(tmp_path / "out"), *(f"--{key}={value}" for key, value in options.items())]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def of(monkeypatch: pytest.MonkeyPatch, index: int, count: int) -> None:
    monkeypatch.setenv("RANK", str(index))
    monkeypatch.setenv("WORLD_SIZE", str(count))


def test_two_processes_of_torchrun_register_a_list(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "equireg"]
    done = subprocess.run([*command, "batch", *words], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    told = sorted(line for line in done.stdout.splitlines() if "registered" in line)
    assert told == ["1 registered, 0 done before, 1 failed", "3 registered, 0 done before, 0 failed"]
    assert "1 of 2 pairs failed" in done.stderr and "missing.nii.gz" in done.stderr
    rows = table(tmp_path / "out" / "batch.csv")
    assert [(row["name"], row["status"]) for row in rows] == [
        (name, "failed" if name == "d" else "registered") for name in NAMES
    ]
    # One process then takes up what failed, and has the exit code.
    with pytest.raises(SystemExit, match="1"):
        main(["batch", *words])
    assert "0 registered, 4 done before, 1 failed" in capsys.readouterr().out


def test_a_table_of_measures_is_that_of_one_process(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for index in (2, 0, 1):  # in whatever order they end
        of(monkeypatch, index, 3)
        main(["evaluate", *words])
    shared, totals = table(out / "evaluation.csv"), json.loads((out / "evaluation.json").read_text())
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(SystemExit, match="1"):
        main(["evaluate", *words])
    assert shared == table(out / "evaluation.csv") and [row["name"] for row in shared] == ["a", "b", "c", "e"]
    assert totals == json.loads((out / "evaluation.json").read_text())
    assert totals["pairs"] == 5 and list(totals["failed"]) == ["d"] and totals["summary"]["dice"]["count"] == 4


def test_a_process_that_died_is_run_again(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import equireg.batch

    save, saved = equireg.batch.save_registration, []

    def dies_at_the_second(*arguments: object) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(save(*arguments))

    of(monkeypatch, 1, 2)
    main(["batch", *words])
    of(monkeypatch, 0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(equireg.batch, "save_registration", dies_at_the_second)
        with pytest.raises(SystemExit, match="130"):
            main(["batch", *words])
    assert [row["name"] for row in table(tmp_path / "out" / "batch.csv")] == ["b", "d"]
    capsys.readouterr()
    main(["batch", *words])
    assert "2 registered, 1 done before, 0 failed" in capsys.readouterr().out
    assert [row["name"] for row in table(tmp_path / "out" / "batch.csv")] == list(NAMES)


def test_a_table_written_late_holds_what_was_left_meanwhile(tmp_path: Path) -> None:
    tables: list[list[str]] = []

    def slowly(found: list[dict]) -> None:
        if not tables:  # another process ends while this one writes
            tables.append([])
            Shard(0, 2).join(
                [{"name": "a"}], "ab", tmp_path, "t", lambda rows: tables.append([r["name"] for r in rows])
            )
        tables.append([row["name"] for row in found])

    found = Shard(1, 2).join([{"name": "b", "value": float("nan")}], "ab", tmp_path, "t", slowly)
    assert tables[1:] == [["a", "b"], ["b"], ["a", "b"]] and [row["name"] for row in found] == ["a", "b"]


def test_rows_of_something_else_are_left_out(tmp_path: Path) -> None:
    """A table never mixes what was measured with other weights, options or files."""
    for index, key in ((0, "old"), (1, "old"), (0, "new")):
        shard = Shard(index, 2)
        rows = [{"name": name, "from": key} for name in shard.take("abcd")]
        found = shard.join(rows, "abcd", tmp_path, "t", lambda _: None, key)
    assert [(row["name"], row["from"]) for row in found] == [("a", "new"), ("c", "new")]


def test_an_unfinished_evaluation_says_so(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of(monkeypatch, 0, 2)
    main(["evaluate", *words])
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["missing"] == ["b", "d"] and result["pairs"] == 5
    assert [row["name"] for row in table(tmp_path / "out" / "evaluation.csv")] == ["a", "c", "e"]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_every_entry_is_one_process(count: int) -> None:
    taken = [entry for index in range(count) for entry in Shard(index, count).take(range(5))]
    assert sorted(taken) == list(range(5))


@pytest.mark.parametrize(("rank", "size"), [("0", None), (None, "2"), ("2", "2"), ("-1", "2"), ("one", "2")])
def test_a_part_that_is_none_is_refused(rank: str | None, size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=f"got {rank} and {size}"):
        Shard.from_environment()
