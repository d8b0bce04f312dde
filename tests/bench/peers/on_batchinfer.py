"""This engine."""

from measured import Work, main


def open_engine(work: Work):
    from batchinfer import Engine, Request, SamplingParams

    engine = Engine(work.model, threads=work.threads)

    def generate(requests, shared):
        jobs = [Request(i, ids, SamplingParams(max_tokens=n, ignore_eos=True)) for i, (ids, n) in enumerate(requests)]
        return sum(len(done.outputs[0].token_ids) for done in engine.generate(jobs))

    return generate


if __name__ == "__main__":
    main(open_engine)
