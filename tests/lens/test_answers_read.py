"""Whole answers, read off prompts with the answers behind them: every token and the end at once."""

from dataclasses import replace

import pytest
import torch

import tvlens
from helpers import byte_level, tiny_regression, zoo
from tvlens.errors import ModelError, ShapeError, TaskError, UnknownNameError
from tvlens.lens.edits import AddToResidual, NoEdit, ReplaceHeads
from tvlens.lens.heads import HeadMeans, contributions, mean_head_outputs
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.readout import FirstToken, WholeAnswer
from tvlens.lens.replay import ReplayEngine
from tvlens.models.batch import Batch
from tvlens.models.encode import ends_of_texts
from tvlens.tasks import Pair, Prompts, Template

LAYERS = 3
ROWS = [[31, 6, 9, 40, 12], [8, 33, 20], [17], [5, 44, 10, 30, 9, 21, 36]]
ANSWERS = [[10, 20, 30], [11], [12, 22], [13, 23, 33]]
ENDS = [[7], [7], [7], []]


def whole_batch(rows=ROWS, answers=ANSWERS, ends=ENDS):
    return Batch.pad(rows, [[answer] for answer in answers]).with_answers(ends)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def added(backend, n_prompts=1, positions="query"):
    """Two variants that add at other layers."""
    vectors = random(n_prompts, 2, LAYERS, backend.d_model, seed=1)
    active = torch.tensor([[True, False, True], [False, True, True]])
    return AddToResidual(vectors, active, positions=positions)


def replaced(backend, positions="query"):
    edit = ReplaceHeads.each_head(random(LAYERS, backend.n_head, backend.d_head))
    none = torch.zeros_like(edit.mask[:1])
    return replace(edit, mask=torch.cat([edit.mask, none]), positions=positions)


def test_answers_stand_behind_prompts_that_end_at_one_column():
    batch = whole_batch()
    assert batch.query.tolist() == [6] * 4
    assert batch.following.tolist() == [
        [10, 20, 30, 7],
        [11, 7, -1, -1],
        [12, 22, 7, -1],
        [13, 23, 33, -1],
    ]
    assert batch.inputs[:, 7:].tolist() == [[10, 20, 30], [11, 0, 0], [12, 22, 0], [13, 23, 0]]
    assert batch.mask[:, 7:].sum(dim=1).tolist() == [3, 1, 2, 2]
    assert (batch.n_read, batch.answer_columns) == (4, range(7, 10))
    assert batch.read_columns[1].tolist() == [6, 7, 8, 9]
    plain = Batch.pad(ROWS, [[answer] for answer in ANSWERS])
    assert (plain.n_read, list(plain.answer_columns)) == (1, [])


@pytest.mark.parametrize("positions", ["query", "all"])
def test_tokens_of_answers_are_read_as_by_whole_passes(backend, positions):
    batch, fast, slow = whole_batch(), ReplayEngine(backend).anywhere, WholePassEngine(backend)
    reading = fast.read(batch)
    real = (batch.following >= 0)[:, None, :, None]
    assert all(x.shape[1] == 4 for x in (*reading.residual, *reading.heads))
    for edit in (added(backend, 4, positions), replaced(backend, positions), NoEdit(LAYERS)):
        expected = slow.run_batch(batch, edit)
        found = fast.run(reading, edit)
        assert found.shape == expected.shape == (4, edit.n_variant, 4, zoo.D_VOCAB)
        off = zoo.off(found.where(real, 0.0), expected.where(real, 0.0))
        assert off < zoo.TOLERANCE[torch.float32]
        # What is read off the query is what is read off it without an answer behind it.
        first = fast.run(fast.read(Batch.pad(ROWS, [[answer] for answer in ANSWERS])), edit)
        assert zoo.off(found[:, :, 0], first) < zoo.TOLERANCE[torch.float32]


def test_an_edit_of_all_positions_acts_at_the_answer_too(backend):
    batch, engine = whole_batch(), ReplayEngine(backend).anywhere
    once, everywhere = (
        engine.run(engine.read(batch), added(backend, 4, positions))
        for positions in ("query", "all")
    )
    assert zoo.off(everywhere[:, :, 0], once[:, :, 0]) < zoo.TOLERANCE[torch.float32]
    assert zoo.off(everywhere[0, :, 1:], once[0, :, 1:]) > 0.1
    by_hand = engine.run(engine.read(batch), added(backend, 4).and_at([7, 8, 9]))
    assert torch.equal(everywhere, by_hand)


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "gpt-oss"])
def test_gradients_are_those_of_whole_passes(name):
    backend, batch = zoo.backend(name, "bridge"), whole_batch()
    found = []
    for engine in (ReplayEngine(backend).anywhere, WholePassEngine(backend)):
        edit = added(backend, 4, "all")
        leaf = edit.vectors.requires_grad_()
        loss = WholeAnswer().loss(engine.run(engine.read(batch), edit), batch)
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    assert zoo.off(found[0][0], found[1][0]) < 1e-4
    assert zoo.off(found[0][1], found[1][1]) < 1e-4
    assert found[0][1][:, 0, 1].abs().max() == 0


