"""Every error that core-serve raises on purpose.

CoreError                     one line for the user, exit code 1, no traceback
├── ConfigError               an option is unknown, malformed or does not fit another
├── PluginError               a plugin cannot be imported, is misspelt, doubled or made for another API
├── NoImplementation          no plugin can serve this model (or not the one asked for)
├── CheckpointError           a checkpoint cannot be opened, or its tensors do not fit the model
├── UnsupportedAttention      an attention call asks for something that the backend does not honour
├── KernelError               a kernel was given a tensor whose shape, strides, dtype or device it does not take
├── EngineDead                the engine process ended; requests in flight are lost
└── RequestError              one request is refused; the engine goes on
    ├── InvalidParameter      a field has a wrong type or value
    ├── PromptTooLong         the prompt, or prompt and max_tokens, exceed the model's length
    ├── ModelNotFound         the request names a model that is not served
    └── Overloaded            the queue is full; try again later
"""

from __future__ import annotations


class CoreError(Exception):
    """An error whose message is written for the user."""


class ConfigError(CoreError):
    """An option is unknown, malformed or does not fit another."""


class PluginError(CoreError):
    """A plugin cannot be used; the message names plugin, distribution and the way on."""


class NoImplementation(CoreError):
    """No plugin can serve the model, or not the one that was asked for."""


class CheckpointError(CoreError):
    """A checkpoint cannot be opened, or its tensors do not fit the model."""


class UnsupportedAttention(CoreError):
    """An attention call asks for something that the backend does not honour; names layer and argument."""


class KernelError(CoreError):
    """A kernel was given a tensor that it does not take; names kernel, argument and what would be right."""


class EngineDead(CoreError):
    """The engine process ended while requests were in flight."""


class RequestError(CoreError):
    """One request is refused. `param` names the field at fault, `status` is the HTTP status to answer with."""

    status = 400
    code: str | None = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, str | None]]:
        return type(self), (str(self), self.param)


class InvalidParameter(RequestError, ValueError):
    """A field has a wrong type or value."""

    code = "invalid_value"


class PromptTooLong(RequestError):
    """The prompt, or prompt and max_tokens together, exceed the model's length."""

    code = "context_length_exceeded"


class ModelNotFound(RequestError):
    """The request names a model that is not served."""

    status = 404
    code = "model_not_found"


class Overloaded(RequestError):
    """The queue is full."""

    status = 503
    code = "overloaded"
