"""vLLM's CPU build: offline ``LLM.generate``, compiled, prefix caching on."""

import os

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

from measured import Work, main  # noqa: E402


def open_engine(work: Work):
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{work.threads - 1}"
    from vllm import LLM, SamplingParams

    engine = LLM(work.model, dtype="bfloat16", max_model_len=1024, skip_tokenizer_init=True, max_num_seqs=256)

    def generate(requests, shared):
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in requests]
        done = engine.generate(prompts, params, use_tqdm=False)
        return sum(len(each.outputs[0].token_ids) for each in done)

    return generate


if __name__ == "__main__":
    main(open_engine)