def test_other_prompts_of_a_batch_make_no_difference(backend):
    """Neither their prompts, longer by padding on the left, nor their answers, on the right."""
    engine, edit = ReplayEngine(backend).anywhere, added(backend, 1, "all")
    together = WholeAnswer().loss(engine.run(engine.read(whole_batch()), edit), whole_batch())
    parts = [
        whole_batch(ROWS[i : i + 1], ANSWERS[i : i + 1], ENDS[i : i + 1]) for i in range(len(ROWS))
    ]
    alone = torch.cat([WholeAnswer().loss(engine.run(engine.read(p), edit), p) for p in parts])
    assert zoo.off(together, alone) < 1e-4
    joined = engine.join([engine.read(part) for part in parts])
    assert joined.batch.following.tolist() == whole_batch().following.tolist()
    assert torch.equal(joined.batch.mask, whole_batch().mask)
    assert zoo.off(WholeAnswer().loss(engine.run(joined, edit), joined.batch), alone) < 1e-4
    order = torch.tensor([3, 1])
    some = joined.rows(order)
    assert zoo.off(WholeAnswer().loss(engine.run(some, edit), some.batch), alone[order]) < 1e-4
    assert torch.equal(some.z, joined.z[order])
    # Answers that are left out take their columns with them.
    assert (joined.batch.n_read, some.batch.n_read) == (4, 3)
    assert some.batch.inputs.shape == some.position.shape == (2, 9)
    assert {x.shape[1] for x in (*some.residual, *some.heads)} == {3}
    assert torch.equal(joined.batch[1:2].inputs, joined.batch.inputs[1:2, :8])


def test_log_probabilities_are_those_of_one_step_after_the_other(backend):
    """Each token behind the prompt and the tokens before it, in a pass of its own."""
    engine = ReplayEngine(backend).anywhere
    batch = whole_batch()
    found = WholeAnswer().score(engine.run(engine.read(batch), NoEdit(LAYERS)), batch)[:, 0]
    for i, row in enumerate(ROWS):
        total, tokens = 0.0, [*ANSWERS[i], *ENDS[i]]
        for step, token in enumerate(tokens):
            inputs = torch.tensor([[*row, *tokens[:step]]])
            with torch.no_grad():
                logits = backend.forward(inputs, torch.ones_like(inputs, dtype=torch.bool))
            total += float(logits[0, -1].float().log_softmax(dim=-1)[token])
        assert float(found[i]) == pytest.approx(total, rel=1e-4)


def test_what_is_changed_before_the_query_is_not_kept():
    backend = zoo.backend("llama", "bridge")
    engine = ReplayEngine(backend).anywhere
    words = r"AddToResidual acts at column 5, .* from the query on, column 6, is kept; edit there"
    with pytest.raises(ShapeError, match=words):
        engine.run(engine.read(whole_batch()), added(backend, 4).and_at([5]))
    slow = WholePassEngine(backend)
    assert slow.run_batch(whole_batch(), added(backend, 4).and_at([5])).shape[2] == 4


def test_greedy_decoding_gives_what_is_answered():
    lens = zoo.lens().answering("whole")
    prompts = zoo.TASK.prompts("train", shots=2, n=20)
    with torch.no_grad():
        batch = zoo.lens().encode(prompts)
        said = zoo.lens().engine.generate(zoo.lens().engine.read(batch), NoEdit(LAYERS), 3)[:, 0]
    rows = batch.inputs.tolist()
    kept = [[token for token, real in zip(row, mask, strict=True) if real]
            for row, mask in zip(rows, batch.mask.tolist(), strict=True)]  # fmt: skip
    # Every second answer is one token, and the next one its end.
    parts = [each[: 2 - i % 2 + 1] for i, each in enumerate(said.tolist())]
    right = Batch.pad(kept, [[part[:-1]] for part in parts])
    ends = [part[-1:] for part in parts]
    ends[3] = [(ends[3][0] + 1) % zoo.D_VOCAB]
    whole = right.with_answers(ends)
    outputs = lens.engine.run(lens.engine.read(whole), NoEdit(LAYERS))
    expected = [[i != 3] for i in range(20)]
    assert WholeAnswer().answered(outputs, whole).tolist() == expected


