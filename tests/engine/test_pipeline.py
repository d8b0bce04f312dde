"""A model over several ranks says what it says on one; a rank that dies ends them all, at once and with its name."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from batchinfer import Engine, SamplingParams
from batchinfer.engine import balance, pipeline
from batchinfer.engine.balance import Costs, FloatingHead, deal
from batchinfer.engine.build import build
from batchinfer.engine.kernels.linear import load_linear
from batchinfer.engine.layout import Layout
from batchinfer.engine.link import Link, encode
from batchinfer.engine.model.shard import Shard
from batchinfer.engine.occupancy import Occupancy
from batchinfer.engine.worker import work
from batchinfer.errors import EngineError, ModelError
from tests.conftest import DEMO_MODEL
from tests.engine.test_families import prompts
from tests.engine.tiny import VARIANTS, make_model

GREEDY = SamplingParams(max_tokens=24)
OPTIONS = dict(dtype="float32", device="cpu", batch_size=8, step_tokens=64, progress=False)
DEMO_OPTIONS = OPTIONS | dict(batch_size=24, step_tokens=192)  # a plan that the end-to-end tests build too


@pytest.fixture
def ranks_are_threads(monkeypatch):
    """Ranks of this process: everything but the starting of theirs, in a tenth of the time.

    Where heads float, they are the first stage's and the last's in turn, whatever they cost here.
    """

    class Thread(pipeline.Rank):
        @classmethod
        def start(cls, number, name, arena):
            ours, theirs = socket.socketpair()
            threading.Thread(target=work, args=(Link(theirs), arena, lambda: None), daemon=True).start()
            return cls(number, name, None, Link(ours))

        def end(self):
            self.link.close()

    monkeypatch.setattr(pipeline, "Rank", Thread)
    monkeypatch.setattr(balance, "_SECONDS", 0.01)
    turns = itertools.count()
    alternating = lambda self, step: len(step.sampled) > 0 and next(turns) % 2 == 1  # noqa: E731
    monkeypatch.setattr(balance.FloatingHead, "on_first", alternating)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: make_model(tmp_path_factory.mktemp(name), name) for name in VARIANTS}


@pytest.fixture(scope="module")
def alone(models):
    return Engine(models["llama"], **OPTIONS)


@pytest.fixture(scope="module")
def pair(models):
    """Two stages that are processes."""
    with contextlib.closing(Engine(models["llama"], pp=2, **OPTIONS)) as engine:
        yield engine


def said(engine: Engine, sampling: SamplingParams = GREEDY, count: int = 12) -> dict:
    return {c.key: c.outputs for c in engine.generate(prompts(count), sampling)}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_family_says_the_same_from_shards(models, variant, ranks_are_threads):
    expected = said(Engine(models[variant], **OPTIONS))
    shared = ((4, 1),) if variant in ("llama", "llama-linear-rope-bias", "qwen3") else ()
    for tp, pp in ((2, 3), *shared):  # with two KV heads each rank has one, or shares it with another
        with contextlib.closing(Engine(models[variant], tp=tp, pp=pp, **OPTIONS)) as engine:
            assert said(engine) == expected, f"tp {tp}, pp {pp}"
            assert engine.pages.held == 0


@pytest.mark.parametrize(
    ("tp", "pp", "options"),
    [
        (1, 2, {}),
        (1, 2, {"micro_batches": 1}),
        (1, 2, {"micro_batches": 5}),
        (2, 1, {}),
        (2, 2, {"micro_batches": 4}),
        (1, 3, {"pp_partition": (1, 1, 1)}),
        (3, 1, {}),
    ],
)
def test_any_layout_says_what_one_rank_says(models, alone, tp, pp, options, ranks_are_threads):
    with contextlib.closing(Engine(models["llama"], tp=tp, pp=pp, **options, **OPTIONS)) as engine:
        assert said(engine) == said(alone)


@pytest.fixture(scope="module")
def demo_alone():
    with contextlib.closing(Engine(DEMO_MODEL, **DEMO_OPTIONS)) as engine:
        return said(engine, SamplingParams(max_tokens=8), 10)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [dict(pp=4), dict(tp=2, pp=2), dict(pp=2, prefill=(2, 1))], ids=str)
def test_any_layout_of_the_demo_model_says_what_one_rank_says(layout, demo_alone, ranks_are_threads):
    with contextlib.closing(Engine(DEMO_MODEL, **layout, **DEMO_OPTIONS)) as engine:
        assert said(engine, SamplingParams(max_tokens=8), 10) == demo_alone


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 1), (2, 2)])
def test_a_step_is_launched_before_the_engine_knows_what_it_begins_with(
    models, alone, tp, pp, ranks_are_threads, monkeypatch
):
    unknown = []
    launch = pipeline.Pipeline.launch

    def noting(self, step):
        unknown.append(int((step.token_ids < 0).sum()))
        return launch(self, step)

    monkeypatch.setattr(pipeline.Pipeline, "launch", noting)
    with contextlib.closing(Engine(models["llama"], tp=tp, pp=pp, **OPTIONS)) as engine:
        assert said(engine) == said(alone)
        assert sum(unknown) > engine.counters.completion_tokens / 4


def test_ranks_begin_before_all_prompts_are_taken_in(models, ranks_are_threads, monkeypatch):
    pulled, at_launch = [], []
    launch = pipeline.Pipeline.launch

    def noting(self, step):
        at_launch.append(len(pulled))
        return launch(self, step)

    def source():
        for first in range(8):
            pulled.append(first)
            yield [first + 1] * 20

    monkeypatch.setattr(pipeline.Pipeline, "launch", noting)
    with contextlib.closing(Engine(models["llama"], pp=2, **OPTIONS)) as engine:
        assert len(list(engine.generate(source(), GREEDY))) == 8
    assert at_launch[0] == 4, "a step of 64 tokens is full"
    assert at_launch[1] == 8


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=16, temperature=0.9, top_p=0.9, seed=5, n=2),
        SamplingParams(max_tokens=16, temperature=0.7, repetition_penalty=1.3, seed=5),
        SamplingParams(max_tokens=16, repetition_penalty=1.5),
    ],
)
def test_sampling_is_the_same_whichever_rank_does_it(alone, pair, sampling):
    assert said(pair, sampling) == said(alone, sampling)


def test_a_pipeline_left_in_the_middle_can_be_used_again(alone, pair):
    for _ in pair.generate(prompts(30), GREEDY):
        break
    assert pair.pages.held == 0
    assert said(pair) == said(alone)


def test_a_launch_interrupted_half_way_is_known_to_all_ranks_or_none(models, alone, ranks_are_threads, monkeypatch):
    with contextlib.closing(Engine(models["llama"], prefill=(1, 1), **OPTIONS)) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "pages_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                said(engine)
        assert said(engine) == said(alone)


def test_an_interrupted_step_leaves_a_pipeline_that_works(alone, pair, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pair.stage, "take", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            said(pair)
    assert said(pair) == said(alone)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_in_the_middle_ends_the_engine_with_its_name(models, victim):
    with contextlib.closing(Engine(models["llama"], pp=2, **OPTIONS)) as engine:
        running = engine.generate(prompts(400), GREEDY)
        next(running)
        os.kill(engine.stage._ranks[victim].process.pid, signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(EngineError, match=f"rank {victim} .* killed by SIGKILL"):
            list(running)
        assert time.monotonic() - begun < 5


def test_a_rank_that_hangs_ends_the_engine_at_the_deadline(models, monkeypatch):
    monkeypatch.setattr(pipeline, "DEADLINE", 20.0)
    with contextlib.closing(Engine(models["llama"], pp=2, **OPTIONS)) as engine:
        running = engine.generate(prompts(400), GREEDY)
        next(running)
        monkeypatch.setattr(pipeline, "DEADLINE", 1.0)
        os.kill(engine.stage._ranks[1].process.pid, signal.SIGSTOP)
        with pytest.raises(EngineError, match="silent for 1 s"):
            list(running)


def test_no_rank_outlives_an_engine_that_is_killed(models):
    code = f"""
