"""Files of tasks: every shape is read or refused by name, and nothing in one goes unused."""

import json
import warnings
from pathlib import Path

import pytest

from tvlens import tasks
from tvlens.errors import LONGEST, TaskError
from tvlens.tasks import Pair, Task, Template

PAIR = {"input": "a", "output": "b"}
WORDS = [(f"word{i}", f"WORD{i}") for i in range(30)]


def write(path: Path, content: object) -> Path:
    """The content as JSON, or a text as it is."""
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def records(pairs):
    return [{"input": i, "output": o} for i, o in pairs]


SHAPES = {
    "list.json": json.dumps(records(WORDS)),
    "header.json": json.dumps({"description": "d", "pairs": records(WORDS)}),
    "one-line-each.jsonl": "\n".join(json.dumps(x) for x in records(WORDS)) + "\n\n",
    "windows.ndjson": "".join(json.dumps(x) + "\r\n" for x in records(WORDS)),
    "mapping.json": json.dumps(dict(WORDS)),
    "mapping-in-header.json": json.dumps({"name": "m", "pairs": dict(WORDS)}),
    "columns.json": json.dumps({"input": [i for i, _ in WORDS], "output": [o for _, o in WORDS]}),
    "commas.csv": "input,output\n" + "".join(f"{i},{o}\n" for i, o in WORDS),
    "marked.csv": "\ufeffoutput,input\r\n" + "".join(f'"{o}",{i}\r\n' for i, o in WORDS),
    "tabs.tsv": "input\toutput\n" + "\n\n".join(f"{i}\t{o}" for i, o in WORDS),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_gives_the_same_pairs(tmp_path, name):
    task = tasks.load_file(write(tmp_path / name, SHAPES[name]))
    assert [(pair.input, pair.output) for pair in task.pairs] == WORDS
    assert task.digest == tasks.load_file(write(tmp_path / "x.json", records(WORDS))).digest


def test_one_entry_is_a_task_of_one_pair(tmp_path):
    assert tasks.load_file(write(tmp_path / "f.json", PAIR)).pairs == (Pair("a", "b"),)


def test_words_that_look_like_a_header_are_words(tmp_path):
    found = tasks.load_file(write(tmp_path / "f.json", {"pairs": "pair", "names": "name"}))
    assert found.pairs == (Pair("pairs", "pair"), Pair("names", "name"))


def test_texts_of_tables_may_hold_commas_quotes_and_lines(tmp_path):
    text = 'input,output\n"a, b","say ""c"""\n"two\nlines",d\n'
    task = tasks.load_file(write(tmp_path / "f.csv", text))
    assert task.pairs == (Pair("a, b", 'say "c"'), Pair("two\nlines", "d"))


@pytest.mark.parametrize("number", ["1.0", "1e5", "-0", "0.10", "1E+2", "12345678901234567890123"])
def test_numbers_stay_as_they_are_written(tmp_path, number):
    text = f'[{{"input": {number}, "output": [{number}, "b"]}}]'
    assert tasks.load_file(write(tmp_path / "f.json", text)).pairs == (
        Pair(number, number, ("b",)),
    )


def test_several_outputs_are_several_right_answers(tmp_path):
    entries = [{"input": "a", "output": ["b", "c", "b"]}, {"input": "d", "output": ["e"]}]
    task = tasks.load_file(write(tmp_path / "f.json", entries))
    assert task.pairs == (Pair("a", "b", ("c",)), Pair("d", "e"))
    lists = {"input": ["a", "d"], "output": [["b", "c"], "e"]}
    assert tasks.load_file(write(tmp_path / "g.json", lists)).pairs == task.pairs
    mapping = {"a": ["b", "c"], "d": "e"}
    assert tasks.load_file(write(tmp_path / "h.json", mapping)).pairs == task.pairs
    alone = Task("t", (Pair("a", "b"), Pair("d", "e")), "", "", "")
    assert task.digest != alone.digest


def test_one_instruction_opens_every_prompt_in_any_layout(tmp_path):
    entries = [{"instruction": " Say it. ", **x} for x in records(WORDS)]
    path = write(tmp_path / "f.json", entries)
    task = tasks.load_file(path)
    assert task.template == Template(instruction="Say it.")
    assert task.prompts("test", shots=2)[0].text.startswith("Say it.\n\nQ: word")
    arrow = task.with_template(tasks.TEMPLATES["arrow"])
    assert arrow.prompts("test", shots=2)[0].text.startswith("Say it.\nword")
    own = task.with_template(Template(instruction="Mine."))
    assert own.prompts("test", shots=2)[0].text.startswith("Mine.\n\nQ: word")
    held = task.with_template(Template(opening="<s>Say it.<e>"))
    assert held.template.instruction == ""
    # Another prompt is another task.
    assert task.digest != tasks.load_file(write(tmp_path / "g.json", records(WORDS))).digest


def test_several_instructions_are_refused(tmp_path):
    entries = [{"instruction": f"Say {i % 2}.", **x} for i, x in enumerate(records(WORDS))]
    path = write(tmp_path / "f.json", entries)
    with pytest.raises(TaskError, match=r"f.json: .* 2 instructions, such as 'Say 0.' and 'Say 1."):
        tasks.load_file(path)
    with pytest.raises(TaskError, match=r"2 instructions, such as '' and 'Say 0\."):
        tasks.load_file(write(path, [PAIR, entries[0]]))


def test_load_file_reads_the_public_format(tmp_path):
    entries = [{"input": " a b ", "output": "ä"}, {"input": 7, "output": 1.5}]
    task = tasks.load_file(write(tmp_path / "my_task.json", entries))
    assert task.pairs == (Pair("a b", "ä"), Pair("7", "1.5"))
    assert (task.name, task.source) == ("my_task", "my_task.json")
    assert task.licence == "not stated in the file"


def test_load_file_reads_the_shipped_format(tmp_path):
    header = {"name": "n", "description": "d", "source": "s", "licence": "MIT"}
    content = header | {"pairs": [{"input": "a", "output": "b"}]}
    assert tasks.load_file(write(tmp_path / "f.json", content)) == Task(
        "n", (Pair("a", "b"),), "d", "s", "MIT"
    )


def test_identical_pairs_are_merged(tmp_path):
    entries = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]
    task = tasks.load_file(write(tmp_path / "f.json", entries + entries[:1]))
    assert task.pairs == (Pair("a", "b"), Pair("c", "d"))


