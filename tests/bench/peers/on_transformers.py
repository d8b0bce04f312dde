"""transformers: ``generate`` on left-padded batches of 64; each goes on until its longest output is done."""

from measured import Work, main

BATCH = 64


def open_engine(work: Work):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(work.threads)
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.bfloat16).eval()

    def generate(requests, shared):
        for first in range(0, len(requests), BATCH):
            batch = requests[first : first + BATCH]
            width, tokens = max(len(ids) for ids, _ in batch), max(n for _, n in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, (prompt, _) in enumerate(batch):
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
            with torch.inference_mode():
                made = model.generate(ids, attention_mask=mask, do_sample=False, **limits)
            assert made.shape[1] == width + tokens
        return sum(n for _, n in requests)

    return generate


if __name__ == "__main__":
    main(open_engine)
