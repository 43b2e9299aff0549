"""The transformers-like front answers as transformers does."""

from __future__ import annotations

import pytest

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
