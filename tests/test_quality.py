"""`tsqp-shm bench quality`: its scores against arithmetic of another's, and a run of it on a small model."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import assert_one_line, run
from models import RandomModel, with_bytes_as_tokens

from tsqp_shm.bench.quality.questions import QUESTIONS, TEXTS
from tsqp_shm.bench.quality.scores import scores_of

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("rows", [2, 128, 129, 300])
def test_scores_are_those_of_torch(rows):
    random = np.random.default_rng(rows)
    truth = random.normal(1, 3, (rows, 50)).astype(np.float32)
    logits = (truth + random.normal(0, 0.5, truth.shape)).astype(np.float32)
    token_ids = random.integers(0, 50, rows).tolist()
    found = scores_of(logits, truth, token_ids)

    ours, theirs = (torch.from_numpy(array[:-1].astype(np.float64)) for array in (logits, truth))
    following = torch.tensor(token_ids[1:])
    log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    assert found.predictions == rows - 1
    assert found.perplexity == pytest.approx(float(torch.nn.functional.cross_entropy(ours, following).exp()))
    assert found.top1 == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))
    assert found.largest == pytest.approx(float((ours - theirs).abs().max() / theirs.std(correction=0)))
    kl = torch.nn.functional.kl_div(log_ours, log_theirs, log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(float(kl))


def test_of_the_truth_itself_nothing_is_off():
    truth = np.random.default_rng(0).normal(0, 2, (40, 30)).astype(np.float32)
    found = scores_of(truth, truth, [3] * 40)
    assert (found.top1, found.largest, found.kl) == (1.0, 0.0, 0.0)


@pytest.mark.long
def test_a_small_model_has_a_column_of_each_kind(tmp_path):
    folder = with_bytes_as_tokens(RandomModel("llama").write(tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    command = [sys.executable, "-m", "tsqp_shm", "bench", "quality", str(folder), "--json", "-", "--quiet"]
    command += ["--tokens", "100", "--max-new-tokens", "3", "--mode", "plain,tee-only"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert (document["texts"], document["questions"]) == (list(TEXTS), list(QUESTIONS))
    truth, bfloat16, plain, tee_only = document["columns"]
    names = [column["column"] for column in document["columns"]]
    assert names == ["transformers float32", "transformers bfloat16", "plain", "tee-only"]
    for column in (truth, bfloat16, plain, tee_only):
        assert len(column["answers"]) == len(QUESTIONS)
        for scores, of_truth in zip(column["scores"], truth["scores"], strict=True):
            assert scores["predictions"] == 99
            assert scores["perplexity"] == pytest.approx(of_truth["perplexity"], rel=0.02)
            assert scores["top1"] > 0.8
            assert (scores["largest"] > 0) == (column is not truth)
    assert sum(answer == of_truth for answer, of_truth in zip(plain["answers"], truth["answers"], strict=True)) > 8


def test_a_wrong_flag_is_one_line():
    assert_one_line(run("bench", "quality", "--mode", "plain,open"), 2, "open")
    assert_one_line(run("bench", "quality", "--tokens", 1), 2, "tokens")
    assert_one_line(run("bench", "quality", "--max-new-tokens", -1), 2, "max_new_tokens")
