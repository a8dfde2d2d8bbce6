"""Files as users have them, good and bad; what is skipped and what nobody reads is said."""

import gzip
import json

import pytest

from thinkrl import UserError
from thinkrl.data.problems import load_problems
from thinkrl.data.rows import Fields, load, parse_columns, read_rows

ROWS = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": "4"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'problem,answer\n"1+\n1?",2\n"2,2?",4\n'


def write(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "name, content, places",
    [
        ("d.jsonl", LINES.replace("\n", "\n\n"), (1, 3)),
        ("d.json", json.dumps(ROWS, indent=1), (1, 2)),
        ("d.json", LINES, (1, 2)),
        ("d.jsonl", "\ufeff\n " + json.dumps(ROWS), (1, 2)),
        ("d.jsonl", "\ufeff" + LINES, (1, 2)),
        ("d.csv", "problem,answer\n1+1?,2\n2+2?,4\n", (2, 3)),
        ("d.csv", "\ufeffproblem,answer\r\n1+1?,2\r\n\r\n2+2?,4\r\n", (2, 4)),
        ("d.tsv", "problem\tanswer\n1+1?\t2\n2+2?\t4\n", (2, 3)),
    ],
)
def test_every_kind_of_file_gives_its_rows(tmp_path, name, content, places):
    (tmp_path / name).write_text(content, newline="")
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode(), mtime=0))
    for path in (tmp_path / name, tmp_path / f"{name}.gz"):
        assert list(read_rows(path)) == [(f"{path}:{place}", row) for place, row in zip(places, ROWS)]


def test_a_csv_row_may_take_several_lines(tmp_path):
    (tmp_path / "d.csv").write_text(CSV)
    assert list(read_rows(tmp_path / "d.csv")) == [
        (f"{tmp_path}/d.csv:2", {"problem": "1+\n1?", "answer": "2"}),
        (f"{tmp_path}/d.csv:4", {"problem": "2,2?", "answer": "4"}),
    ]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert list(read_rows(path)) == [(f"{path}:1", ROWS[0]), (f"{path}:2", ROWS[1])]
    path.write_bytes(b"not parquet")
    with pytest.raises(UserError, match="d.parquet: not a readable parquet file"):
        list(read_rows(path))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("d.jsonl", b"", "d.jsonl: has no rows"),
        ("d.jsonl", b"\n\n", "d.jsonl: has no rows"),
        ("d.json", b"[]", "d.json: has no rows"),
        ("d.csv", b"problem,answer\n", "d.csv: has no rows"),
        ("d.json", b'[{"a": 1},\n1', "d.json:2: not valid JSON"),
        ("d.jsonl", b'{"a": 1}\n{"a": 1\n', "d.jsonl:2: not valid JSON .*one object per line, or one list"),
        ("d.jsonl", b'{"a": "\xff"}\n', "d.jsonl:1: not valid JSON"),
        ("d.jsonl", b'{"a": 1}\n[1]', "d.jsonl:2: a row must be an object with named fields, not list"),
        ("d.csv", b"a,b\n1,2\n1,2,3\n", "d.csv:3: has 3 fields, the first line 2"),
        ("d.csv", b"a,a\n1,2\n", "d.csv:1: .* has a name twice"),
        ("d.csv", b'a,b\n1,2\n"1,2\n', "d.csv:3: not valid CSV"),
        ("d.csv", b"a,b\n1,\xff\n", "d.csv:.*: not valid CSV"),
        ("d.jsonl.gz", b'{"a": 1}\n', "d.jsonl.gz: not a readable gzip file"),
        ("d.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "d.jsonl.gz: not a readable gzip file"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(tmp_path / name))


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="absent.jsonl: no such data file"):
        list(read_rows(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="is a folder"):
        list(read_rows(tmp_path))


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "d.parquet").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'thinkrl\[parquet\]'"):
        list(read_rows(tmp_path / "d.parquet"))


def test_several_files_follow_each_other(tmp_path):
    first, second = write(tmp_path / "a+b.jsonl", ROWS[0]), write(tmp_path / "c.jsonl", ROWS[1])

    def questions(spec):
        return [p.question for p in load_problems(spec)]

    assert questions(first) == ["1+1?"], "a plus in a name is no sum"
    (tmp_path / "a+b.jsonl").rename(tmp_path / "a.jsonl")
    assert questions(f"{tmp_path}/a.jsonl+{second}") == ["1+1?", "2+2?"]
    assert [p.id for p in load_problems(f"{tmp_path}/a.jsonl + {second}")] == [0, 1]


