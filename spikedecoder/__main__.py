"""``python -m spikedecoder``, and so ``torchrun -m spikedecoder``: the command line."""

from spikedecoder.cli import main

if __name__ == "__main__":
    main()
