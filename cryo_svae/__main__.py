"""``python -m cryo_svae`` is ``cryo-svae``: what torchrun starts."""

from cryo_svae.cli import entry_point

if __name__ == "__main__":
    entry_point()
