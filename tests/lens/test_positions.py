"""Places of prompts: columns by number and by role, and which of two prompts belong together."""

from dataclasses import replace

import pytest
import torch

from helpers import tiny_regression, zoo
from tvlens.errors import ShapeError, TaskError
from tvlens.lens.positions import Places, matched, n_tokens, places, shared
from tvlens.tasks import Prompts, Template

BOS = replace(zoo.lens(), prefix=(2,))
SHORT, LONG = zoo.one_shot("k"), zoo.one_shot("klm", query="bc")
# Both with <bos>; the first has four columns of padding before it, the other one has none.
ASKED = zoo.prompts(SHORT, zoo.one_shot("klmno"))
PADDED = 4


def of(prompts, positions, lens=BOS):
    return places(lens, prompts, lens.encode(prompts), positions)


def tokens(prompts, columns, row, lens=BOS):
    """The text of the tokens at the columns of one prompt, those that are none left out."""
    inputs = lens.encode(prompts).inputs[row]
    return "".join(zoo.WORDS[inputs[column]] for column in columns.tolist() if column >= 0)


def at(found, name):
    """The columns of one place, prompt by prompt."""
    return found.columns[:, found.names.index(name)]


def test_numbers_count_from_the_first_real_token():
    found = of(ASKED, [0, 3, 15])
    assert (found.names, found.by, found.n_place, len(found)) == (("0", "3", "15"), "columns", 3, 2)
    assert found.columns[:, :, 0].tolist() == [[4, 7, 19], [0, 3, 15]]
    assert [tokens(ASKED, found.columns[i, :2, 0], i) for i in (0, 1)] == ["<bos> a"] * 2
    assert of(ASKED, 3).columns.tolist() == [[[7]], [[3]]]


def test_negative_numbers_count_from_the_query_position():
    batch = BOS.encode(ASKED)
    found = of(ASKED, [-1, -3, -16])
    assert found.names == ("-1", "-3", "-16")
    assert torch.equal(found.columns[:, 0, 0], batch.query)
    assert found.columns[:, :, 0].tolist() == [[19, 17, 4], [19, 17, 4]]
    assert [n - 1 for n in n_tokens(batch).tolist()] == [15, 19]


def test_the_query_position():
    found = of(ASKED, "query")
    assert (found.names, found.by) == (("query",), "query")
    assert torch.equal(found.columns[:, 0, 0], BOS.encode(ASKED).query)
    assert torch.equal(found.columns, of(ASKED, -1).columns)


def test_all_positions_are_those_that_the_mask_shows():
    found, mask = of(ASKED, "all"), BOS.encode(ASKED).mask
    assert found.names == tuple(map(str, range(20)))
    for row in range(2):
        columns = found.columns[row, :, 0]
        assert columns[columns >= 0].tolist() == mask[row].nonzero()[:, 0].tolist()
    assert found.columns[0, -PADDED:].flatten().tolist() == [-1] * PADDED


def test_what_stands_behind_the_query_is_no_place():
    batch = zoo.asked_early()
    prompts = Prompts.of_tokens(zoo.ROWS, [1, 1, 1, 1])
    found = places(zoo.lens(), prompts, batch, "all")
    assert [columns.max() for columns in found.columns] == batch.query.tolist()
    assert (found.columns >= 0).sum((1, 2)).tolist() == [3, 2, 1, 4]
    assert n_tokens(batch).tolist() == [3, 2, 1, 4]
    assert places(zoo.lens(), prompts, batch, -1).columns.flatten().tolist() == [4, 5, 6, 3]


def test_a_role_has_the_tokens_of_its_spans():
    template = Template(query_prefix="Q:", answer_space="", opening="A\n")
    prompts = zoo.TASK.prompts("test", shots=3, n=4, template=template)
    found = of(prompts, "roles")
    assert (found.by, found.all_roles) == ("roles", True)
    for i, prompt in enumerate(prompts):
        spelled = dict.fromkeys(found.names, "")
        for span in prompt.spans:
            spelled[span.role] += prompt.text[span.start : span.stop]
        spelled["start"] = "<bos>" + spelled["start"]
        assert spelled == {name: tokens(prompts, at(found, name)[i], i) for name in found.names}
    real = BOS.encode(prompts).mask.nonzero().tolist()
    assert sorted([i, c] for i in range(4) for c in found.columns[i].flatten() if c >= 0) == real


def test_roles_are_named_in_the_order_in_which_they_end():
    names = ("start", "input 1", "answer 1", "input 2", "answer 2", "separators", "query")
    two, one = (zoo.TASK.prompts("test", shots=shots, n=1) for shots in (2, 1))
    assert of(two, "roles").names == (*names, "answer prefix")
    mixed = of(zoo.prompts(*one, *two), "roles")
    assert mixed.names == (*names, "answer prefix")
    assert (at(mixed, "input 2")[0] == -1).all()
    assert (at(mixed, "input 2")[1] >= 0).any()


