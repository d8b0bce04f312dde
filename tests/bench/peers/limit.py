"""What nobody can beat here: the model's matrix products alone at their best rate, plus one read of keys and values."""

import json

from measured import peak_rss_mb, read_work

from batchinfer import Engine, Request, SamplingParams
from batchinfer.bench import floor_seconds

work = read_work()
engine = Engine(work.model, threads=work.threads)
seconds = {}
for name, each in work.workloads.items():
    # Of a prefix that all share, only the first computes keys and values.
    own = [(ids[each.shared :] if i else ids, made) for i, (ids, made) in enumerate(each.requests)]
    jobs = [Request(i, ids, SamplingParams(max_tokens=made)) for i, (ids, made) in enumerate(own)]
    seconds[name] = floor_seconds(engine, jobs)
print(json.dumps({"seconds": seconds, "open_seconds": 0.0, "peak_rss_mb": peak_rss_mb()}))
