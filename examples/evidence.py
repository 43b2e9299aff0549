"""What an answer can be held to where another process computes; run it with `python examples/evidence.py`.

In mode `verified` the untrusted process multiplies integers, and each product that it gives is checked. Nothing is
hidden from that process: activations cross in clear, as in the default mode. `docs/evidence.md` says the rest.
"""

import json
import tempfile
from pathlib import Path

from tsqp_shm import LLM, SamplingParams

PROMPT = "The capital of France is"
PARAMS = SamplingParams(temperature=0, max_tokens=8, stop="\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        # A false product would have ended the session with an IntegrityError, and no token of its pass had come out.
        with LLM(mode="verified", max_model_len=512, evidence=file) as llm:
            (output,) = llm.generate(PROMPT, PARAMS)
        # A record of each request, without a word of it; how many products were checked for it, for one.
        evidence = json.loads(file.read_text())
    completion, receipt = output.outputs[0], output.receipt
    assert receipt is not None
    record = next(each for each in evidence["requests"] if each["request"] == receipt.request)
    answer = record["completions"][0]
    print(f"answer: {completion.text!r}, of the model {evidence['session']['model_digest'][:23]}...")
    # Whoever asked has the nonce, by which the record's hash is that of this answer and of no other.
    print(f"the record is of this answer: {answer['answer'] == receipt.hash_tokens(completion.token_ids)}")
    # Whoever has prompt and model computes it again, alone, and gets the same tokens, to the bit.
    with LLM(mode="tee-only", max_model_len=512) as llm:
        again = llm.generate(PROMPT, PARAMS)[0].outputs[0]
    print(f"computed again, it is the same: {again.token_ids == completion.token_ids}")


if __name__ == "__main__":
    main()
