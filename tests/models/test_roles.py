"""Which role every token plays, against what tokens decode to, their bytes, and by hand."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from helpers import byte_level, tiny_regression, zoo
from tvlens.errors import ModelError, TaskError
from tvlens.models.roles import roles_of_text
from tvlens.tasks import Pair, Prompt, Prompts, Template

TRIM = pytest.mark.parametrize("trim", [False, True], ids=["whole", "trimmed"])
OPEN = Template(opening="Capitals:\n", instruction="Say it.")


def made(*prompts):
    return zoo.prompts(*prompts)


def asked(template, demos, query):
    return Prompt(tuple(Pair(*demo) for demo in demos), Pair(query, "b"), "clean", template)


def decoded(tokenizer, prompt, roles):
    """The text of the tokens of every role, in order of the text."""
    tokens = tokenizer(prompt.text, add_special_tokens=False).input_ids
    assert len(tokens) == len(roles)
    names = dict.fromkeys(roles)
    chosen = {name: [t for t, r in zip(tokens, roles, strict=True) if r == name] for name in names}
    return {name: tokenizer.decode(each) for name, each in chosen.items()}


def spelled(prompt):
    """The text of the spans of every role."""
    found = {}
    for span in prompt.spans:
        found[span.role] = found.get(span.role, "") + prompt.text[span.start : span.stop]
    return found


def test_a_tiny_prompt_by_hand():
    prompts = made(zoo.one_shot("k"), zoo.one_shot("lm"))
    separators = ("separators",)
    first, second = roles_of_text(zoo.tokenizer(bos=True), prompts, prefix=(2,))
    # <bos> Q : " a" \n A : " k" \n \n Q : " b" \n A :
    expected = ("start", *separators * 2, "input 1", *separators * 3, "answer 1", *separators * 4)
    assert first == (*expected, "query", *("answer prefix",) * 3)
    assert second == (*first[:8], "answer 1", *first[8:])


@pytest.mark.parametrize("kind", ["clean", "zero", "shuffled"])
def test_tokens_of_a_role_decode_to_its_spans(task, kind):
    # Templates whose spaces stand alone, since a space belongs to the letter behind it.
    tokenizer = zoo.tokenizer()
    template = Template(query_prefix="Q:", answer_space="", opening="A\n")
    prompts = task.prompts("test", shots=3, n=4, kind=kind, template=template)
    for prompt, roles in zip(prompts, roles_of_text(tokenizer, prompts, prefix=()), strict=True):
        assert decoded(tokenizer, prompt, roles) == spelled(prompt)


@TRIM
def test_a_space_belongs_to_the_word_behind_it(trim):
    tokenizer = byte_level.tokenizer(trim=trim)
    prompt = asked(Template(), [("Paris", "France")], "Rome")
    (roles,) = roles_of_text(tokenizer, made(prompt), prefix=())
    found = decoded(tokenizer, prompt, roles)
    assert found == {
        "separators": "Q:\nA:\n\nQ:",
        "input 1": " Paris",
        "answer 1": " France",
        "query": " Rome",
        "answer prefix": "\nA:",
    }


@TRIM
@pytest.mark.parametrize(
    ("template", "demos", "query"),
    [
        (Template(), [("Lyon, Paris", "é"), ("日本 ", "😀 x")], " ü"),
        (OPEN, [("Rome", "Italy")], "\u2003Paris\u2003"),
        (Template("", "->", " ", " ; ", " "), [("a", "b"), ("😀", "  日")], "x"),
        (Template(answer_space=""), [("Paris\n", "\nFrance")], "😀😀"),
    ],
)
def test_the_last_character_that_is_not_white_space_decides(trim, template, demos, query):
    tokenizer = byte_level.tokenizer(trim=trim)
    prompt = asked(template, demos, query)
    role_of = [span.role for span in prompt.spans for _ in range(span.start, span.stop)]
    expected = []
    for characters in byte_level.characters(tokenizer, prompt.text):
        seen = [i for i in characters if prompt.text[i].strip()] or characters
        expected.append(role_of[seen[-1]])
    (found,) = roles_of_text(tokenizer, made(prompt), prefix=())
    assert list(found) == expected


@TRIM
def test_spaces_that_offsets_leave_out_keep_their_role(trim):
    tokenizer = byte_level.tokenizer(trim=trim)
    # " " before a character that no token joins to it: it begins the answer.
    prompt = asked(Template(), [("Paris", "é")], "Rome")
    (roles,) = roles_of_text(tokenizer, made(prompt), prefix=())
    assert roles.count("answer 1") == 3
    assert decoded(tokenizer, prompt, roles)["answer 1"] == " é"


def test_tokens_that_stand_for_nothing_belong_to_the_one_before():
    pieces = ["<unk>", "▁", "Q", ":", "▁a", "\n", "A", "b"]
    inner = Tokenizer(Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    inner.pre_tokenizer = Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    prompt = asked(Template(query_prefix="Q: "), [], "a")
    whole = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
    assert tokenizer.convert_ids_to_tokens(whole.input_ids)[:3] == ["▁", "Q", ":"]
    assert whole.offset_mapping[0] in [(0, 0), (0, 1)]
    (plain,) = roles_of_text(tokenizer, made(prompt), prefix=())
    assert plain[:4] == ("separators", "separators", "separators", "query")


class Told:
    """A tokenizer that says these offsets of any text."""

    is_fast = True

    def __init__(self, *offsets):
        self.offsets = list(offsets)

    def __call__(self, texts, **_):
        found = type("Found", (), {})()
        found.offset_mapping = [self.offsets for _ in texts]
        return found


def test_empty_tokens_and_tokens_over_two_roles():
    # Q : space a \n A :
    prompts = made(asked(Template(), [], "a"))
    offsets = [(0, 0), (0, 2), (2, 4), (4, 4), (4, 6), (6, 7), (7, 7)]
    (found,) = roles_of_text(Told(*offsets), prompts, prefix=())
    assert found == (*("separators",) * 2, *("query",) * 2, *("answer prefix",) * 3)
    (found,) = roles_of_text(Told(*offsets), prompts, prefix=(2, 2))
    assert found[:4] == ("start", "start", "start", "separators")
    (found,) = roles_of_text(Told((0, 4), (4, 7)), prompts, prefix=())
    assert found == ("query", "answer prefix")
    (found,) = roles_of_text(Told((0, 3), (3, 5), (5, 7)), prompts, prefix=())
    assert found == ("separators", "query", "answer prefix")


def test_a_model_reads_as_many_tokens_as_have_roles(backend, task):
    prompts = task.prompts("test", shots=2, n=4)
    batch = backend.encode(prompts, prefix=(2,))
    roles = backend.roles(prompts, prefix=(2,))
    assert [len(each) for each in roles] == batch.mask.sum(1).tolist()
    assert {each[0] for each in roles} == {"start"}
    assert {each[-1] for each in roles} == {"answer prefix"}


def test_texts_without_a_layout_have_no_roles(lens):
    bare = Prompt((), Pair("a b c", "k"), "clean", Template("", "", "", "", " "))
    words = (
        "prompts of 'made-up' have no roles besides the query position: prompt 1 is a text that no "
        'layout surrounds; give positions as numbers, "query" or "all"'
    )
    with pytest.raises(TaskError, match=words):
        lens.backend.roles(zoo.prompts(zoo.one_shot("k"), bare), prefix=())


def test_tokens_have_no_roles(lens):
    words = "prompts of 'sums' have no roles .*: they are tokens already; give positions as numbers"
    with pytest.raises(TaskError, match=words):
        lens.backend.roles(Prompts.of_tokens([[4, 5]], [6], task="sums"), prefix=())


def test_what_has_no_tokens_is_refused(lens):
    words = "model 'llama' reads text, not PointPrompts; expected prompts of a text task"
    with pytest.raises(ModelError, match=words):
        lens.backend.roles(tiny_regression.TASK.prompts("test", shots=2, n=1), prefix=())
    with pytest.raises(ModelError, match="the lens has no tokenizer"):
        roles_of_text(None, made(zoo.one_shot("k")), prefix=())


def test_a_tokenizer_that_knows_no_offsets_is_refused():
    slow = Told()
    slow.is_fast = False
    words = "the tokenizer Told does not say which characters its tokens stand for, .* fast token"
    with pytest.raises(ModelError, match=words):
        roles_of_text(slow, made(zoo.one_shot("k")), prefix=())


def test_columns_of_points_have_roles():
    lens = tiny_regression.lens()
    prompts = tiny_regression.TASK.prompts("test", shots=2, n=3).with_dummies((1.0,))
    roles = lens.backend.roles(prompts)
    batch = lens.encode(prompts)
    assert roles == (("x 1", "y 1", "x 2", "y 2", "x 3", "y 3", "query"),) * 3
    assert batch.inputs.shape[1] == 7
    assert batch.inputs[0, roles[0].index("y 2"), 0] == prompts.ys[0, 1].to(batch.inputs)
    assert roles[0].index("query") == batch.query[0]


def test_curves_and_texts_have_no_roles_of_points():
    lens = tiny_regression.lens()
    curves = tiny_regression.TASK.curves("test", points=[2, 3], n=2)
    words = r"have no roles .*: curves are asked at several points \(curves.at\(N\) at one\); give"
    with pytest.raises(TaskError, match=words):
        lens.backend.roles(curves)
    with pytest.raises(ModelError, match="reads points, not Prompts; expected prompts of a Func"):
        lens.backend.roles(made(zoo.one_shot("k")))
