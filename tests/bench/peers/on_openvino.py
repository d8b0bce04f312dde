"""OpenVINO GenAI: continuous batching with prefix caching, weights in bfloat16 or INT8."""

import openvino as ov
import openvino_genai as genai
from measured import Work, main


def open_engine(work: Work):
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    scheduler.max_num_batched_tokens = 512
    scheduler.max_num_seqs = 256
    scheduler.enable_prefix_caching = True
    properties = {"INFERENCE_NUM_THREADS": work.threads, "INFERENCE_PRECISION_HINT": "bf16"}
    engine = genai.ContinuousBatchingPipeline(work.model, scheduler, "CPU", properties)

    def generate(requests, shared):
        import numpy as np

        prompts = [ov.Tensor(np.array([ids], np.int64)) for ids, _ in requests]
        configs = []
        for _, tokens in requests:
            config = genai.GenerationConfig()
            config.max_new_tokens = tokens
            config.ignore_eos = True
            configs.append(config)
        done = engine.generate(prompts, configs)
        return sum(len(each.m_generation_ids[0]) for each in done)

    return generate


if __name__ == "__main__":
    main(open_engine)
