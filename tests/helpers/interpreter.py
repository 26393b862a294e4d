"""Triton's interpreter at about half its cost, with the same numbers."""

from dataclasses import replace


def hasten() -> None:
    """Leave out two things that it does over and over without effect; where its parts have other names, nothing."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    # It computes whether 32-bit integers overflow, and looks at the outcome only with `debug`.
    builder = interpreter.interpreter_builder
    options = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not options.debug:
        builder.options = replace(options, sanitize_overflow=False)
    # Each call of a device function puts Triton's language in place anew, which its launch or an earlier call has done.
    function = interpreter.InterpretedFunction
    if not hasattr(function, "rewrite"):
        return
    first_call, modules = function.__call__, set()

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module in modules:
            return self.rewrite()(*args, **kwargs)
        modules.add(module)
        return first_call(self, *args, **kwargs)

    function.__call__ = call
