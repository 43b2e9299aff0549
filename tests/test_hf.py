"""The transformers-like front answers as transformers does."""

from __future__ import annotations

import pytest
from models import RandomModel, model_folder

from tsqp_shm.errors import ConfigError, RequestError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def models(demo_model):
    from tsqp_shm.hf import SplitForCausalLM

    whole = transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    with SplitForCausalLM.from_pretrained(demo_model, device="cpu", dtype="float32", max_model_len=128) as split:
        yield split, whole


PROMPTS = torch.tensor([[504, 3575, 282, 4649, 314], [6403, 1980, 253, 655, 28]])


def test_logits_are_those_of_the_whole_model(models):
    split, whole = models
    with torch.no_grad():
        expected = whole(PROMPTS).logits
    assert (split(PROMPTS).logits - expected).abs().max() < 1e-4 * expected.std()


def test_generate_gives_the_tokens_of_the_whole_model(models):
    split, whole = models
    expected = whole.generate(PROMPTS, max_new_tokens=8, do_sample=False)
    assert torch.equal(split.generate(PROMPTS, max_new_tokens=8), expected)


def test_a_mask_of_ones_changes_nothing_and_anything_else_is_refused(models):
    split, _ = models
    ones = torch.ones_like(PROMPTS)
    assert torch.equal(split.generate(PROMPTS, ones, 3), split.generate(PROMPTS, max_new_tokens=3))
    padded = ones.clone()
    padded[0, 0] = 0
    for arguments, said in (
        ((PROMPTS, padded), "attention_mask: got 'one that hides tokens'"),
        ((PROMPTS, [[1]]), "attention_mask: got"),
        ((PROMPTS.tolist(),), "input_ids: got a list of 2"),
        ((PROMPTS[0],), r"input_ids: got 'one of shape \[5\]'"),
        ((PROMPTS.float(),), r"token 0: got 504.0 \(float\)"),
        (("text",), r"input_ids: got 'text' \(str\)"),
    ):
        for use in (split, split.generate):
            with pytest.raises(RequestError, match=said):
                use(*arguments)
    with pytest.raises(ConfigError, match="do_sample: got False, expected temperature"):
        split.generate(PROMPTS, do_sample=False)


def test_it_takes_a_mode_without_a_gpu_process():
    from tsqp_shm.hf import SplitForCausalLM

    with SplitForCausalLM(model_folder(RandomModel("llama")), mode="tee-only", max_model_len=64) as alone:
        (logits,) = alone(torch.tensor([[1, 2, 3]])).logits
        assert torch.equal(logits, torch.from_numpy(alone.llm.logits([1, 2, 3])))
        assert alone.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1)[0, -1] == logits[-1].argmax()
