"""A session is held to the model that it was told to expect: by one digest of what it has loaded."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from commands import assert_one_line, run
from models import RandomModel, with_bytes_as_tokens

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.config import EngineConfig, environment_variable
from tsqp_shm.console.bring_up import print_bring_up
from tsqp_shm.errors import ConfigError, ModelFileError
from tsqp_shm.model.digest import Digests, model_digest
from tsqp_shm.model.files import ModelFiles
from tsqp_shm.model.network import Network
from tsqp_shm.model.spec import ModelSpec
from tsqp_shm.model.weights import Checkpoint
from tsqp_shm.tee import bring_up, tee_only

ANOTHER = f"sha256:{'0' * 64}"
FEW = SamplingParams(max_tokens=3, temperature=0)


def with_biases(folder: Path) -> Path:
    fields = {"vocab_size": 256, "attention_bias": True, "mlp_bias": True}
    return with_bytes_as_tokens(RandomModel("llama", fields).write(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return with_biases(tmp_path_factory.mktemp("pinned") / "model")


def digests_of(model: Path) -> Digests:
    with Checkpoint.open(model) as checkpoint:
        return model_digest(ModelFiles(model), Network.of(ModelSpec.from_folder(model)), checkpoint)


def test_a_session_of_the_model_that_is_pinned_starts_and_says_so(model):
    digests = digests_of(model)
    with LLM(model, mode="tee-only", max_model_len=32, model_digest=digests.model) as llm:
        expected = {"is_pinned": True, "model_digest": digests.model, "linears_digest": digests.linears}
        assert llm.bring_up()["weights"] == llm.stats()["weights"] == expected
        assert llm.generate("abc", FEW)


def test_a_session_of_another_model_does_not_start_and_has_no_name(model):
    with pytest.raises(
        ModelFileError, match=f"the model's digest is {digests_of(model).model}, and {ANOTHER} is expected"
    ):
        LLM(model, mode="tee-only", session="unpinned", model_digest=ANOTHER)
    # Nothing is left under the name, or there had been a session.
    with LLM(model, mode="tee-only", session="unpinned", max_model_len=32):
        pass


def test_a_launch_of_another_model_is_one_line_and_nothing_is_said(model):
    done = run("launch", model, "--mode", "tee-only", "--model-digest", ANOTHER, "-q", "--prompt", "abc")
    assert_one_line(done, 1, ANOTHER, "the model's digest is")


def test_the_bring_up_report_says_what_the_weights_are_held_to(model, tmp_path):
    def said(**settings: object) -> str:
        out = io.StringIO()
        with LLM(model, mode="tee-only", max_model_len=32, **settings) as llm:
            for verbose in (False, True):
                print_bring_up(llm, out, verbose=verbose)
        few, every = re.findall(r"weights +([^;\n]*)", out.getvalue())
        assert few == every
        return every

    digest = digests_of(model).model
    assert said() == "as found, not pinned"
    assert said(model_digest=digest) == f"pinned by {digest}"
    # Evidence has it all the same.
    assert said(evidence=tmp_path / "run.json") == f"as found, not pinned: {digest}"


def test_the_json_of_a_launch_says_it_too(model):
    done = run("launch", model, "--mode", "tee-only", "--prompt", "abc", "--max-new-tokens", "1", "--json")
    assert json.loads(done.stdout)["weights"] == {"is_pinned": False, "model_digest": None, "linears_digest": None}


def test_the_environment_pins_too(model, monkeypatch):
    monkeypatch.setenv(environment_variable("model_digest"), ANOTHER)
    with pytest.raises(ModelFileError, match=ANOTHER):
        LLM(model, mode="tee-only")


@pytest.mark.parametrize("digest", ["", "sha256:", ANOTHER.upper(), ANOTHER[:-1], ANOTHER[7:], f"{ANOTHER}0"])
def test_what_is_no_digest_is_refused_before_anything_is_read(digest):
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        EngineConfig(mode="tee-only", model_digest=digest)


def test_plain_takes_no_digest_as_it_computes_with_other_weights(model):
    with pytest.raises(ConfigError, match="none, as mode plain computes with weights as they are stored"):
        LLM(model, model_digest=ANOTHER)


def test_nothing_is_hashed_where_nobody_asks(model, monkeypatch):
    class Refused:
        def __init__(self, files: ModelFiles) -> None:
            raise AssertionError("hashed")

    monkeypatch.setattr("tsqp_shm.tee.anchor.ModelDigest", Refused)
    with LLM(model, mode="tee-only", max_model_len=32):
        pass


def test_what_is_hashed_is_what_is_computed_with_though_the_folder_changes_meanwhile(tmp_path, monkeypatch):
    model = with_biases(tmp_path / "model")
    expected = digests_of(model).model

    def load(network, checkpoint, digest):
        # The headers are read and the weights are not: whoever writes the folder does it now.
        names = [name for name in checkpoint.names() if name.endswith("k_proj.bias")]
        stored, path = checkpoint.stored(names[0]), model / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[stored.begin_bytes] ^= 1
        with path.open("r+b") as file:
            file.write(content)
        return tee_only.load_tee_only(network, checkpoint, digest)

    monkeypatch.setitem(bring_up.ALONE_ENGINES, "tee-only", load)
    with pytest.raises(ModelFileError, match="the model's digest is"):
        LLM(model, mode="tee-only", model_digest=expected)


def test_a_small_file_that_changes_after_the_start_is_not_read_as_another_one(tmp_path):
    model = with_biases(tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with LLM(model, mode="tee-only", max_model_len=32, model_digest=digests_of(model).model) as llm:
        # The template is read when the first conversation comes.
        (model / "chat_template.jinja").write_text("say something else")
        with pytest.raises(ModelFileError, match=r"chat_template\.jinja: is another one than was read before"):
            llm.chat([{"role": "user", "content": "abc"}], FEW)


def test_a_small_file_that_comes_after_the_start_is_not_read(tmp_path):
    model = with_biases(tmp_path / "model")
    with LLM(model, mode="tee-only", max_model_len=32, model_digest=digests_of(model).model) as llm:
        (model / "chat_template.jinja").write_text("say something else")
        with pytest.raises(ModelFileError, match=r"chat_template\.jinja: is another one than was read before"):
            llm.chat([{"role": "user", "content": "abc"}], FEW)
