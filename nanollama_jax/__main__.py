"""`python -m nanollama_jax` is the `nanollama` command, installed or not."""

from nanollama_jax.commands import main

if __name__ == "__main__":
    main()