from batchinfer import Engine
engine = Engine({str(models["llama"])!r}, pp=2, **{OPTIONS!r})
print(*(rank.process.pid for rank in engine.stage._ranks), flush=True)
for _ in engine.generate(iter(lambda: [1, 2, 3], None)): pass
"""
    engine = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    ranks = [int(pid) for pid in engine.stdout.readline().split()]
    assert len(ranks) == 2 and all(alive(pid) for pid in ranks)
    engine.kill()
    engine.wait()
    until = time.monotonic() + 5
    while any(alive(pid) for pid in ranks):
        assert time.monotonic() < until
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pp": 4}, "engine.pp = 4, but .* has 3 layers"),
        ({"tp": 7}, "engine.tp = 7, but the model has 6 attention heads"),
        ({"pp": 2, "pp_partition": (1, 1)}, r"pp_partition = \[1, 1\] must give each of 2 stages .* 3 in all"),
        ({"pp": 2, "kv_cache_gib": 1e-7}, "raise engine.kv_cache_gib"),
    ],
)
def test_an_impossible_layout_is_named(models, options, message, ranks_are_threads):
    with pytest.raises(ModelError, match=message):
        Engine(models["llama"], **options, **OPTIONS)


def test_a_pipeline_tells_how_busy_its_ranks_are_and_draws_it(models, tmp_path, ranks_are_threads):
    with contextlib.closing(Engine(models["llama"], tp=2, pp=2, trace=tmp_path / "trace.json", **OPTIONS)) as engine:
        said(engine)
        told = engine.stage.details()
    assert (told["tp"], sum(told["partition"])) == (2, 3)
    assert 0 < told["bubble"] < 1 and len(told["rank_step_ms"]) == 4
    assert 0 < told["slot_occupancy"] <= 1 and told["bytes_sent"] > 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = {row: [e for e in events if e["ph"] == "X" and e["tid"] == row] for row in range(5)}
    assert len({e["args"]["name"] for e in events if e["ph"] == "M"}) == 5
    for rank in range(1, 5):  # a rank computes one step at a time, in order
        steps = [span for span in spans[rank] if span["name"].startswith("step")]
        assert engine.counters.steps - 1 <= len(steps) <= engine.counters.steps == len(spans[0]) / 3
        assert all(a["ts"] + a["dur"] <= b["ts"] + 0.2 for a, b in zip(steps, steps[1:]))


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
@pytest.mark.parametrize("costs", [Costs(1, 0, 0), Costs(1, 0.1, 20), Costs(1, 3, 1)])
@pytest.mark.parametrize("floats", [False, True])
def test_no_other_partition_has_a_faster_slowest_stage(pp, costs, floats):
    found = deal(16, pp, costs, floats)
    assert sum(found) == 16 and min(found) >= 1
    others = (p for p in itertools.product(range(1, 16), repeat=pp - 1) if sum(p) < 16) if pp < 5 else [found[1:]]
    best = min(max(costs.stages((*p, 16 - sum(p)), floats)) for p in others)
    assert max(costs.stages(found, floats)) <= best + 1e-9


def test_the_first_stage_computes_heads_as_well(models, tmp_path, ranks_are_threads):
    trace = tmp_path / "trace.json"
    with contextlib.closing(Engine(models["llama"], pp=2, threads=1, trace=trace, **OPTIONS)) as engine:
        said(engine)
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    heads = [e for e in events if e["name"].startswith("head")]
    steps = {e["name"].split()[1] for e in events if e["name"].startswith("step")}
    assert {e["tid"] for e in heads if e["args"]["samples"]} == {1, 2}
    numbers = [e["name"].split()[1] for e in heads]
    assert len(numbers) == len(set(numbers)) and abs(len(steps) - len(numbers)) <= 1, "each step has one head"


@pytest.mark.parametrize("partition", [(9, 8), (8, 9)])
def test_heads_go_where_there_is_less_to_do(partition):
    step = namedtuple("Step", "num_tokens sampled")
    costs = Costs(layer=1e-5, embedding=2e-5, head=8e-5)
    floating, spent = FloatingHead(partition, costs), [0.0, 0.0]
    for tokens, samples in [(300, 0), (200, 8), (100, 60), (64, 64), (65, 65), (64, 63)] * 20:
        on_first = floating.on_first(step(tokens, range(samples)))
        assert samples or not on_first, "the last stage tells of a step without samples"
        spent[0] += tokens * (partition[0] * costs.layer + costs.embedding)
        spent[1] += tokens * partition[1] * costs.layer
        spent[not on_first] += samples * costs.head
    assert max(spent) < 1.06 * min(spent)


def test_a_stage_that_was_ahead_for_long_is_not_made_to_wait_for_it():
    """Prompts alone, of which the first stage has more; then decoding, which is to be even at once."""
    step = namedtuple("Step", "num_tokens sampled")
    floating = FloatingHead((10, 8), Costs(layer=1e-5, embedding=0.0, head=8e-5))
    for _ in range(50):
        floating.on_first(step(500, range(1)))
    decoding = [floating.on_first(step(64, range(64))) for _ in range(8)]
    assert any(decoding[:4]) and 2 <= sum(decoding) <= 4


def test_steps_end_in_order_though_two_stages_tell_of_their_heads(models, ranks_are_threads):
    with contextlib.closing(Engine(models["llama"], pp=2, prefill=(1, 1), **OPTIONS)) as engine:
        stage = engine.stage
        prompts_first, decoding = stage.world.layouts[0], stage.layout
        launched = [pipeline._Awaited(stage, *which) for which in [(decoding, 7), (prompts_first, 8), (decoding, 9)]]
        stage._tokens = {decoding: {9: np.zeros(1)}, prompts_first: {8: np.zeros(1)}}
        assert stage.next_done(launched) == 1
        stage._tokens[decoding][7] = np.zeros(1)
        assert stage.next_done(launched) == 0


def test_layers_are_dealt_by_measured_time_once(models, monkeypatch, tmp_path, ranks_are_threads):
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path))
    with contextlib.closing(Engine(models["llama"], pp=2, threads=1, **OPTIONS)) as engine:
        [kept] = (tmp_path / "costs").iterdir()
        costs = Costs(**json.loads(kept.read_text()))
        assert min(costs.layer, costs.embedding, costs.head) > 0
        assert engine.stage.layout.partition == deal(3, 2, costs, head_floats=True)
    kept.write_text(json.dumps({"layer": 1.0, "embedding": 5.0, "head": 0.0}))
    with contextlib.closing(Engine(models["llama"], pp=2, threads=1, **OPTIONS)) as engine:
        assert engine.stage.layout.partition == (1, 2)
    kept.write_text(json.dumps({"layer": 1.0, "embedding": 0.0, "head": 9.0}))
    with contextlib.closing(Engine(models["llama"], pp=2, threads=1, **OPTIONS)) as engine:
        assert engine.stage.layout.partition == (2, 1)
        monkeypatch.setattr(balance, "_ENOUGH", 10)
        said(engine)
    told = json.loads(kept.read_text())
    assert told["head"] < 9.0 and 0 < told["sampled"] < 1, "the next engine is dealt by what this one's steps took"


@pytest.mark.parametrize("floats, embedding", [(False, 0.0), (True, 1e-5)])
def test_a_run_tells_what_layers_and_head_cost(floats, embedding):
    occupancy = Occupancy(2, 2)
    for step in range(300):
        occupancy.launched(100, 40, step)
        occupancy.computed(0, 0.0, 17 * 100 * 3e-5 + 100 * embedding, 0)
        occupancy.computed(1, 0.0, 13 * 100 * 3e-5, 0)
        occupancy.headed(step % 2 if floats else 1, 0.0, 40 * 2e-4, 0)
    costs = Costs.of_run(Layout(1, (17, 13), head_floats=floats), occupancy)
    assert (costs.layer, costs.embedding) == (pytest.approx(3e-5), pytest.approx(embedding))
    assert (costs.head, costs.sampled) == (pytest.approx(2e-4), 0.4)
    assert Costs.of_run(Layout(1, (17, 13)), Occupancy(2, 2)) is None


def test_a_link_waits_for_the_beginning_of_a_message_but_not_in_the_middle():
    ours, theirs = socket.socketpair()
    link = Link(ours, deadline=0.1)
    threading.Timer(0.3, theirs.sendall, [encode("late", x=np.arange(3))]).start()
    assert link.receive().fields["x"].tolist() == [0, 1, 2]
    theirs.sendall(encode("torn", x=np.arange(3))[:-1])
    with pytest.raises(EOFError):
        link.receive()


def test_a_link_does_not_wait_for_one_who_takes_nothing():
    ours, theirs = socket.socketpair()
    with pytest.raises(OSError):
        Link(ours, deadline=0.1).send("much", x=np.zeros(1 << 26, np.uint8))


@pytest.mark.parametrize(
    ("variant", "prefill", "tp", "pp"),
    [
        ("llama", (1, 1), 1, 1),
        ("llama", (2, 1), 1, 2),
        ("qwen3", (1, 2), 2, 1),
        ("mistral-window", (1, 3), 1, 2),
        ("llama", (4, 1), 2, 2),
    ],
)
def test_prompts_may_be_computed_by_other_ranks_in_another_layout(models, variant, prefill, tp, pp, ranks_are_threads):
    expected = said(Engine(models[variant], **OPTIONS))
    with contextlib.closing(Engine(models[variant], tp=tp, pp=pp, prefill=prefill, **OPTIONS)) as engine:
        for _ in engine.generate(prompts(30), GREEDY):
            break
        assert said(engine) == expected, "after a run that was left in the middle"
        told = engine.stage.details()
        assert told["bytes_sent"] > 0 and all(0 < share < 1 for share in told["rank_moving_pages"].values())


def test_rows_that_were_preempted_are_computed_again_by_the_ranks_for_prompts(models, ranks_are_threads):
    roomy = Engine(models["llama"], **OPTIONS)
    page_gib = roomy.stage.decoder.attention.page_bytes(roomy.plan.spec.num_layers) / 2**30
    tight = page_gib * (512 / roomy.stage.page_size + 2.5)
    with contextlib.closing(Engine(models["llama"], prefill=(1, 1), kv_cache_gib=tight, **OPTIONS)) as engine:
        long = SamplingParams(max_tokens=120)
        engine.scheduler._used_share = 0.0  # expects short completions, so that it admits too many
        assert said(engine, long) == said(roomy, long)
        assert engine.scheduler.preemptions > 0


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (1, 2)])
def test_ranks_of_other_machines_meet_the_engine_as_torchruns_processes_do(models, alone, monkeypatch, tp, pp):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "batchinfer.engine.worker"],
            env=os.environ | meeting | {"RANK": str(rank), "WORLD_SIZE": str(tp * pp), "PYTHONPATH": os.getcwd()},
        )
        for rank in range(tp * pp)
    ]
    for name, value in meeting.items():
        monkeypatch.setenv(name, value)
    with contextlib.closing(Engine(models["llama"], tp=tp, pp=pp, pp_partition=(1, 2), **OPTIONS)) as engine:
        assert said(engine) == said(alone)
    assert all(rank.wait(timeout=20) == 0 for rank in ranks)


def quantised(scheme: str) -> dict:
    return OPTIONS | {"quantization": scheme, "group_size": 32, "max_quality_loss": 100.0}


@pytest.mark.parametrize("scheme", ["int4", "gptq", "smoothquant"])
def test_a_quantised_model_says_the_same_from_stages(models, scheme, ranks_are_threads):
    expected = said(Engine(models["llama"], **quantised(scheme)))
    with contextlib.closing(Engine(models["llama"], pp=3, **quantised(scheme))) as engine:
        assert said(engine) == expected


@pytest.mark.parametrize("scheme", ["int8", "int4", "awq", "w8a8"])
@pytest.mark.parametrize("tp", [2, 3])
def test_quantised_matrices_are_cut_where_their_numbers_lie(models, scheme, tp):
    plan = build(str(models["llama"]), **quantised(scheme))
    group = plan.weights("layer-001")
    shards = [Shard(plan.spec, range(3), tp, rank) for rank in range(tp)]
    cuts = [shard.cut("layer-001", group) for shard in shards]
    generator = torch.Generator().manual_seed(0)
    for name in ("o", "down"):  # inputs are shared out, outputs summed up
        columns = [shard._inputs[name][0] for shard in shards]
        x = torch.randn(16, columns[-1].stop, generator=generator)
        whole = load_linear(group, name)(x)
        parts = [load_linear(cut, name)(x[:, c.start : c.stop].contiguous()) for cut, c in zip(cuts, columns)]
        rounded = 0.02 if scheme == "w8a8" else 1e-5  # w8a8: activations over a scale of each rank's own
        torch.testing.assert_close(sum(parts), whole, atol=rounded * float(whole.abs().max()), rtol=0)
    for name in ("qkv", "gate_up"):  # outputs are shared out
        x = torch.randn(16, plan.spec.hidden_size, generator=generator)
        whole = load_linear(group, name)(x)
        for shard, cut in zip(shards, cuts):
            wanted = torch.cat([whole[:, rows.start : rows.stop] for rows in shard._outputs[name]], dim=1)
            assert torch.equal(load_linear(cut, name)(x), wanted)


@pytest.mark.parametrize("scheme", ["int8", "awq"])
def test_a_quantised_model_says_the_same_from_shards_in_float32(models, scheme, ranks_are_threads):
    expected = said(Engine(models["llama"], **quantised(scheme)))
    with contextlib.closing(Engine(models["llama"], tp=2, pp=2, **quantised(scheme))) as engine:
        assert said(engine) == expected


def test_a_model_quantised_in_part_says_the_same_from_shards(models, tmp_path, ranks_are_threads):
    plan = build(str(models["llama"]), tmp_path / "plan", **quantised("int4"))
    whole, group = build(str(models["llama"]), **OPTIONS).weights("layer-001"), plan.weights("layer-001")
    group = {part: tensor.clone() for part, tensor in group.items() if not part.startswith(("o.", "gate_up."))}
    group |= {part: whole[part].clone() for part in ("o.weight", "gate_up.weight")}
    save_file(group, plan.path / "weights/layer-001.safetensors")
    expected = said(Engine(plan.path))
    with contextlib.closing(Engine(plan.path, tp=2, pp=2)) as engine:
        assert said(engine) == expected


def test_columns_in_an_order_of_their_own_are_not_cut(models):
    plan = build(str(models["llama"]), **quantised("int4"))
    group = plan.weights("layer-001") | {"o.order": torch.arange(48, dtype=torch.int32)}
    with pytest.raises(ModelError, match="order of its own .* raise engine.pp"):
        Shard(plan.spec, range(3), 2, 0).cut("layer-001", group)


def test_bytes_are_counted_from_where_counting_began_anew():
    occupancy = Occupancy(1, 1)
    occupancy.computed(0, 0.0, 1.0, sent=100)
    later = occupancy.anew()
    later.computed(0, 1.0, 2.0, sent=130)
    assert later.details(["rank 0"])["bytes_sent"] == 30
