"""transformers' own continuous batching."""

from measured import Work, main


def open_engine(work: Work):
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(work.threads)
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.bfloat16).eval()
    batching = {"page_size": 32, "num_blocks": -(-work.longest // 32) * 128, "max_batch_tokens": 512}

    def generate(requests, shared):
        manager = model.continuous_batching_context_manager(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=256),
            continuous_batching_config=ContinuousBatchingConfig(**batching),
        )
        with manager as manager:
            for i, (ids, tokens) in enumerate(requests):
                manager.add_request(ids, str(i), max_new_tokens=tokens)
            results = [manager.get_result(timeout=600) for _ in requests]
        assert all(result is not None and not result.error for result in results)
        return sum(len(result.generated_tokens) for result in results)

    return generate


if __name__ == "__main__":
    main(open_engine)
