import itertools
import json
import random
import re
from collections import Counter

import pytest

from tvlens import tasks
from tvlens.errors import TaskError, UnknownNameError
from tvlens.tasks import Pair, Task, Template
from tvlens.tasks.text.draw import draw_queries, shuffle_labels

SPLITS = ("train", "validation", "test")


def numbered(n, outputs=None):
    outputs = outputs or [f"out{i}" for i in range(n)]
    pairs = tuple(Pair(f"in{i}", outputs[i % len(outputs)]) for i in range(n))
    return Task("numbered", pairs, "", "", "")


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# Splits


def test_splits_are_disjoint_exhaustive_and_70_9_21():
    task = numbered(100)
    parts = [task.split(which) for which in SPLITS]
    assert [len(part) for part in parts] == [70, 9, 21]
    assert Counter(itertools.chain(*parts)) == Counter(task.pairs)


@pytest.mark.parametrize("n", range(6, 60))
def test_every_size_from_6_on_has_three_splits_near_their_share(n):
    sizes = [len(numbered(n).split(which)) for which in SPLITS]
    assert sum(sizes) == n
    for size, share in zip(sizes, (0.70, 0.09, 0.21), strict=True):
        assert size >= 1
        assert abs(size - share * n) <= 1


def test_splits_are_the_same_on_every_machine():
    # Written down once: a change of these inputs is a change of every published split.
    assert [pair.input for pair in numbered(12).split("test")] == ["in0", "in11", "in6"]
    assert [pair.input for pair in numbered(12).split("validation")] == ["in4"]


def test_a_task_and_its_inverse_are_split_alike():
    task = numbered(50)
    turned = tuple(Pair(pair.output, pair.input) for pair in task.pairs)
    inverse = Task("inverse", turned, "", "", "")
    for which in SPLITS:
        expected = [Pair(pair.output, pair.input) for pair in task.split(which)]
        assert list(inverse.split(which)) == expected


# Prompts


def test_without_n_every_pair_of_the_split_is_asked_once_in_order():
    task = numbered(40)
    for which in SPLITS:
        asked = task.prompts(which, shots=3)
        assert tuple(prompt.query for prompt in asked) == task.split(which)
        assert asked.answers == [pair.output for pair in task.split(which)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["clean", "shuffled"])
def test_demonstrations_are_train_pairs_other_than_the_query(split, kind):
    task = numbered(30)
    train = {pair.input: pair.output for pair in task.split("train")}
    for prompt in task.prompts(split, shots=5, n=60, kind=kind):
        shown = [demo.input for demo in prompt.demos]
        assert len(shown) == len(set(shown)) == 5
        assert set(shown) <= set(train)
        assert prompt.query.input not in shown
        truth = [train[demo.input] for demo in prompt.demos]
        given = [demo.output for demo in prompt.demos]
        assert Counter(given) == Counter(truth)
        if kind == "clean":
            assert given == truth
        else:
            assert all(a != b for a, b in zip(given, truth, strict=True))


def test_zero_shot_prompts_have_no_demonstrations_and_need_no_train_pairs():
    asked = numbered(4).prompts("test", kind="zero")
    assert (asked.shots, asked.kind, asked[0].demos) == (0, "zero", ())
    assert asked.texts == ["Q: " + asked[0].query.input + "\nA:"]


def test_same_seed_same_prompts_other_seed_other_prompts():
    task = numbered(60)
    first = task.prompts("test", n=8, seed=3)
    assert first == task.prompts("test", n=8, seed=3)
    assert first.digest == task.prompts("test", n=8, seed=3).digest
    other = task.prompts("test", n=8, seed=4)
    assert [p.query for p in first] != [p.query for p in other]
    assert first[0].demos != other[0].demos


def test_kinds_share_queries_and_demonstration_inputs():
    task = numbered(60)
    clean, shuffled, zero = (
        task.prompts("train", shots=7, n=50, seed=1, kind=kind)
        for kind in ("clean", "shuffled", "zero")
    )
    queries = [prompt.query for prompt in clean]
    assert queries == [prompt.query for prompt in shuffled] == [prompt.query for prompt in zero]
    for a, b in zip(clean, shuffled, strict=True):
        assert [demo.input for demo in a.demos] == [demo.input for demo in b.demos]
        assert a.demos != b.demos