def test_a_lens_of_whole_answers_encodes_them_with_the_end(lens):
    prompts = zoo.TASK.prompts("train", shots=2, n=12)
    batch = lens.answering("whole").encode(prompts)
    end = zoo.WORDS.index("\n")
    for i, answer in enumerate(prompts.answers):
        tokens = zoo.tokenizer()(f" {answer}", add_special_tokens=False).input_ids
        row = batch.following[i].tolist()
        assert row[: len(tokens) + 1] == [*tokens, end]
        assert set(row[len(tokens) + 1 :]) <= {-1}
    assert lens.answering("whole").readout.score_name == "log-probability"
    assert lens.answering("first") is lens
    whole = lens.answering("whole")
    assert whole.answering("whole") is whole
    with pytest.raises(ModelError, match=r"first tokens asked of a lens on 'llama' that reads who"):
        whole.answering("first")


class Marking:
    """Reads characters, and begins every text with a mark, as SentencePiece does."""

    def __call__(self, texts, add_special_tokens):
        several = [[1, *map(ord, text)] for text in ([texts] if isinstance(texts, str) else texts)]
        return type("Read", (), {"input_ids": several[0] if isinstance(texts, str) else several})


@pytest.mark.parametrize("tokenizer", [Marking(), byte_level.tokenizer()])
def test_the_end_is_the_token_that_the_layout_makes_of_it(tokenizer):
    """As in demonstrations, not as the separator alone is cut into tokens."""
    texts, behind = ["A: x", "A: y"], ["\n\nQ: ", ""]
    joint = tokenizer([texts[0] + behind[0]], add_special_tokens=False).input_ids[0]
    own = tokenizer([texts[0]], add_special_tokens=False).input_ids[0]
    assert ends_of_texts(tokenizer, texts, behind) == [[joint[len(own)]], []]


class Merging:
    """Reads "x." as one token and "x.\\n" as another."""

    tokens = ("x.\n", "x.", "\n", "Q")

    def __call__(self, texts, add_special_tokens):
        def ids(text):
            found = []
            while text:
                number = next(i for i, t in enumerate(self.tokens) if text.startswith(t))
                found.append(number)
                text = text[len(self.tokens[number]) :]
            return found

        several = [ids(text) for text in ([texts] if isinstance(texts, str) else texts)]
        return type("Read", (), {"input_ids": several[0] if isinstance(texts, str) else several})


def test_an_end_that_shares_a_token_with_its_answer_is_read_alone():
    assert ends_of_texts(Merging(), ["x."], ["\nQ"]) == [[2]]


@pytest.mark.parametrize("behind", ["pair_separator", "query_prefix"])
def test_without_a_separator_the_next_input_ends_an_answer(behind):
    empty = {"pair_separator": "", "query_prefix": ""}
    template = Template(**(empty | {behind: "Q"}))
    prompts = zoo.TASK.with_template(template).prompts("train", n=3, shots=2)
    batch = zoo.lens().answering("whole").encode(prompts)
    last = [[t for t in row if t >= 0][-1] for row in batch.following.tolist()]
    assert set(last) == {zoo.WORDS.index("Q")}


def test_answers_of_one_token_that_nothing_ends_are_said_not_refused():
    lens = zoo.lens().answering("whole")
    prompts = Prompts.of_tokens(ROWS, [10, 11, 12, 13], task="toy")
    with pytest.warns(UserWarning, match="task 'toy': every answer is one token that nothing ends"):
        batch = lens.encode(prompts)
    outputs = lens.engine.run(lens.engine.read(batch), NoEdit(LAYERS))
    first = zoo.lens().encode(prompts)
    expected = zoo.lens().engine.run(zoo.lens().engine.read(first), NoEdit(LAYERS))
    assert torch.allclose(lens.readout.loss(outputs, batch), FirstToken().loss(expected, first))
    longer = lens.encode(Prompts.of_tokens(ROWS, ANSWERS))
    assert longer.following[0].tolist() == [10, 20, 30]


def test_prompts_that_fit_only_without_the_longest_answer_are_refused():
    rows = [[5] * zoo.N_CTX, [5]]
    prompts = Prompts.of_tokens(rows, [[6], [6, 7]], task="toy")
    words = r"longest prompt and the longest answer have 129 tokens; 'llama' has 128 positions"
    with pytest.raises(TaskError, match=words):
        zoo.lens().answering("whole").encode(prompts)


