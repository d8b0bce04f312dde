"""RequestOutput: a future whose queue may stay empty, whatever timeout it is given."""

import asyncio
import queue
import weakref
from dataclasses import dataclass, field


@dataclass
class CompletionOutput:
    index: int = 0
    text: str = ""
    token_ids: list = field(default_factory=list)
    cumulative_logprob: object = None
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    finish_reason: object = None
    stop_reason: object = None


class RequestOutput:
    def __init__(self, request_id, prompt_token_ids, params, executor, tokenizer):
        self.request_id, self.prompt_token_ids, self.params = request_id, prompt_token_ids, params
        self.outputs = [CompletionOutput(i) for i in range(params.n)]
        self.finished, self.cached_tokens, self.prompt = False, 0, None
        self._executor, self._tokenizer = weakref.ref(executor), tokenizer
        self._queue = queue.Queue()
        try:
            self._loop = asyncio.get_running_loop()
            self._aqueue = asyncio.Queue()
        except RuntimeError:
            self._loop = self._aqueue = None

    def put(self, response):
        """From the dispatching thread. A loop that was closed meanwhile breaks it."""
        if self._loop is None:
            self._queue.put(response)
        else:
            self._loop.call_soon_threadsafe(self._aqueue.put_nowait, response)

    def result(self, timeout=None):
        while not self.finished:
            self._handle(self._queue.get())  # as there: the timeout is not passed on
        return self

    async def aresult(self):
        assert self._aqueue is not None, "The asyncio event loop was not present during initialization"
        while not self.finished:
            self._handle(await self._aqueue.get())
        return self

    def __await__(self):
        return self.aresult().__await__()

    def abort(self):
        self._executor().abort_request(self.request_id)

    def _handle(self, response):
        executor = self._executor()
        if isinstance(response, (str, Exception)):
            executor._handle_background_error(response)  # raises, and leaves this unfinished
        self.finished = True
        token_ids, reason = response
        for output in self.outputs:
            self._end(output, list(token_ids), reason)
        executor._handle_background_error()  # somebody's error, met by whoever comes by

    def _end(self, output, token_ids, reason):
        params = self.params
        output.token_ids = token_ids
        output.finish_reason = {"end": "stop", "stop words": "stop"}.get(reason, reason)
        if reason == "stop words":
            for stop_reason, stop_ids in params._stops():
                if token_ids[-len(stop_ids) :] == stop_ids:
                    output.stop_reason = stop_reason
                    if not params.include_stop_str_in_output:
                        output.token_ids = token_ids[: -len(stop_ids)]
                    break
        if not params.detokenize:
            return
        output.text = self._tokenizer.decode(output.token_ids)
        for stop_reason, _ in params._stops():
            if isinstance(stop_reason, str) and stop_reason in output.text:
                kept = len(stop_reason) if params.include_stop_str_in_output else 0
                output.text = output.text[: output.text.find(stop_reason) + kept]
                output.finish_reason, output.stop_reason = "stop", stop_reason  # and the token ids stay as they are
                break
