"""Run Triton's interpreter at about half its cost, with the same results."""

from dataclasses import replace


def hasten() -> None:
    """Skip two repeated steps of the interpreter that have no effect.

    Do nothing where the interpreter's internals have other names.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    # The interpreter checks 32-bit integers for overflow, but reads the result only with `debug`.
    builder = interpreter.interpreter_builder
    options = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not options.debug:
        builder.options = replace(options, sanitize_overflow=False)
    # Each call of a device function patches Triton's language again, although its launch or an earlier call did so.
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