def test_queries_do_not_depend_on_the_number_of_shots():
    task = numbered(60)
    asked = [task.prompts("test", shots=shots, n=20, seed=2) for shots in (1, 5)]
    assert [p.query for p in asked[0]] == [p.query for p in asked[1]]


def test_more_prompts_than_pairs_go_round_with_fresh_demonstrations():
    task = numbered(20)
    size = len(task.split("test"))
    asked = task.prompts("test", shots=3, n=3 * size + 1)
    rounds = [asked[i * size : (i + 1) * size] for i in range(3)]
    for one in rounds:
        assert {prompt.query for prompt in one} == set(task.split("test"))
    demos = {query: set() for query in task.split("test")}
    for prompt in asked:
        demos[prompt.query].add(prompt.demos)
    assert all(len(seen) >= 3 for seen in demos.values())


def test_fewer_prompts_are_a_prefix_of_more():
    task = numbered(30)
    many = task.prompts("train", shots=3, n=50, kind="shuffled")
    assert task.prompts("train", shots=3, n=7, kind="shuffled") == many[:7]


def test_queries_choose_what_is_asked():
    task = numbered(40)
    chosen = task.split("validation")[1:3]
    asked = task.prompts("validation", shots=2, queries=list(chosen))
    assert tuple(prompt.query for prompt in asked) == chosen
    more = task.prompts("validation", shots=2, queries=chosen, n=4)
    assert Counter(prompt.query for prompt in more) == dict.fromkeys(chosen, 2)


def test_template_is_handed_on():
    template = Template(query_prefix="", answer_prefix=" ->", field_separator="")
    prompt = numbered(20).prompts("test", shots=1, template=template)[0]
    demo = prompt.demos[0]
    assert prompt.text == f"{demo.input} -> {demo.output}\n\n{prompt.query.input} ->"


def test_draw_queries_asks_none_twice_before_all_once():
    pool = [Pair(str(i), "x") for i in range(7)]
    drawn = draw_queries(pool, 17, seed=0, split="test")
    assert len(drawn) == 17
    assert set(drawn[:7]) == set(drawn[7:14]) == set(pool)
    assert drawn[:7] != drawn[7:14]


# Label shuffling


def kept(demos, shown):
    return sum(a.output == b.output for a, b in zip(demos, shown, strict=True))


@pytest.mark.parametrize("outputs", ["ab", "aab", "aabb", "aaab", "abcab", "aaabc", "abcdef"])
def test_shuffling_keeps_as_few_labels_as_any_permutation_could(outputs):
    demos = [Pair(str(i), output) for i, output in enumerate(outputs)]
    orders = itertools.permutations(outputs)
    fewest = min(sum(a == b for a, b in zip(outputs, o, strict=True)) for o in orders)
    for seed in range(20):
        shown = shuffle_labels(demos, demos, random.Random(seed))
        assert [demo.input for demo in shown] == [demo.input for demo in demos]
        assert Counter(demo.output for demo in shown) == Counter(outputs)
        assert kept(demos, shown) == fewest


def test_shuffled_labels_are_not_right_by_another_answer_where_that_can_be():
    demos = [Pair("a", "1", ("2",)), Pair("b", "2"), Pair("c", "3"), Pair("d", "4", ("1",))]
    for seed in range(20):
        shown = shuffle_labels(demos, demos, random.Random(seed))
        assert Counter(demo.output for demo in shown) == Counter("1234")
        assert all(
            label.output not in demo.answers for demo, label in zip(demos, shown, strict=True)
        )
    alone = shuffle_labels(demos[:1], demos, random.Random(0))
    assert alone[0].output in "34"


def test_shuffling_is_random_and_reaches_every_place():
    demos = [Pair(str(i), str(i)) for i in range(4)]
    shown = [shuffle_labels(demos, demos, random.Random(seed)) for seed in range(60)]
    for place in range(4):
        assert {one[place].output for one in shown} == set("0123") - {str(place)}


def test_one_shot_shuffled_shows_the_output_of_another_train_pair():
    task = numbered(30)
    truth = {pair.input: pair.output for pair in task.split("train")}
    for prompt in task.prompts("test", shots=1, kind="shuffled"):
        demo = prompt.demos[0]
        assert demo.output != truth[demo.input]
        assert demo.output in truth.values()


