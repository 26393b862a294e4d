"""`python -m pacl_kernels`: print the backends that can run on this machine, and what the others lack."""

from . import __version__, available_backends

if __name__ == "__main__":
    print(f"pacl_kernels {__version__}")
    for name, reason in available_backends().items():
        print(f"  {name:<10} {'available' if reason is None else reason}")
