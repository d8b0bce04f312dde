"""SamplingParams as documented: keyword-only, checked when made, written into when submitted."""

from dataclasses import dataclass, field, fields

from packaging.version import Version

from tensorrt_llm import __version__

here = Version(__version__)


@dataclass(kw_only=True)
class GuidedDecodingParams:
    json: object = None
    regex: object = None
    grammar: object = None
    json_object: bool = False
    structural_tag: object = None

    def _validate(self):
        guides = sum(bool(getattr(self, f.name)) for f in fields(self))
        if guides > 1:
            raise ValueError(f"Only one guide can be used for a request, but got {guides}.")


@dataclass(kw_only=True)
class SamplingParams:
    end_id: object = None
    pad_id: object = None
    max_tokens: int = 32
    n: int = 1
    best_of: object = None
    use_beam_search: bool = False
    stop: object = None
    stop_token_ids: object = None
    include_stop_str_in_output: bool = False
    bad: object = None
    bad_token_ids: object = None
    temperature: object = None
    top_k: object = None
    top_p: object = None
    min_p: object = None
    seed: object = None
    min_tokens: object = None
    repetition_penalty: object = None
    presence_penalty: object = None
    frequency_penalty: object = None
    logprobs: object = None
    prompt_logprobs: object = None
    exclude_input_from_output: bool = True
    guided_decoding: object = None
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: object = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    _stop_word_ids: object = field(default=None, init=False, repr=False)

    def __post_init__(self):
        self.best_of = self.best_of or self.n
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"require 0 <= top_p <= 1, got top_p={self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"require top_k >= 0, got top_k={self.top_k}")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"require temperature >= 0, got temperature={self.temperature}")
        if self.best_of > 1 and self.greedy:
            raise ValueError("Greedy decoding in the LLM API does not allow multiple returns. Please set to best_of=1")
        if self.guided_decoding is not None:
            self.guided_decoding._validate()

    @property
    def greedy(self):
        if here < Version("1.1.0.dev0"):
            return self.top_k in (None, 1) and self.top_p in (None, 0.0)
        nothing = self.temperature is None and self.top_p is None and self.top_k is None
        return nothing or self.top_k == 1 or self.top_p == 0 or self.temperature == 0

    def _setup(self, tokenizer, defaults):
        """At submit. Without an ``end_id``: the EOS and the tokens of stop strings; late versions fill what is None."""
        if here >= Version("1.3.0rc24"):
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
                if getattr(self, name) is None and name in defaults:
                    setattr(self, name, defaults[name])
        if self.end_id is not None:
            return
        self.end_id = self.pad_id = tokenizer.eos_token_id
        if self.stop is not None:
            strings = [self.stop] if isinstance(self.stop, str) else self.stop
            self._stop_word_ids = [tokenizer.encode_stop(s) for s in strings]

    def _stops(self):
        """Pairs of stop reason and token ids."""
        pairs = [(i, [i]) for i in self.stop_token_ids or ()]
        if self.stop is None:
            return pairs
        if self._stop_word_ids is None:
            raise RuntimeError(
                f"SamplingParams.stop ({self.stop}) is not processed by tokenizer, call the setup method."
            )
        strings = [self.stop] if isinstance(self.stop, str) else self.stop
        return pairs + list(zip(strings, self._stop_word_ids))