def test_the_last_token_of_the_answer_prefix_is_the_query_position():
    batch = BOS.encode(ASKED)
    assert torch.equal(at(of(ASKED, "answer prefix"), "answer prefix").amax(1), batch.query)


def test_chosen_roles():
    every, some = of(ASKED, "roles"), of(ASKED, ["query", "input 1"])
    assert (some.names, some.by, some.all_roles) == (("query", "input 1"), "roles", False)
    assert [tokens(ASKED, at(some, "query")[i], i) for i in (0, 1)] == [" b", " b"]
    index = torch.tensor([every.names.index(name) for name in some.names])
    chosen = every.chosen(index)
    assert (chosen.names, chosen.all_roles) == (some.names, False)
    assert torch.equal(chosen.columns[:, :, :1], some.columns)
    assert (chosen.columns[:, :, 1:] == -1).all()


def test_names_and_columns_are_as_many():
    with pytest.raises(ShapeError, match="Places: 2 names, 1 places in the columns; give one name"):
        Places(("a", "b"), torch.zeros(3, 1, 1, dtype=torch.long), "roles")


@pytest.mark.parametrize(("at", "n"), [(16, 16), (-17, 16), (20, 16)])
def test_a_position_beyond_a_prompt(at, n):
    words = (
        f"position {at} lies beyond prompt 0, which has {n} tokens up to where it is asked; "
        f"expected 0 to {n - 1}, or -{n} to -1"
    )
    with pytest.raises(TaskError, match=words):
        of(ASKED, [0, at])


def test_an_unknown_role():
    words = (
        r"the prompts have no role 'input 2'; expected one of 'start', 'input 1', 'answer 1', "
        r"'separators', 'query', 'answer prefix'"
    )
    for positions in ("input 2", ["query", "input 2"]):
        with pytest.raises(TaskError, match=words):
            of(ASKED, positions)


@pytest.mark.parametrize("positions", [[], ()])
def test_no_position(positions):
    with pytest.raises(TaskError, match='positions is empty; expected "query", "all", "roles", a'):
        of(ASKED, positions)


@pytest.mark.parametrize("positions", [None, 1.5, [1, "query"], [0.5], {"query": 1}])
def test_what_is_no_position(positions, unchecked):
    with pytest.raises(TaskError, match=r'positions=.*: expected "query", "all", "roles", a posi'):
        of(ASKED, positions)


def test_prompts_without_roles():
    given = Prompts.of_tokens([[4, 5, 6], [7]], [1, 1])
    assert of(given, "all").columns[1].flatten().tolist() == [2, -1, -1]
    words = (
        'have no roles besides the query position: .*give positions as numbers, "query" or "all"'
    )
    for positions in ("roles", "input 1", ["query"]):
        with pytest.raises(TaskError, match=words):
            of(given, positions)


def test_a_batch_of_other_prompts():
    words = r"the batch has prompts of \[16\] tokens, the prompts are 2 of \[16, 20\]; give the"
    with pytest.raises(ShapeError, match=words):
        places(BOS, ASKED, BOS.encode(ASKED[:1]), "roles")


def test_points_have_places():
    lens = tiny_regression.lens()
    prompts = tiny_regression.TASK.prompts("test", shots=2, n=3).with_dummies((1.0,))
    found = of(prompts, "roles", lens)
    assert found.names == ("x 1", "y 1", "x 2", "y 2", "x 3", "y 3", "query")
    assert found.columns[:, :, 0].tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 3
    assert torch.equal(of(prompts, "query", lens).columns, at(found, "query")[:, None])
    curves = tiny_regression.TASK.curves("test", points=[2, 3], n=2)
    assert (
        of(curves, "all", lens).columns[:, :, 0].tolist()
        == [
            [0, 1, 2, -1, -1],
            [0, 1, 2, 3, 4],
        ]
        * 2
    )


def match(source, target, positions, lens=BOS, **options):
    """Names of the places that belong together, and their columns in both."""
    batches = [lens.encode(each) for each in (source, target)]
    found = [places(lens, p, b, positions) for p, b in zip((source, target), batches, strict=True)]
    columns = matched(*found, *batches, **options)
    return shared(*found)[1].names, columns


@pytest.mark.parametrize("positions", ["roles", "all", "query", [0, -1, 3], ["query", "input 1"]])
def test_a_prompt_belongs_to_itself(positions):
    names, (source, target) = match(ASKED, ASKED, positions)
    assert names == of(ASKED, positions).names
    assert torch.equal(source, of(ASKED, positions).columns)
    assert torch.equal(source, target)


