"""Files, folders and hub names: every kind of file gives the same rows, every broken one is one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest

from alignment.data.reading import raw_rows
from alignment.errors import UserError
from alignment.recipes.rows import DATA_ENDINGS, SourceSection
from tests.data.building import write

ROWS = [{"prompt": f"line\u2028separator {i}", "chosen": 'a "b",\nc', "rejected": "ü"} for i in range(3)]


def read(name: str | Path, role: str = "train", **keys) -> list[dict]:
    return [row for _, row in raw_rows(SourceSection(name=str(name), **keys), role)]


def places(name: str | Path, **keys) -> list[tuple[int, str | None]]:
    return [tuple(place) for place, _ in raw_rows(SourceSection(name=str(name), **keys), "train")]


@pytest.mark.parametrize("ending", [ending for ending in DATA_ENDINGS if ending != ".parquet"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, ending):
    unpack, pack = (gzip.decompress, gzip.compress) if ending.endswith(".gz") else (bytes, bytes)
    file = Path(write(tmp_path / f"rows{ending}", ROWS))
    file.write_bytes(pack(b"\xef\xbb\xbf" + unpack(file.read_bytes())))
    assert read(file) == ROWS


@pytest.mark.parametrize("ending", DATA_ENDINGS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, ending):
    name = write(tmp_path / f"rows{ending}", ROWS)
    assert read(name) == ROWS
    assert read(name, "eval") == ROWS  # a plain file is all rows, whatever it is used for
    assert read(name, limit=2) == ROWS[:2]
    assert read(name, split="train[1:]") == ROWS[1:]
    with pytest.raises(UserError, match=rf"rows\{ending}: no split 'test' in it; valid: train"):
        read(name, split="test")


def test_csv_fields_are_text(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,label\nNA,1\n,0.5\n")
    assert read(tmp_path / "a.csv") == [{"prompt": "NA", "label": "1"}, {"prompt": "", "label": "0.5"}]


def test_named_splits_of_a_json_file_and_of_a_folder(tmp_path):
    one, two = [{"a": 1}], [{"a": 2}, {"a": 3}, {"a": 4}, {"a": 5}]
    file = write(tmp_path / "splits.json", {"train": one, "test": two})
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", one)
    for i in (0, 1):  # the hub numbers the parts of a split
        write(folder / f"test-0000{i}-of-00002.parquet", two[2 * i : 2 * i + 2])
    (folder / "README.md").write_text("not data")
    for name in (file, str(folder)):
        assert read(name) == one  # data.train
        assert read(name, "eval") == two  # data.eval
        assert read(name, split="test") == two
        assert read(name, split="test[:50%]") == two[:2]
        assert read(name, split="train+test[3:]") == [*one, two[3]]
        with pytest.raises(UserError, match="no split 'tset' in it; did you mean 'test'"):
            read(name, split="tset")
        with pytest.raises(UserError, match=r"split 'test\[x:\]'"):
            read(name, split="test[x:]")
    (folder / "train.jsonl").unlink()
    assert read(folder) == two  # the only split there is


def test_hub_names_and_their_splits(tmp_path, monkeypatch):
    """Only the call into `datasets` is exchanged: nothing may reach for a hub."""
    asked = []

    def load_dataset(name, subset, data_dir, split):
        asked.append((name, split) if subset is data_dir is None else (name, subset, data_dir, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("org/pairs") == ROWS
    read("org/pairs", "eval")
    read("org/pairs", split="train_prefs[:10%]")
    assert asked == [("org/pairs", "train"), ("org/pairs", "test"), ("org/pairs", "train_prefs")]
    assert read("org/pairs", split="train_prefs[1:]+test[:34%]") == [ROWS[1], ROWS[2], ROWS[0]]
    assert places("org/pairs", split="train_prefs[1:]+test[:34%]") == [(2, None), (3, None), (1, None)]
    assert places("org/pairs", limit=2) == [(1, None), (2, None)]
    with pytest.raises(UserError, match=r"org/pairs: split 'test\[x:\]'"):
        read("org/pairs", split="test[x:]")
    read("org/pairs", subset="en", data_dir="harmless-base")
    assert asked[-1] == ("org/pairs", "en", "harmless-base", "train")


def test_rows_are_numbered_as_they_are_found(tmp_path):
    """By line, where lines are rows; else by row, of its file, whatever slice is read."""
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}\n{"a": 3}\n')
    assert places(tmp_path / "a.jsonl") == [(2, None), (4, None), (5, None)]
    assert places(tmp_path / "a.jsonl", split="train[1:]", limit=1) == [(4, None)]
    for ending in (".json", ".csv", ".parquet"):
        assert places(write(tmp_path / f"rows{ending}", ROWS), split="train[-2:]") == [(2, None), (3, None)]
    splits = write(tmp_path / "splits.json", {"train": [{"a": 1}], "test": [{"a": 2}, {"a": 3}]})
    assert places(splits, split="train+test[1:]") == [(1, None), (2, None)]
    folder = tmp_path / "folder"
    folder.mkdir()
    files = [write(folder / f"train-0000{i}-of-00002.parquet", ROWS[:2]) for i in (0, 1)]
    assert places(folder, split="train[1:]") == [(2, files[0]), (1, files[1]), (2, files[1])]


def test_a_name_that_the_hub_does_not_give():
    with pytest.raises(
        UserError, match="'nobody/no-such-data' is neither a local file .* nor a data set that the hub"
    ):
        read("nobody/no-such-data")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n\n7\n', r"a\.jsonl:3: a JSON object is needed"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: no rows"),
        ("a.jsonl", b'{"prompt": "\xe9"}\n', r"a\.jsonl: .*UTF-8"),
        ("a.json", b"[\n{,}]", r"a\.json:2: not valid JSON"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', r"a\.json:2: .* for one object a line name it \.jsonl"),
        ("a.json", b'{"prompt": 1}', r"list of objects; for one object a line name it \.jsonl"),
        ("a.json", b"[1, 2]", "list of objects"),
        ("a.json", b'{"train": [1]}', r"a\.json: split 'train': expected a list of objects"),
        ("a.json", b"[]", r"a\.json: no rows"),
        ("a.jsonl.gz", b"not packed", r"a\.jsonl\.gz: not a complete gzip file"),
        ("a.jsonl.gz", gzip.compress(json.dumps(ROWS[0]).encode() * 99, mtime=0)[:-20], "not a complete gzip file"),
        ("a.json.gz", gzip.compress(b"[", mtime=0)[:-3], r"a\.json\.gz: not a complete gzip file"),
        ("a.parquet", b"PAR1 and then nothing", r"a\.parquet: not a readable Parquet file"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a\.csv: not a readable CSV file: .*Expected 2 columns, got 3"),
        ("a.csv", b"a,b,b\n1,2,3\n", r"a\.csv: two columns are called 'b'"),
        ("a.csv", b"", r"a\.csv: "),
        ("a.csv", b"a,b\n", r"a\.csv: no rows"),
        ("a.csv", b"a,b\n\xff\xfe,1\n", r"a\.csv: not a readable CSV file: .*UTF-?8"),
    ],
)
def test_broken_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as said:
        read(tmp_path / name)
    assert "\n" not in str(said.value) and name in str(said.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [("[" * 100_000 + "]" * 100_000, "nested too deeply"), ("1" * 5000, "a number has too many digits")],
    ids=["deep", "long"],
)
def test_json_that_python_does_not_read_is_one_line(tmp_path, value, message):
    for name, content in (("a.json", f'[{{"a": {value}}}]'), ("a.jsonl", f'\n{{"a": {value}}}\n')):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=rf"a\.json(:1|l:2): not valid JSON: {message}"):
            read(tmp_path / name)


def test_places_without_data(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file; paths are relative to"):
        read(tmp_path / "gone.jsonl")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes\.txt: unknown kind of file; valid: \.jsonl"):
        read(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="holds no data file"):
        read(tmp_path)
    for name in ("train.jsonl", "train.csv"):
        write(tmp_path / name, ROWS)
    with pytest.raises(UserError, match=r"train\.csv and train\.jsonl are both split 'train'; keep one"):
        read(tmp_path)


def test_a_folder_as_a_clone_of_the_hub_leaves_it(tmp_path):
    """Shards with a hash, in data/, and whatever else lies beside data."""
    (tmp_path / "data").mkdir()
    for i, digest in enumerate(("6ef3991c06080e14", "aaf3991c06080e14")):
        write(tmp_path / "data" / f"train-0000{i}-of-00002-{digest}.parquet", [{"a": i}])
    write(tmp_path / "data" / "test-00000-of-00001-7ef3991c06080e14.parquet", [{"a": 7}])
    for name in ("README.md", ".gitattributes", "dataset_infos.json", ".hidden.json", "picture.png"):
        (tmp_path / name).write_text("{}")
    (tmp_path / ".cache").mkdir()
    assert read(tmp_path) == [{"a": 0}, {"a": 1}] and read(tmp_path, "eval") == [{"a": 7}]
    (tmp_path / "data" / "train-00001-of-00002-aaf3991c06080e14.parquet").unlink()
    with pytest.raises(UserError, match="split 'train' has 1 parts, and their names say 2: complete the download"):
        read(tmp_path)


def test_a_folder_without_data_says_what_there_is_instead(tmp_path):
    def refusal() -> str:
        with pytest.raises(UserError) as refused:
            read(tmp_path)
        return str(refused.value)

    assert "it is empty" in refusal()
    (tmp_path / "all.zip").write_text("")
    assert "there is all.zip" in refusal()
    for config in ("harmless-base", "helpful-base"):
        (tmp_path / config).mkdir()
        write(tmp_path / config / "train.jsonl.gz", ROWS)
    assert f"name one of them ({tmp_path}/harmless-base, {tmp_path}/helpful-base)" in refusal()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)  # its state.json is no data
    assert "it was written by save_to_disk" in refusal()
    (tmp_path / "train").mkdir()
    write(tmp_path / "train" / "0001.parquet", ROWS[1:])
    write(tmp_path / "train" / "0000.parquet", ROWS[:1])
    assert read(tmp_path) == ROWS