def test_different_outputs_of_one_input_are_refused_or_dropped(tmp_path):
    entries = [{"input": i, "output": o} for i, o in ("ab", "cd", "ae", "fg", "fh", "ab")]
    path = write(tmp_path / "f.json", entries)
    message = r"the input 'a' has different outputs, 'b' and 'e' \(2 such .* duplicates='drop'"
    with pytest.raises(TaskError, match=message):
        tasks.load_file(path)
    task = tasks.load_file(path, duplicates="drop")
    assert task.pairs == (Pair("c", "d"),)
    assert "2 inputs with different outputs left out" in task.description


def test_nothing_left_after_dropping(tmp_path):
    path = write(tmp_path / "f.json", [{"input": "a", "output": o} for o in "bc"])
    with pytest.raises(TaskError, match="empty once the 1 inputs with different outputs"):
        tasks.load_file(path, duplicates="drop")


def test_unknown_duplicates(tmp_path, unchecked):
    with pytest.raises(TaskError, match="duplicates='keep': expected one of 'error', 'drop'"):
        tasks.load_file(tmp_path / "f.json", duplicates="keep")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is empty: it holds no pairs; add at least one"),
        ({"pairs": []}, "is empty: it holds no pairs"),
        ({}, "is empty: it holds no pairs"),
        ({"pairs": [], "pair": 1}, "unknown key 'pair'; expected name, description, source"),
        ({"data": [PAIR]}, "input 'data': 'output' is an object with the keys 'input', 'output'"),
        ({"a": None}, "input 'a': 'output' is null, expected a string"),
        ([PAIR | {"id": 3}], "pair 1: unknown key 'id'; expected input, output, instruction"),
        (PAIR | {"id": 3}, "unknown key 'id'"),
        ({"input": ["a"], "output": ["b"], "id": [1]}, "unknown key 'id'"),
        ({"input": ["a"], "output": ["b", "c"]}, "differ in length .'input' has 1, 'output' has 2"),
        ([PAIR | {"output": []}], "pair 1: 'output' is an empty list"),
        ([PAIR | {"output": ["a", ["b"]]}], "pair 1: 'output' is a list, expected"),
        ([PAIR | {"instruction": ["x"]}], "'instruction' is a list, expected a string"),
        ('[{"input": "a", "output": "b", "input": "c"}]', "the key 'input' comes twice"),
        (json.dumps(PAIR) + "\n" + json.dumps(PAIR), r"Extra data.*files that end in \.jsonl"),
        ("[" * 100_000, "is not JSON"),
        ('[{"input": "\\ud83d", "output": "b"}]', "half a surrogate pair, '.ud83d', at position 0"),
        ('{"name": "\\udfff", "pairs": [{"input": "a", "output": "b"}]}', "half a surrogate pair"),
        ('[{"input": ' + "9" * 5000 + ', "output": 1}]', "is a number of 5000 characters"),
        ({f"word{i}": {"x" * 500: i} for i in range(800)}, "input 'word0': 'output' is an object"),
        ({"x" * 5000: None}, "'output' is null"),
        ('"a"', "expected a list of .* found a string"),
        (None, "expected a list of .* found null"),
        ([PAIR, "a"], "pair 2: expected an object with 'input' and 'output', found a string"),
        ([{"input": "a"}], "pair 1: the key 'output' is missing, found .* keys 'input'"),
        ([PAIR, {"output": "a"}], "pair 2: the key 'input' is missing"),
        ([{"input": "a", "output": None}], "pair 1: 'output' is null, expected a string"),
        ([{"input": ["a"], "output": "b"}], "pair 1: 'input' is a list, expected a string"),
        ([{"input": "a", "output": True}], "pair 1: 'output' is true or false, expected"),
        ([{"input": "a", "output": " "}], "pair 1: 'output' is an empty string; correct"),
        ([{"input": float("nan"), "output": "b"}], "'input' is a number that is not finite"),
        ({"name": 3, "pairs": [PAIR]}, "'name' is the number 3, expected a text"),
    ],
)
def test_content_that_cannot_be_used_is_named(tmp_path, content, message):
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(TaskError, match=f"(bad.json|task ').*{message}") as caught:
        tasks.load_file(path)
    assert len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line holds nothing; expected the names of its columns, input,output"),
        ("hot,cold\nbig,small\n", "first line holds 'hot', 'cold'; expected the names"),
        ("input,output,id\na,b,1\n", "unknown key 'id'; expected input, output"),
        ("input,input,output\na,b,c\n", "once each"),
        ("input,output\na,b,c\n", "line 2 has 3 columns, expected 2"),
        ("input,output\n\na\n", "line 3 has 1 columns, expected 2"),
        ("input,output\na,\n", "line 2: 'output' is an empty string"),
        ('input,output\na,"b"c\n', "line 2 cannot be read"),
        ('input,output\na,"b\n', "line 2 cannot be read"),
        ("input,output\n", "is empty: it holds no pairs"),
    ],
)
def test_tables_that_cannot_be_used_are_named(tmp_path, text, message):
    with pytest.raises(TaskError, match=f"bad.csv.*{message}"):
        tasks.load_file(write(tmp_path / "bad.csv", text))