def test_demonstrations_with_one_common_output_take_foreign_ones():
    demos = [Pair("a", "x"), Pair("b", "x")]
    shown = shuffle_labels(demos, [*demos, Pair("c", "y")], random.Random(0))
    assert shown == (Pair("a", "y"), Pair("b", "y"))


def test_a_task_with_one_output_cannot_be_shuffled():
    task = numbered(30, outputs=["same"])
    with pytest.raises(TaskError, match=r"every train pair has the output 'same'.*kind='zero'"):
        task.prompts("test", shots=4, kind="shuffled")


# Refused requests


def test_too_few_train_pairs_for_the_shots():
    task = numbered(10)
    assert len(task.prompts("test", shots=6)[0].demos) == 6
    message = "'numbered': 7 shots need at least 8 train pairs, it has 7 .*at most 6 shots"
    with pytest.raises(TaskError, match=message):
        task.prompts("test", shots=7)


@pytest.mark.parametrize("kind", ["clean", "shuffled"])
def test_zero_shots_need_the_zero_kind(kind):
    with pytest.raises(TaskError, match=r"shots=0; .* at least 1 demonstration, use kind='zero'"):
        numbered(20).prompts("test", shots=0, kind=kind)


def test_empty_split():
    message = "'numbered': the validation split is empty, because 3 pairs .* at least 6 pairs"
    with pytest.raises(TaskError, match=message):
        numbered(3).split("validation")


def test_unknown_split_and_kind(unchecked):
    message = "unknown split 'dev'; expected one of 'train', 'validation', 'test'"
    with pytest.raises(TaskError, match=message):
        numbered(20).prompts("dev")
    with pytest.raises(TaskError, match=r"unknown kind 'random'; .* 'zero', 'shuffled', 'clean'"):
        numbered(20).prompts("test", kind="random")


def test_n_below_one():
    with pytest.raises(TaskError, match="n=0 prompts asked for; n must be at least 1"):
        numbered(20).prompts("test", n=0)


def test_queries_from_elsewhere_and_none():
    task = numbered(40)
    wrong = [task.split("test")[0], task.split("train")[0]]
    message = f"1 of 2 queries are not in the test split, the first is '{wrong[1].input}'"
    with pytest.raises(TaskError, match=message):
        task.prompts("test", queries=wrong)
    with pytest.raises(TaskError, match=r"queries is empty.*queries=None"):
        task.prompts("test", queries=[])


def test_right_answers_are_checked():
    with pytest.raises(TaskError, match="the right answers to 'a' repeat one"):
        Task("t", (Pair("a", "b", ("c", "b")),), "", "", "")
    with pytest.raises(TaskError, match="has an empty string"):
        Task("t", (Pair("a", "b", ("",)),), "", "", "")
    with pytest.raises(TaskError, match=r"the pair of 'a' holds half a surrogate pair, '.ud800'"):
        Task("t", (Pair("a", "b", ("x\ud800",)),), "", "", "")
    with pytest.raises(TaskError, match="template: opening holds half a surrogate pair"):
        Template(opening="\udc00")


def test_task_values_are_checked():
    with pytest.raises(TaskError, match="task 'x' is empty"):
        Task("x", (), "", "", "")
    with pytest.raises(TaskError, match="has an empty string"):
        Task("x", (Pair("a", ""),), "", "", "")
    with pytest.raises(TaskError, match="occur more than once, the first is 'a'"):
        Task("x", (Pair("a", "b"), Pair("a", "c")), "", "", "")


def test_digest_depends_on_the_pairs_and_their_order_only():
    a, b = Pair("a", "1"), Pair("b", "2")
    digest = Task("x", (a, b), "", "", "").digest
    assert digest == Task("y", (a, b), "other", "other", "other").digest
    assert digest != Task("x", (b, a), "", "", "").digest
    assert re.fullmatch("[0-9a-f]{64}", digest)


def test_unknown_task_gives_the_nearest_names():
    with pytest.raises(UnknownNameError) as caught:
        tasks.load("present_pst")
    message = str(caught.value)
    assert "unknown task 'present_pst': did you mean 'present-past'" in message
    assert "tvlens.tasks.names() lists" in message
    with pytest.raises(UnknownNameError, match=r"unknown task '\.\./x': tvlens\.tasks\.names"):
        tasks.load("../x")
