"""Many prompts at once, and what they took; run it with `python examples/batch.py`.

On a terminal, a batch that takes longer than a second shows how far it is.
"""

from tsqp_shm import LLM, SamplingParams
from tsqp_shm.metrics import Counter, Histogram

COUNTRIES = ["France", "Spain", "Japan", "Germany", "Greece", "Kenya", "Russia", "Sweden"]


def main() -> None:
    prompts = [f"The capital of {country} is" for country in COUNTRIES]
    # For all prompts; a list has one for each. `logprobs` asks how likely the tokens were.
    params = SamplingParams(temperature=0, max_tokens=16, stop="\n", logprobs=0)
    with LLM(mode="tee-only", max_num_seqs=4, max_model_len=512) as llm:
        # Four at a time; the others wait for a place, in their order.
        for output in llm.generate(prompts, params):
            completion, metrics = output.outputs[0], output.metrics
            waited_ms, first_ms = (metrics.scheduled_ts - metrics.queued_ts) * 1e3, metrics.first_token_latency * 1e3
            print(
                f"{output.request_id}: {output.prompt}{completion.text} (log probability "
                f"{completion.cumulative_logprob:.2f}; waited {waited_ms:.0f} ms, first token after {first_ms:.0f} ms)"
            )
        # What all requests of the session have come to, under the names of vLLM's metrics.
        for metric in llm.get_metrics():
            if isinstance(metric, Counter) and metric.value:
                print(f"{metric.name}{metric.labels or ''} {metric.value}")
            elif isinstance(metric, Histogram) and metric.count:
                print(f"{metric.name} mean {metric.sum / metric.count:.4f}")


if __name__ == "__main__":
    main()
