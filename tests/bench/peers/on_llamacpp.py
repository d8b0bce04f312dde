"""llama.cpp through its C API: continuous batching over 64 slots, chunked prefill, a shared prefix computed once."""

import llama_cpp as llama
import numpy as np
from measured import Work, main

SLOTS, STEP = 64, 512
PREFIX = SLOTS  # the sequence that holds the shared prefix


def open_engine(work: Work):
    llama.llama_backend_init()
    model_params = llama.llama_model_default_params()
    model = llama.llama_model_load_from_file(work.model.encode(), model_params)
    params = llama.llama_context_default_params()
    params.n_ctx = SLOTS * work.longest + 512
    params.n_batch = params.n_ubatch = STEP
    params.n_seq_max = SLOTS + 1
    params.n_threads = params.n_threads_batch = work.threads
    params.kv_unified = True
    context = llama.llama_init_from_model(model, params)
    memory = llama.llama_get_memory(context)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(STEP, 0, 1)

    def decode(entries):
        """entries: (token, position, sequence, whether its logits are wanted); the next token of those."""
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        code = llama.llama_decode(context, batch)
        assert code == 0, f"llama_decode gave {code}"
        rows = [i for i, entry in enumerate(entries) if entry[3]]
        logits = (np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), (vocabulary,)) for i in rows)
        return [int(row.argmax()) for row in logits]

    def generate(requests, shared):
        if shared:
            prefix = requests[0][0][:shared]
            for first in range(0, shared, STEP):
                chunk = range(first, min(first + STEP, shared))
                decode([(prefix[i], i, PREFIX, False) for i in chunk])
        waiting, free, running, made = list(reversed(requests)), list(range(SLOTS)), {}, 0
        while waiting or running:
            while waiting and free:
                ids, tokens = waiting.pop()
                slot = free.pop()
                if shared:
                    llama.llama_memory_seq_cp(memory, PREFIX, slot, 0, shared)
                running[slot] = [ids[shared:], shared, tokens]  # to be computed, position of its first, still to make
            entries = []
            for slot, (todo, position, _) in sorted(running.items(), key=lambda item: len(item[1][0])):
                take = min(len(todo), STEP - len(entries))
                last = take == len(todo)
                entries += [(todo[i], position + i, slot, last and i == take - 1) for i in range(take)]
                running[slot][0], running[slot][1] = todo[take:], position + take
            asked = [entry[2] for entry in entries if entry[3]]
            for slot, token in zip(asked, decode(entries)):
                made += 1
                running[slot][0] = [token]
                running[slot][2] -= 1
                if not running[slot][2]:
                    del running[slot]
                    llama.llama_memory_seq_rm(memory, slot, -1, -1)
                    free.append(slot)
        llama.llama_memory_seq_rm(memory, PREFIX, -1, -1)
        return made

    return generate


if __name__ == "__main__":
    main(open_engine)
