"""The command line: ``python -m spikedecoder``, and with it ``torchrun -m spikedecoder``."""

from spikedecoder.cli import main

if __name__ == "__main__":
    main()