def test_a_bad_row_stops_the_run_or_is_counted(tmp_path, capsys):
    bad = [ROWS[0], '{"problem": ', {"problem": "3+3?"}, [1], {"answer": "4"}, ROWS[1]]
    path = write(tmp_path / "d.jsonl", *bad)
    with pytest.raises(UserError, match="d.jsonl:2: not valid JSON.*; --skip_bad_rows leaves such rows out"):
        load_problems(path)
    assert capsys.readouterr().err == ""
    assert [(p.id, p.question) for p in load_problems(path, skip_bad_rows=True)] == [(0, "1+1?"), (1, "2+2?")]
    assert f"{path}: skipped 4 of its rows; the first: {path}:2: not valid JSON" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of 2 rows can be used; the first: .*d.jsonl:1: .*'answer'"):
        load_problems(
            write(tmp_path / "d.jsonl", {"problem": "3+3?"}, {"problem": "4+4?"}), skip_bad_rows=True
        )


def test_columns_that_nobody_reads_are_named_once(tmp_path, capsys):
    passage = {"problem": "How many?", "answer": "2", "passage": "Two cats sat here.", "id": "row 1", "n": 3}
    load_problems(write(tmp_path / "d.jsonl", ROWS[0], passage, passage | {"hint": "Count them."}))
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "d.jsonl:2: nothing reads 'passage', 'id', 'hint'; --columns context=NAME" in said
    )
    load_problems(
        write(tmp_path / "d.jsonl", ROWS[0] | {"question": "1+1?", "url": "a/b", "subject": "Number Theory"})
    )
    assert capsys.readouterr().err == "", "neither a repetition, nor one word, nor a label"
    [told] = load_problems(write(tmp_path / "d.jsonl", passage | {"id": 1}), columns="context=passage")
    assert told.question == "Two cats sat here.\nHow many?" and capsys.readouterr().err == ""


def test_only_the_first_rank_speaks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load_problems(write(tmp_path / "d.jsonl", ROWS[0] | {"passage": "Two cats."}))
    assert capsys.readouterr().err == ""


def test_columns_map_any_layout(tmp_path):
    row = {
        "input": "How many cats?",
        "target": 2,
        "body": "Two cats.",
        "problem": "not this",
        "answer": "nor this",
    }
    path = write(tmp_path / "d.jsonl", row)
    [read] = load_problems(path, columns="problem=input, answer=target,context=body")
    assert (read.question, read.answer) == ("Two cats. How many cats?", "2")
    verl = {
        "prompt": [{"role": "user", "content": "no"}],
        "reward_model": {"ground_truth": "no"},
        "q": "1+1?",
        "a": "2",
    }
    [read] = load_problems(write(tmp_path / "d.jsonl", verl), columns="problem=q,answer=a")
    assert (read.question, read.answer) == ("1+1?", "2")


@pytest.mark.parametrize(
    "columns, message",
    [
        (
            "answer=input",
            "d.jsonl:1: field 'answer' is missing .*: --columns answer=NAME .*of 'question', 'target'",
        ),
        (
            "promblem=question",
            "--columns 'promblem=question' .did you mean 'problem'.*known: problem, answer",
        ),
        ("problem", "--columns 'problem': write problem=NAME"),
        ("problem=", "--columns 'problem=': write problem=NAME"),
    ],
)
def test_a_mistake_in_columns_is_a_sentence(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        load_problems(write(tmp_path / "d.jsonl", {"question": "1+1?", "target": "2"}), columns=columns)


def test_a_file_without_the_columns_is_read_by_its_own_names(tmp_path, capsys):
    """One --columns serves --data and --eval_data, and several files."""
    mine, public = write(tmp_path / "a.jsonl", {"q": "1+1?", "a": "2"}), write(tmp_path / "b.jsonl", ROWS[1])
    assert [p.answer for p in load_problems(f"{mine}+{public}", columns="problem=q,answer=a")] == ["2", "4"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "b.jsonl: has no column" in said and "of --columns" in said


def test_the_remedy_of_a_refusal_works(tmp_path):
    path = write(tmp_path / "d.jsonl", {"question": "1+1?", "target": "2"})
    with pytest.raises(
        UserError, match="'answer' is missing.*--columns answer=NAME.*of 'question', 'target'"
    ):
        load_problems(path)
    assert load_problems(path, columns="answer=target")[0].answer == "2"
    path = write(tmp_path / "d.jsonl", {"task": "1+1?", "answer": "2"})
    with pytest.raises(
        UserError, match="'problem' .*is missing.*--columns problem=NAME.*of 'task', 'answer'"
    ):
        load_problems(path)
    assert load_problems(path, columns="problem=task")[0].question == "1+1?"


def test_fields_are_found_whatever_their_case():
    fields = Fields({"Body": "b", "BODY": "", "n": 3, "x": None}, "f:1", {"problem": "n"})
    assert fields.text("body") == "b" and "body" in fields and fields.column("body") == "Body"
    assert fields.text("body", "problem") == "3", "what --columns names goes first"
    assert fields.text("x") == "" and "x" not in fields
    assert parse_columns("") == {} and parse_columns("answer=a,problem=b") == {"answer": "a", "problem": "b"}


def test_make_may_give_several_of_a_row(tmp_path):
    path = write(tmp_path / "d.jsonl", *ROWS)
    assert load(path, lambda fields: [fields.text("answer")] * 2) == ["2", "2", "4", "4"]