def test_a_batch_without_answers_is_refused():
    outputs = torch.zeros(4, 1, 1, zoo.D_VOCAB)
    with pytest.raises(ShapeError, match=r"prompts without answers behind them; encode them with"):
        WholeAnswer().loss(outputs, zoo.batch())


def test_what_answers_with_numbers_has_no_whole_answers(unchecked):
    lens = tiny_regression.lens()
    with pytest.raises(ModelError, match=r"answer='whole' asked of 'tiny', which answers with one"):
        lens.answering("whole")
    with pytest.raises(UnknownNameError, match=r"unknown answer 'words'; expected 'first' or"):
        lens.answering("words")
    prompts = tiny_regression.TASK.prompts("train", shots=4, n=3)
    with pytest.raises(ModelError, match=r"at='answers' asked of 'tiny', which answers"):
        mean_head_outputs(lens, prompts, at="answers")


@pytest.mark.parametrize("name", ["llama", "olmo2"])
@pytest.mark.parametrize("answered_only", [False, True])
def test_means_at_answers_are_those_of_every_token_of_every_answer(name, answered_only, tmp_path):
    lens = zoo.lens(name)
    prompts = zoo.TASK.prompts("train", shots=2, n=6)
    batch = lens.encode(prompts)
    kept = range(6)
    if answered_only:
        right = replace(lens, readout=Often())
        means = mean_head_outputs(right, prompts, at="answers")
        kept = [0, 2, 4]
    else:
        means = mean_head_outputs(lens, prompts, answered_only=False, at="answers")
    z, outputs = [], []
    for i in kept:
        row = batch.inputs[i][batch.mask[i]].tolist()
        for n in range(len(batch.answers[i][0])):
            tokens = [*row, *batch.answers[i][0][: n + 1]]
            reading = lens.engine.read(Batch.pad([tokens], [[[0]]]))
            z.append(reading.z)
            outputs.append(contributions(lens, reading))
    assert len(z) > len(kept)
    assert zoo.off(means.z, torch.cat(z).mean(dim=0)) < 1e-4
    assert zoo.off(means.outputs, torch.cat(outputs).mean(dim=0)) < 1e-4
    assert (means.at, list(means.kept)) == ("answers", list(kept))
    means.save(tmp_path / "means.safetensors")
    assert HeadMeans.load(tmp_path / "means.safetensors").at == "answers"
    at_query = mean_head_outputs(lens, prompts, answered_only=False)
    assert at_query.at == "query"
    assert zoo.off(at_query.z, means.z) > 0.1


class Often(FirstToken):
    """Every second prompt is answered."""

    def answered(self, outputs, batch):
        found = torch.zeros(outputs.shape[:2], dtype=torch.bool)
        found[::2] = True
        return found


def test_means_need_a_place_that_is_there(unchecked):
    lens, prompts = zoo.lens(), Prompts.of_tokens(ROWS, [10, 11, 12, 13], task="toy")
    with (
        pytest.warns(UserWarning, match="every answer is one token"),
        pytest.raises(TaskError, match=r"task 'toy': at='answers' asked of answers of one token"),
    ):
        mean_head_outputs(lens, prompts, answered_only=False, at="answers")
    with pytest.raises(UnknownNameError, match=r"unknown at='end'; expected 'query', 'answers'"):
        mean_head_outputs(lens, prompts, at="end")


def test_several_right_answers_are_read_as_the_one_that_is_shown():
    pairs = tuple(Pair(f"a{c}", "k", ("lm",)) for c in "abcdefghijkl")
    task = replace(zoo.TASK, pairs=pairs)
    batch = zoo.lens().answering("whole").encode(task.prompts("train", n=2, shots=1))
    assert batch.following.tolist() == [[zoo.WORDS.index(" k"), zoo.WORDS.index("\n")]] * 2


def test_whole_answers_are_evaluated_by_their_cross_entropy(task):
    lens = zoo.lens().answering("whole")
    table = tvlens.evaluate(lens, task, {}, shots=2, n=4, kinds=("clean",))
    assert table["metric"].tolist() == ["answer_cross_entropy"]
    losses = lens.outputs(task.prompts("test", shots=2, n=4), NoEdit(LAYERS), lens.readout.loss)
    assert table["value"].iloc[0] == pytest.approx(float(losses.mean()), abs=1e-5)
