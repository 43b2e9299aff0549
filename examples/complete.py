"""Completes prompts with a model that is split over two processes; run it with `python examples/complete.py`.

This process plays the trusted role (TEE): it has the prompts, samples the tokens, and imports neither torch nor
transformers. `LLM` starts the other one, which has the weights and does the heavy arithmetic, and ends it again.
"""

from tsqp_shm import LLM, SamplingParams

PROMPTS = ["The capital of France is", "The opposite of hot is", "1, 2, 3, 4,"]


def main() -> None:
    # Temperature 0 takes the likeliest token each time; without it, tokens are drawn. A completion ends with its first
    # line, or after so many tokens.
    params = SamplingParams(temperature=0, max_tokens=8, stop="\n")
    # The demo model, fetched at the first time. `LLM("FOLDER")` takes a Hugging Face folder, `LLM("ORG/NAME")` one that
    # the local cache has. What a sequence may have of tokens decides how much memory is taken.
    with LLM(max_model_len=1024) as llm:
        # All prompts at once: they share the passes through the model.
        for output in llm.generate(PROMPTS, params):
            completion = output.outputs[0]
            print(f"{output.prompt!r} -> {completion.text!r} (ended by {completion.finish_reason})")


if __name__ == "__main__":
    main()
