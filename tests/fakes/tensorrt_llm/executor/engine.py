"""The executor: a thread that answers batches, an error queue that anybody may meet, a budget of errors.

The "model" says what stands after ``say `` in the prompt, else something short about it, and then EOS. Words in a
prompt ask for a fault:

    !poison   the process dies                  !background   a thread dies; whoever comes by next is told
    !freeze   the executor hangs                !refuse       an error of this request
    !hang     this request is never answered    !cuda  !oom   the device's errors, wrapped as this request's
    !cancel  !timeout  !unfinished              how it ends   !flaky   cancelled once, then answered
"""

import hashlib
import os
import queue
import threading
import time

from packaging.version import Version

from tensorrt_llm import __version__, faults
from tensorrt_llm.executor.result import RequestOutput
from tensorrt_llm.executor.utils import RequestError

here = Version(__version__)


class Executor:
    def __init__(self, tokenizer, vocab_size, max_batch_size, max_seq_len, draws_by_seed, penalises):
        self.tokenizer, self.vocab_size, self.max_seq_len = tokenizer, vocab_size, max_seq_len
        self.max_batch_size, self.draws_by_seed, self.penalises = max_batch_size, draws_by_seed, penalises
        self.doing_shutdown = False
        self.peak_pending = self.answered = self.draws = 0
        self.seen, self.leaked, self.flaky = [], [], set()
        self._error_queue, self._requests = queue.Queue(), queue.Queue()
        self._pending, self._aborted, self._budget = {}, set(), (1.0, time.monotonic())
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="fake-executor", daemon=True)
        self._thread.start()

    def generate_async(self, prompt_token_ids, params):
        assert isinstance(prompt_token_ids[0], int)
        # The real one writes into params at submit; the same object again would carry that over. Told loudly here.
        assert all(params is not other for other in self.seen[-4096:]), "SamplingParams were submitted before"
        self.seen.append(params)
        result = RequestOutput(len(self.seen), prompt_token_ids, params, self, self.tokenizer)
        with self._lock:
            self._pending[result.request_id] = result
            self.peak_pending = max(self.peak_pending, len(self._pending))
        self._requests.put(result)
        self._handle_background_error()
        return result

    def abort_request(self, request_id):
        self._aborted.add(request_id)

    def is_shutdown(self):
        return self.doing_shutdown

    def shutdown(self):
        self.doing_shutdown = True

    def _handle_background_error(self, error=None):
        if error is not None:
            if isinstance(error, str):
                raise RequestError(error)
            self.shutdown()
            raise error
        if not self._error_queue.empty():
            error = self._error_queue.get()
            self.shutdown()
            raise error

    # -- the thread -----------------------------------------------------------------------------------------------

    def _work(self):
        while not self.doing_shutdown:
            try:
                batch = [self._requests.get(timeout=0.02)]
            except queue.Empty:
                continue
            while len(batch) < self.max_batch_size and not self._requests.empty():
                batch.append(self._requests.get())
            time.sleep(faults.ASKED.get("compute_seconds", 0.0005))
            for result in batch:
                answer = self._answer(result)
                if answer is None:
                    continue
                with self._lock:
                    self._pending.pop(result.request_id, None)
                if isinstance(answer, str):
                    answer = self._charge(answer)
                self.answered += 1
                self.leaked.append(bytearray(1024))  # host memory grows with every request
                result.put(answer)
                if isinstance(answer, Exception):
                    return self._die(answer)
            if (
                self.answered >= faults.ASKED.get("die_after", 1 << 60)
                and faults.noted("killed") < faults.ASKED["times"]
            ):
                faults.kill()

    def _die(self, error):
        self.doing_shutdown = True
        with self._lock:
            for result in self._pending.values():
                result.put(error)

    def _charge(self, error):
        """Since spring 2026 every error costs a tenth of a budget that refills by a tenth a second."""
        if here < Version("1.3.0rc10"):
            return error
        left, then = self._budget
        now = time.monotonic()
        left = min(1.0, left + 0.1 * (now - then)) - 0.1
        self._budget = (left, now)
        return error if left > 0 else RuntimeError("error budget exhausted, shutting down")

    def _answer(self, result):
        """Token ids and why they end; an error; None for no answer, ever."""
        prompt, params = result.prompt_token_ids, result.params
        if result.request_id in self._aborted:
            return [], "cancelled"
        if max(prompt) >= self.vocab_size or min(prompt) < 0:
            return "CUDA error: device-side assert triggered"
        if len(prompt) >= self.max_seq_len:
            return f"prompt length {len(prompt)} exceeds maximum sequence length {self.max_seq_len}"
        text = self.tokenizer.decode(prompt)
        if "!poison" in text:
            faults.note("poisoned", text=text)
            faults.kill()
        if "!exit" in text:
            os._exit(9)
        if "!freeze" in text:
            faults.note("frozen")
            time.sleep(3600)
        if "!hang" in text:
            return None
        if "!background" in text:
            self._error_queue.put(ValueError("a background thread failed"))
            return None
        for word, said in _ERRORS.items():
            if word in text:
                return said
        for word, reason in _ENDS.items():
            if word in text:
                return [], reason
        if "!flaky" in text and text not in self.flaky:
            self.flaky.add(text)
            return [], "cancelled"
        try:
            return self._complete(text, len(prompt), params)
        except RuntimeError as error:  # what goes wrong when a request is taken up
            return str(error)

    def _complete(self, text, prompt_len, params):
        said = text.rpartition("say ")[2] if "say " in text else f"ok {text[-12:]}"
        if params.guided_decoding is not None:
            said = '{"answer": "ok"}'
        if not params.greedy:
            self.draws += 1
            drawn = params.seed if self.draws_by_seed else self.draws
            said += f" #{hashlib.sha256(f'{drawn}/{text}'.encode()).hexdigest()[:6]}"
        if self.penalises and (params.repetition_penalty or 1) != 1:
            said += f" penalty {params.repetition_penalty:g}"
        if self.penalises and params.min_p:
            said += f" min_p {params.min_p:g}"
        end_id, ids, stops = params.end_id, self.tokenizer.encode(said), params._stops()
        most = min(params.max_tokens, self.max_seq_len - prompt_len)
        tail = self.tokenizer.encode(" and on and on") if params.ignore_eos else [end_id]
        while len(ids) < most and ids[-1:] != [end_id]:
            ids += tail
        for count in range(1, min(most, len(ids)) + 1):
            if ids[count - 1] == end_id and not params.ignore_eos:
                return ids[: count - 1 if faults.ASKED.get("strip_end") else count], "end"
            if any(ids[:count][-len(stop) :] == stop for _, stop in stops):
                return ids[:count], "stop words"
        return ids[:most], "length"


_ERRORS = {
    "!refuse": "the request was refused",
    "!cuda": "CUDA error: an illegal memory access was encountered",
    "!oom": "CUDA out of memory. Tried to allocate 2.00 GiB",
}
_ENDS = {"!cancel": "cancelled", "!timeout": "timeout", "!unfinished": "not_finished", "!nothing": None}
