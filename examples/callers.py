"""Several callers of one session, in an event loop without a thread each; run it with `python examples/callers.py`.

Any thread may call an `LLM`, several at once, and their requests share batches. Here the session's own thread hands
each piece of text over to the event loop.
"""

import asyncio

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.tee.updates import Update

PROMPTS = ["The capital of France is", "1, 2, 3, 4,", "A, B, C, D,"]


async def complete(llm: LLM, prompt: str, params: SamplingParams) -> None:
    updates: asyncio.Queue[Update] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def told(update: Update) -> None:
        # Called between two steps, to hand over and nothing else.
        loop.call_soon_threadsafe(updates.put_nowait, update)

    completion = llm.start(prompt, params)
    llm.runtime.add([completion], told)
    try:
        while not (update := await updates.get()).is_last:
            print(f"{prompt!r}: {update.text!r}")
        print(f"{prompt!r} -> {completion.text!r}, ended by {update.error or update.finish_reason}")
    finally:
        # Of a task that is cancelled; what has ended is left as it is.
        llm.runtime.cancel([completion])


async def main() -> None:
    params = SamplingParams(temperature=0, max_tokens=12, stop="\n")
    with LLM(mode="tee-only", max_model_len=512) as llm:
        await asyncio.gather(*(complete(llm, prompt, params) for prompt in PROMPTS))


if __name__ == "__main__":
    asyncio.run(main())