def test_lines_that_cannot_be_used_are_named(tmp_path):
    text = json.dumps(PAIR) + "\n\n{'input': 1}\n"
    with pytest.raises(TaskError, match=r"bad.jsonl, line 3 is not JSON"):
        tasks.load_file(write(tmp_path / "bad.jsonl", text))
    with pytest.raises(TaskError, match=r"bad.jsonl, line 1: expected an object .* a list"):
        tasks.load_file(write(tmp_path / "bad.jsonl", json.dumps([PAIR])))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TaskError, match=r"none.json cannot be read: No such file .* check the"):
        tasks.load_file(tmp_path / "none.json")
    with pytest.raises(TaskError, match="cannot be read: Is a directory"):
        tasks.load_file(tmp_path)
    path = tmp_path / "bad.json"
    path.write_text("[{'input': 1}]", encoding="utf-8")
    with pytest.raises(TaskError, match=r"bad.json is not JSON: .*line 1"):
        tasks.load_file(path)
    path.write_bytes(b'[{"input": "\xff", "output": "b"}]')
    with pytest.raises(TaskError, match=r"bad.json is not UTF-8 text: byte 12"):
        tasks.load_file(path)


def test_outputs_of_one_input_may_be_merged(tmp_path):
    entries = records([("a", "b"), ("c", "d"), ("a", "e"), ("a", "b")])
    task = tasks.load_file(write(tmp_path / "f.json", entries), duplicates="merge")
    assert task.pairs == (Pair("a", "b", ("e",)), Pair("c", "d"))
    assert "1 inputs with different outputs merged" in task.description


def test_load_folder(tmp_path):
    for name in ("b.json", "a.csv", "deep/er/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, "input,output\na,b" if name == "a.csv" else PAIR)
    (tmp_path / "README.md").write_text("text")
    write(tmp_path / ".hidden.json", [])
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".git" / "x.json", [PAIR])
    (tmp_path / "run" / "steps").mkdir(parents=True)
    write(tmp_path / "run" / ".tvlens-lock", "")
    write(tmp_path / "run" / "steps" / "x.json", [PAIR])
    found = tasks.load_folder(tmp_path)
    assert list(found) == ["a", "b", "deep/er/c"]
    assert [task.name for task in found.values()] == list(found)


def test_files_that_cannot_be_used_are_named_and_the_others_loaded(tmp_path):
    write(tmp_path / "good.json", [PAIR])
    write(tmp_path / "bad.json", [{"input": "a"}])
    write(tmp_path / "twice.json", [PAIR])
    write(tmp_path / "twice.tsv", "input\toutput\na\tb")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert list(tasks.load_folder(tmp_path)) == ["good"]
    bad, twice = (str(warning.message) for warning in caught)
    assert "left out: task file" in bad
    assert "bad.json, pair 1: the key 'output' is missing" in bad
    assert "'twice' may be one file, found twice.json and twice.tsv" in twice
    conflicting = [PAIR, {"input": "a", "output": "c"}, {"input": "x", "output": "y"}]
    write(tmp_path / "bad.json", conflicting)
    (tmp_path / "twice.tsv").unlink()
    assert tasks.load_folder(tmp_path, duplicates="drop")["bad"].pairs == (Pair("x", "y"),)


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(TaskError, match=r"holds no task file; expected some that end in .json"):
        tasks.load_folder(tmp_path)
    with pytest.raises(TaskError, match="nowhere: no such folder"):
        tasks.load_folder(tmp_path / "nowhere")
    write(tmp_path / "bad.json", [])
    with pytest.raises(TaskError, match=r"none of its 1 task files can be used; .* is empty"):
        tasks.load_folder(tmp_path)
