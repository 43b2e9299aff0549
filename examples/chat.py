"""A conversation whose answers are shown as they are made; run it with `python examples/chat.py`.

`mode="tee-only"` has the whole model in this process, without another one; leave it out to have it split.
"""

from tsqp_shm import LLM, SamplingParams

QUESTIONS = ["What is the capital of France?", "What language do people speak there?"]


def main() -> None:
    params = SamplingParams(temperature=0, max_tokens=40)
    messages: list[dict[str, str]] = []
    # What the cache has of the conversation is kept for the next turn, until the end of the block.
    with LLM(mode="tee-only", max_model_len=2048) as llm, llm.conversation() as conversation:
        for question in QUESTIONS:
            print(f"> {question}")
            # A turn is given all messages so far; the model's chat template makes a prompt of them.
            messages.append({"role": "user", "content": question})
            completion = conversation.start(messages, params)
            for piece in llm.stream_completion(completion):
                print(piece, end="", flush=True)
            messages.append({"role": "assistant", "content": completion.text})
            num_tokens = len(completion.prompt_token_ids)
            print(f"\n[{num_tokens} tokens read, {completion.num_cached_tokens} of them found in the cache]")


if __name__ == "__main__":
    main()
