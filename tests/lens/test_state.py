"""Whatever is switched off, and wherever Ctrl-C lands: training works, models come back."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import tvlens
from helpers import trained, zoo
from tvlens.errors import ModelError
from tvlens.lens.edits import NoEdit, ReplaceHeads
from tvlens.lens.hooks import WholePassEngine, intervene
from tvlens.models.backend import Backend
from tvlens.models.interrupts import uninterrupted
from tvlens.vectors.ltv.settings import FitSettings

FIT = FitSettings(steps=2, shots=3, n_prompts=8, n_validation=4)
OFF = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@contextmanager
def switched_off() -> Iterator[None]:
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


CALLERS = pytest.mark.parametrize("caller", [*OFF.values(), switched_off], ids=[*OFF, "globally"])


def look(lens: tvlens.Lens) -> Any:
    """Means, a trained vector and its attributions."""
    means = tvlens.mean_head_outputs(
        lens, zoo.TASK.prompts("train", shots=3, n=8), answered_only=False
    )
    ltv = tvlens.fit_ltv(lens, zoo.TASK, means, settings=FIT)
    prompts = [zoo.TASK.prompts("validation", kind="zero")]
    return means, ltv, tvlens.attribute(lens, ltv, prompts).clone()


@CALLERS
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_training_works_whatever_the_caller_has_switched_off(caller, kind):
    lens = tvlens.load(zoo.huggingface("llama"), tokenizer=zoo.tokenizer(), backend=kind)
    _, expected, attribution = look(lens)
    with caller():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        _, found, again = look(lens)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert torch.equal(found.omega, expected.omega)
    assert torch.equal(again, attribution)
    assert torch.is_grad_enabled()


def test_what_is_loaded_and_averaged_in_inference_mode_trains_outside():
    expected = look(tvlens.load(zoo.huggingface("llama"), tokenizer=zoo.tokenizer()))[1]
    model = zoo.huggingface("llama")
    with torch.inference_mode():
        lens = tvlens.load(model, tokenizer=zoo.tokenizer())
        clean = zoo.TASK.prompts("train", shots=3, n=8)
        means = tvlens.mean_head_outputs(lens, clean, answered_only=False)
    found = tvlens.fit_ltv(lens, zoo.TASK, means, settings=FIT)
    assert torch.equal(found.omega, expected.omega)


def test_a_model_made_in_inference_mode_says_what_to_do():
    with torch.inference_mode():
        model = zoo.huggingface("llama")
    lens = tvlens.load(model, tokenizer=zoo.tokenizer())
    clean = zoo.TASK.prompts("train", shots=3, n=8)
    means = tvlens.mean_head_outputs(lens, clean, answered_only=False)
    with pytest.raises(ModelError, match=r"made inside of torch.inference_mode\(\).*; make it out"):
        tvlens.fit_ltv(lens, zoo.TASK, means, settings=FIT)


def test_an_exception_in_a_callback_leaves_the_model_as_it_was():
    backend = zoo.new_backend("llama", "bridge")
    lens = replace(trained.lens(), backend=backend, engine=type(trained.lens().engine)(backend))
    lens.outputs(zoo.batch(), NoEdit(3), lambda x, _: x)
    before = state(backend)

    def fail(_: int) -> None:
        raise ZeroDivisionError

    means = tvlens.mean_head_outputs(
        lens, zoo.TASK.prompts("train", shots=3, n=8), answered_only=False
    )
    for call in (
        lambda: tvlens.fit_ltv(lens, zoo.TASK, means, settings=FIT, progress=fail),
        lambda: tvlens.indirect_effects(
            lens, zoo.TASK.prompts("train", shots=3, n=4), means, progress=fail
        ),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
        assert state(backend) == before


@pytest.fixture(autouse=True)
def listens() -> Iterator[None]:
    """Jobs in the background may have been started deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# --- Ctrl-C --------------------------------------------------------------------------------------


def state(backend: Backend) -> tuple[Any, ...]:
    """What must come back: modes, wishes for gradients, hooks."""
    modules = list(backend.model.modules())
    return (
        [module.training for module in modules],
        [parameter.requires_grad for parameter in backend.parameters()],
        [len(point.fwd_hooks) for point in backend.model.hook_dict.values()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
    )


def interrupted_at(number: int, run: Callable[[], None]) -> int:
    """Run with Ctrl-C at one line of tvlens or transformer-lens; how many such lines there are."""
    seen = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal seen
        name = frame.f_code.co_filename
        if "tvlens" not in name and "transformer_lens" not in name:
            return None
        if event == "line":
            seen += 1
            if seen == number:
                signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return seen


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("what", ["frozen", "hooks"])
def test_the_model_comes_back_wherever_ctrl_c_lands(what, kind):
    backend = zoo.new_backend("llama", kind)
    backend.model.train()
    batch = zoo.batch()
    z = torch.ones(3, 4, backend.d_head)
    edit = ReplaceHeads.each_head(z).of_variants(torch.tensor([1]))

    def frozen() -> None:
        with backend.frozen():
            pass

    def hooks() -> None:
        # Nothing is run inside, which is an error of its own.
        try:
            with intervene(backend, edit, batch.query):
                pass
        except tvlens.errors.InterventionError:
            pass

    run = {"frozen": frozen, "hooks": hooks}[what]
    run()  # what is made once and kept is no line of later runs
    before = state(backend)
    lines = interrupted_at(0, run)
    assert lines > 20
    step = max(1, lines // 80)
    for number in range(1, lines + 1, step):
        with pytest.raises(KeyboardInterrupt):
            interrupted_at(number, run)
        assert state(backend) == before, f"{what}: line {number} of {lines}"


def test_ctrl_c_in_clean_up_comes_when_it_is_done():
    done = []

    def run() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_are_left_alone():
    found = []

    def run() -> None:
        with uninterrupted():
            found.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found


def test_ctrl_c_of_a_command_ends_in_one_line_that_says_how_to_go_on(tmp_path):
    model = trained.save_model(tmp_path / "model")
    tasks = trained.save_tasks(tmp_path / "tasks")
    words = ["study", "text", "--model", model, "--data", tasks, "--tasks", "seven-on"]
    words += ["--out", tmp_path / "run", "--shots", 4, "--ltv-seeds", 9]
    command = [sys.executable, "-m", "tvlens.cli", *map(str, words)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert process.stdout is not None
    # The lens is said when the model is loaded.
    assert "Lens(" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == (
        "error: Stopped. What is finished is kept in --out: the same command goes on from there."
    )
    assert "Traceback" not in err


def test_a_reading_of_one_forward_pass_leaves_no_hooks():
    backend = zoo.new_backend("llama", "bridge")
    lens = replace(trained.lens(), backend=backend, engine=WholePassEngine(backend))
    # transformers leaves hooks of its own at the first call.
    lens.outputs(zoo.batch(), NoEdit(3), lambda x, _: x)
    before = state(backend)
    lens.outputs(zoo.batch(), NoEdit(3).and_at((2,)), lambda x, _: x)
    assert state(backend) == before
