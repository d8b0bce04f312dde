"""This engine."""

from measured import Work, main


def open_engine(work: Work):
    from batchinfer import Engine, Request, SamplingParams

    quantization = {"quantization": "smoothquant"} if work.dtype == "int8" else {}
    engine = Engine(work.model, dtype="bfloat16", threads=work.threads, progress=False, **quantization)

    def generate(requests):
        jobs = [Request(i, ids, SamplingParams(max_tokens=n, ignore_eos=True)) for i, (ids, n) in enumerate(requests)]
        return sum(len(done.outputs[0].token_ids) for done in engine.generate(jobs))

    return generate


if __name__ == "__main__":
    main(open_engine)