def test_tokens_of_roles_are_matched_from_the_last_one():
    # The source's answer and query are longer; the target has padding through the second prompt.
    source, target = zoo.prompts(LONG, LONG), zoo.prompts(SHORT, zoo.one_shot("klmno", "cb"))
    names, (taken, put) = match(source, target, "roles")
    found = {
        name: [
            (tokens(source, taken[i, place], i), tokens(target, put[i, place], i)) for i in (0, 1)
        ]
        for place, name in enumerate(names)
    }
    assert found == {
        "start": [("<bos>", "<bos>")] * 2,
        "input 1": [(" a", " a")] * 2,
        "answer 1": [("m", " k"), (" klm", "mno")],
        "separators": [("Q:\nA:\n\nQ:",) * 2] * 2,
        "query": [("c", " b"), (" bc", " cb")],
        "answer prefix": [("\nA:",) * 2] * 2,
    }
    assert ((taken >= 0) == (put >= 0)).all()


def test_matched_columns_hold_equal_tokens_where_texts_are_equal():
    sets = [zoo.TASK.prompts("test", shots=3, n=6, kind=kind) for kind in ("clean", "shuffled")]
    names, columns = match(*sets, "roles")
    for place, name in enumerate(names):
        for i in range(6):
            texts = [tokens(each, at[i, place], i) for each, at in zip(sets, columns, strict=True)]
            assert texts[0] == texts[1] or name.startswith("answer ")
            if name == "query":
                assert texts[0] == f" {sets[0][i].query.input}"


def test_all_roles_come_to_those_that_both_have():
    two, one = (zoo.TASK.prompts("test", shots=shots, n=3) for shots in (2, 1))
    names, (taken, put) = match(two, one, "roles")
    assert names == of(one, "roles").names
    assert taken.shape == put.shape
    kept = names.index("separators")
    assert (taken[:, kept] >= 0).sum() == 3 * len("Q:\nA:\n\nQ:")


def test_roles_that_only_one_has():
    two, one = (zoo.TASK.prompts("test", shots=shots, n=3) for shots in (2, 1))
    source, target = of(two, ["input 1", "input 2"]), of(one, ["input 1"])
    words = r"source \(input 1, input 2\) and target \(input 1\) differ: 'input 2' is of one only;"
    with pytest.raises(TaskError, match=words):
        matched(source, target, BOS.encode(two), BOS.encode(one))
    with pytest.raises(
        TaskError, match=r"separators, … 8 in all.* differ: 'start' is of one only; e"
    ):
        shared(of(two, "roles"), target)


def test_sets_that_share_no_role():
    lens = tiny_regression.lens()
    points = of(tiny_regression.TASK.prompts("test", shots=1, n=2), ["x 1", "y 1"], lens)
    every = replace(points, all_roles=True)
    words = r"source \(x 1, y 1\) and target \(start, input 1, .*\) differ: they share none; expect"
    with pytest.raises(TaskError, match=words):
        shared(every, of(ASKED, "roles"))


def test_the_query_position_is_not_what_is_asked():
    with pytest.raises(TaskError, match="they are in other order, or by roles and by query; expec"):
        shared(of(ASKED, ["query"]), of(ASKED, "query"))
    with pytest.raises(TaskError, match="they are in other order"):
        shared(of(ASKED, [0, 1]), of(ASKED, [1, 0]))


@pytest.mark.parametrize("positions", ["all", 0, -1, [0, 1]])
def test_positions_by_number_need_equal_lengths(positions):
    source, target = zoo.prompts(SHORT, SHORT), zoo.prompts(SHORT, LONG)
    words = (
        r"prompt 1 has 16 tokens as source and 19 as target \(source … '\\n' '\\n' …, "
        r"target … 'l' 'm' …\); positions that are counted need as many in both: give "
        r'positions="roles" \(or "query"\)'
    )
    with pytest.raises(ShapeError, match=words):
        match(source, target, positions, tokenizer=zoo.tokenizer())


def test_prompts_one_of_which_goes_on_where_the_other_ends():
    given = [Prompts.of_tokens([row], [1]) for row in ([2, 8, 9], [2, 8])]
    words = r"has 3 tokens as source and 2 as target \(source … 'b' …, target … its end …\); positi"
    with pytest.raises(ShapeError, match=words):
        match(*given, "all", tokenizer=zoo.tokenizer())
    with pytest.raises(ShapeError, match="has 3 tokens as source and 2 as target; positions that"):
        match(*given, "all")


def test_points_of_other_lengths_are_matched_by_role_alone():
    lens = tiny_regression.lens()
    source, target = (tiny_regression.TASK.prompts("test", shots=k, n=2) for k in (3, 2))
    names, (taken, put) = match(source, target, "roles", lens)
    assert names == ("x 1", "y 1", "x 2", "y 2", "query")
    assert (taken[0].flatten().tolist(), put[0].flatten().tolist()) == (
        [0, 1, 2, 3, 6],
        [*range(5)],
    )
    words = "prompt 0 has 7 tokens as source and 5 as target; positions that are counted need as"
    with pytest.raises(ShapeError, match=words):
        match(source, target, "all", lens, tokenizer=zoo.tokenizer())


def test_there_is_one_source_for_each_target():
    words = "2 places of 2 source prompts and 1 of 1 target prompts; expected one source for each"
    with pytest.raises(ShapeError, match=words):
        match(ASKED, ASKED[:1], "query")
