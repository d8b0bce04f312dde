"""EchoBackend: no model at all, for tests and for measuring everything around the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from batchinfer.job import Job
from batchinfer.request import Completion, Load, Output, Request


class EchoBackend:
    """Answers every request at once with its own first ``max_tokens`` token ids.

    The text names the prompt's length and checksum, the seed where sampling would draw, and which of the ``n`` outputs
    it is: equal requests get equal answers, in every run and on every machine.
    """

    def __init__(self, tokenizer_dir: Path, max_seq_len: int = 1 << 20) -> None:
        self.tokenizer_dir = tokenizer_dir
        self.max_seq_len = max_seq_len
        tokenizer = (tokenizer_dir / "tokenizer.json").read_bytes()
        self.fingerprint = {"engine": "echo", "tokenizer": hashlib.sha256(tokenizer).hexdigest()}
        self._load = Load()

    @classmethod
    def open(cls, job: Job, progress: bool = True) -> EchoBackend:
        from batchinfer.engine.model.tokenizer import export_tokenizer

        return cls(export_tokenizer(job.model.path))

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        load = self._load
        for request in requests:
            if request is None:
                continue
            ids, sampling = request.prompt_token_ids, request.sampling
            load.prompt_tokens += len(ids)
            text = f"echo {len(ids)} {hash(tuple(ids)) & 0xFFFFFFFF:08x}"
            if sampling.temperature > 0:
                text = f"{text} seed {sampling.seed}"
            said = ids[: sampling.max_tokens]
            reason = "length" if len(ids) > len(said) else "stop"
            load.completion_tokens += len(said) * sampling.n
            if sampling.n == 1:
                outputs = (Output(text, said, reason),)
            else:
                outputs = tuple(Output(f"{text} #{i}", said, reason) for i in range(sampling.n))
            yield Completion(request.key, outputs, len(ids))

    def load(self) -> Load:
        return self._load

    def close(self) -> None:
        """Nothing is held."""
