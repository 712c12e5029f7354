"""LLM: the engine in the caller's own process, shaped like vLLM's offline API."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from core.config import EngineConfig
from core.device import forget_cached
from core.engine_build import build_engine, offline
from core.engine_info import EngineInfo
from core.errors import ConfigError, CoreError, InvalidParameter
from core.memory import give_back
from core.outputs import CompletionOutput, Delta, RequestOutput
from core.request import ClientRequest
from core.sampling_params import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


class LLM:
    """A model to generate with. Options are those of `core.config.EngineConfig`; an unknown one is a ConfigError.

    with LLM(model="path") as llm:
        print(llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].outputs[0].text)
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        config = EngineConfig.from_options(model=None if model is None else str(model), **options)
        self._engine = build_engine(offline(config))
        self._numbers = itertools.count()
        self._closed = False

    @property
    def model_impl_name(self) -> str:
        """Which implementation serves, e.g. "native_llama" or "transformers/paged"."""
        return self._engine.info.impl_name

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def tokenizer(self) -> Any:
        return self._engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Generate for one prompt or several: text, token ids, {"prompt_token_ids": [...]} or {"prompt": text}.

        Answers stand in the order of the prompts; `use_tqdm` shows a progress bar. Raises RequestError for a prompt
        that cannot be served, before anything runs.
        """
        pairs = self._pairs(_as_list(prompts), sampling_params)
        read = [self._read(prompt) for prompt, _ in pairs]
        return self._run([(text, ids, params) for (text, ids), (_, params) in zip(read, pairs, strict=True)], use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, rendered by the model's chat template."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if one else messages
        pairs = self._pairs(list(conversations), sampling_params)
        return self._run(
            [(*self._render(conversation, template_options), params) for conversation, params in pairs], use_tqdm
        )

    def stream(self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None) -> Iterator[Delta]:
        """Yield one request's deltas as they come; closing the iterator aborts it. Messages are rendered as a chat."""
        is_chat = isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)
        _, ids = self._render(prompt, {}) if is_chat else self._read(prompt)
        params = params or SamplingParams()
        request = self._add(ids, params)
        open_samples = params.n
        try:
            while open_samples:
                for delta in self._engine.step():
                    if delta.request_id == request:
                        open_samples -= delta.finish_reason is not None
                        yield delta
        finally:
            self._engine.abort(request)

    def reset_prefix_cache(self) -> None:
        self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Free the model and its memory; the LLM cannot be used afterwards. Again does nothing."""
        if not self._closed:
            self._engine.close()
            self._closed = True
            device = self._engine.runner.device.device
            del self._engine
            give_back()  # attention and its last batch hold each other
            forget_cached(device)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------ prompts

    def _pairs(self, prompts: list[Any], params: Any) -> list[tuple[Any, SamplingParams]]:
        if self._closed:
            raise CoreError("This LLM is closed; make a new one.")
        if params is None or isinstance(params, SamplingParams):
            return [(prompt, params or SamplingParams()) for prompt in prompts]
        if len(params) != len(prompts):
            raise ConfigError(
                f"{len(prompts)} prompts were given with {len(params)} sampling params; give one or as many."
            )
        return list(zip(prompts, params, strict=True))

    def _read(self, prompt: Any) -> tuple[str | None, list[int]]:
        """Return text (None if ids were given) and ids."""
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            if "prompt" not in prompt:
                raise InvalidParameter(
                    f"A prompt has the keys {sorted(prompt)}; it needs prompt or prompt_token_ids.", "prompt"
                )
            prompt = prompt["prompt"]
        if not isinstance(prompt, str):
            return None, list(prompt)
        if self._engine.tokenizer is None:
            raise InvalidParameter("A text prompt needs a tokenizer; give prompt_token_ids to this engine.", "prompt")
        return prompt, self._engine.tokenizer.encode(prompt)

    def _render(self, messages: Any, options: Mapping[str, Any]) -> tuple[str, list[int]]:
        tokenizer = self._engine.tokenizer
        if tokenizer is None or not tokenizer.has_chat_template:
            raise InvalidParameter(
                "This model has no chat template; use generate, or give --chat-template.", "messages"
            )
        text = tokenizer.render_chat(messages, **options)
        return text, tokenizer.encode(text, add_special_tokens=False)

    # ------------------------------------------------------------------------------------------ run

    def _add(self, ids: list[int], params: SamplingParams) -> str:
        request = ClientRequest(str(next(self._numbers)), ids, params)
        self._engine.add(request)
        return request.id

    def _run(self, requests: list[tuple[str | None, list[int], SamplingParams]], use_tqdm: bool) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        try:
            for text, ids, params in requests:
                outputs[self._add(ids, params)] = _empty(text, ids, params)
            self._finish_all(outputs, use_tqdm)
        finally:
            for request_id in outputs:
                self._engine.abort(request_id)  # does nothing to those that are done
        return list(outputs.values())

    def _finish_all(self, outputs: dict[str, RequestOutput], use_tqdm: bool) -> None:
        from rich.progress import Progress

        total = sum(len(output.outputs) for output in outputs.values())
        with Progress(disable=not use_tqdm) as progress:
            bar = progress.add_task("Generated", total=total)
            while self._engine.has_work:
                for delta in self._engine.step():
                    collect(outputs[delta.request_id], delta)
                    progress.advance(bar, delta.finish_reason is not None)


def _as_list(prompts: Any) -> list[Any]:
    """One prompt or several? A list of ints is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    listed = list(prompts)
    return [listed] if listed and all(isinstance(item, int) for item in listed) else listed


def _empty(text: str | None, ids: list[int], params: SamplingParams) -> RequestOutput:
    wants = params.logprobs is not None
    samples = [CompletionOutput(index, "", [], [] if wants else None, None) for index in range(params.n)]
    return RequestOutput("", text, ids, samples)


def collect(output: RequestOutput, delta: Delta) -> None:
    """Add a delta to a request's output."""
    output.request_id = delta.request_id
    output.num_cached_tokens = delta.num_cached_tokens
    if delta.prompt_logprobs is not None:
        output.prompt_logprobs = delta.prompt_logprobs
    sample = output.outputs[delta.index]
    sample.text += delta.text
    sample.token_ids.extend(delta.token_ids)
    if sample.logprobs is not None and delta.logprobs is not None:
        sample.logprobs.extend(delta.logprobs)
    if delta.finish_reason is not None:
        sample.finish_reason, sample.stop_reason = delta.finish_reason, delta.stop_reason
